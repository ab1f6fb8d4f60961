"""The attention operators: their backends against each other, at the shapes of a BERT-base Q-Former.

pytest bench/                                        (a minute or less on 2 cores)
pytest bench/ --benchmark-json=attention.json        (keeps every round, with device and versions)
"""

import pytest
import torch
from torch import Tensor

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import cross_attention, self_attention

HEADS, HEAD_DIM, QUERIES = 12, 64, 32
IMAGE_TOKENS = 257
"""ViT-g/14 at 224 pixels: 16 by 16 patches and the class token."""
BACKENDS = ["reference", "torch"]
DIRECTIONS = ["forward", "backward"]

pytestmark = pytest.mark.benchmark(min_rounds=3, max_time=0.25, warmup=True, warmup_iterations=1)


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def results(direction: str, attend, **inputs: Tensor) -> dict[str, Tensor]:
    """The output and, for "backward", the gradients of its sum weighted by fixed numbers."""
    if direction == "forward":
        with torch.no_grad():
            return {"output": attend(**inputs)}
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    output = attend(**leaves)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), weights.view_as(output))
    return {
        "output": output.detach(),
        **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "modes",
    [(), (MaskMode.BIDIRECTIONAL,), (MaskMode.UNIMODAL, MaskMode.MULTIMODAL_CAUSAL)],
    ids=["queries", "itm", "itc+itg"],
)
def bench_self_attention(time_checked, device, modes, direction, backend):
    """4 samples of 32 queries and, for each mode, captions of 4 to 20 tokens (12 on average), packed."""
    samples = 4
    lengths = torch.tensor([4, 10, 14, 20])
    text = (torch.arange(32) < lengths[:, None]).long().to(device)
    layout = TokenLayout.from_attention_masks(QUERIES, [text] * len(modes), samples=samples, device=device)
    mask = AttentionMask(modes)
    shape = (layout.rows, HEADS, HEAD_DIM)
    inputs = {name: torch.randn(shape, device=device, dtype=dtype_of(device)) for name in "qkv"}

    def call(backend: str, **tensors: Tensor) -> dict[str, Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self_attention(q, k, v, layout, layout, mask, backend=backend)

        return results(direction, attend, **tensors)

    time_checked(call, backend, inputs, samples=samples, rows=layout.rows, direction=direction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("samples_an_image", [1, 3], ids=["own", "shared"])
def bench_cross_attention(time_checked, device, samples_an_image, direction, backend):
    """32 queries a sample over 257 image tokens; one sample an image (ITC), or three (ITM)."""
    images = 2
    index = torch.arange(images * samples_an_image, dtype=torch.int32, device=device) % images
    dtype = dtype_of(device)
    key_shape = (images, IMAGE_TOKENS, HEADS, HEAD_DIM)
    inputs = {
        "q": torch.randn(len(index), QUERIES, HEADS, HEAD_DIM, device=device, dtype=dtype),
        "k": torch.randn(key_shape, device=device, dtype=dtype),
        "v": torch.randn(key_shape, device=device, dtype=dtype),
    }

    def call(backend: str, **tensors: Tensor) -> dict[str, Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cross_attention(q, k, v, image_index=index, backend=backend)

        return results(direction, attend, **tensors)

    time_checked(call, backend, inputs, samples=len(index), images=images, direction=direction)


def bench_the_whole_model_is_installed():
    """`blip2_kernels.model` loads: the checkout's package must not hide that of an installation."""
    from blip2_kernels.model import QFormerModel

    assert QFormerModel.__module__ == "blip2_kernels.model.qformer"
