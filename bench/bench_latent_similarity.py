"""Latent attention (384 rows share the features as keys and values) and the images' similarity with texts."""

from functools import partial

import torch
from cases import FULL, NAMED, OURS, SHORT, Case, Setting, Spec, Way, operator_case
from torch import Tensor
from torch.nn import functional as F

from blip2_kernels.ops import image_text_similarity, latent_attention

HEADS, QUERIES, IMAGE_WIDTH = 12, 32, 1408
TORCH = "our torch path"


def bench_latent_similarity(timed):
    timed()


def ours_and_torch(run, setting: Setting) -> dict[str, Way | str]:
    """On a CPU both are one."""
    if setting.device == "cpu":
        return {OURS: Way(partial(run, "auto")), TORCH: "the same as ours on a CPU"}
    return {OURS: Way(partial(run, "triton")), TORCH: Way(partial(run, "torch"))}


def latent_case(samples: int, tokens: int, setting: Setting) -> Case:
    width, rows = setting.few(IMAGE_WIDTH, 64), HEADS * QUERIES
    device, dtype = setting.device, setting.dtype

    def run(backend: str, q: Tensor, features: Tensor) -> Tensor:
        return latent_attention(q, features, scale=0.02, backend=backend)

    def bmm(q: Tensor, features: Tensor) -> Tensor:
        return torch.bmm(torch.softmax(torch.bmm(q, features.mT) * 0.02, -1), features)

    def sdpa(q: Tensor, features: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, features, features, scale=0.02)

    shapes = (samples, rows, width), (samples, tokens, width)
    return operator_case(
        setting,
        lambda: [torch.randn(shape, device=device, dtype=dtype) for shape in shapes],
        partial(run, "reference"),
        {**ours_and_torch(run, setting), "bmm": Way(bmm), "sdpa": Way(sdpa)},
        backward=False,
        moved=((2 * samples * rows * width + samples * tokens * width) * dtype.itemsize, 0),
        operations=(4.0 * samples * rows * tokens * width, 0),
        shape={"images": samples, "image tokens": tokens},
    )


def similarity_case(images: int, texts: int, backward: bool, setting: Setting, channels: int = 256) -> Case:
    device, dtype = setting.device, setting.dtype

    def run(backend: str, image: Tensor, text: Tensor) -> Tensor:
        return image_text_similarity(image, text, backend=backend)

    def einsum(image: Tensor, text: Tensor) -> Tensor:
        return torch.einsum("iqe,te->itq", image, text).amax(-1)

    operations = 2.0 * images * QUERIES * texts * channels
    moved = (images * QUERIES + texts) * channels * dtype.itemsize
    shapes = (images, QUERIES, channels), (texts, channels)
    return operator_case(
        setting,
        lambda: [torch.randn(shape, device=device, dtype=dtype) for shape in shapes],
        partial(run, "reference"),
        {**ours_and_torch(run, setting), "einsum": Way(einsum)},
        backward=backward,
        moved=(moved + images * texts * 4, 2 * moved),
        operations=(operations, 2 * operations / QUERIES),
        shape={"images": images, "texts": texts},
    )


CASES = {
    f"latent-{samples}x{tokens}": Spec(
        "latent attention",
        partial(latent_case, samples, tokens),
        (OURS, TORCH, "bmm", "sdpa"),
        cpu=cpu,
        cuda=cuda,
    )
    for samples, tokens, cpu, cuda in (
        (1, 257, SHORT, NAMED),
        (1, 677, FULL, NAMED),
        (1, 2056, FULL, NAMED),
        (8, 257, NAMED, SHORT),
        (64, 257, NAMED, SHORT),
        (8, 2056, NAMED, SHORT),
    )
} | {
    f"similarity-{images}x{texts}{ending}": Spec(
        "similarity",
        partial(similarity_case, images, texts, backward),
        (OURS, TORCH, "einsum"),
        cpu=cpu,
        cuda=cuda,
    )
    for images, texts, cpu, cuda in (
        (100, 100, SHORT, SHORT),
        (200, 1000, FULL, NAMED),
        (1000, 5000, NAMED, SHORT),
    )
    for ending, backward in (("", False), ("-backward", True))
}
