"""`image_text_similarity`: what it means, what it refuses, which backend runs it."""

from functools import partial

from torch import Tensor

from ...checks import check_tensor, describe
from ..backends import choose_backend
from ..dense_attention import DTYPES, no_autocast
from .chunked import image_text_similarity_chunked
from .reference import image_text_similarity_reference
from .triton import op as triton_op


def image_text_similarity(image_feats: Tensor, text_feats: Tensor, *, backend: str = "auto") -> Tensor:
    """Similarity of every image to every text: the best of the image's queries (BLIP-2, section 3.1, ITC).

        out[b, t] = max over q of image_feats[b, q] · text_feats[t]

    The dot products are never all held at once. The gradient goes to the first of the best queries, and is
    the same in every run.

    Args:
        image_feats: [B, Q, E], fp16, bf16, fp32 or fp64; projected and usually normalised queries.
        text_feats: [T, E], same dtype and device.
        backend: "auto" (the first of `triton`, `torch`, `reference` that can serve), or one of them; a named
            backend that cannot serve raises.

    Returns:
        [B, T] in the features' dtype. Dot products are summed, and compared with one another, in fp32 (fp64
        for fp64 features). A NaN among an image's dot products gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed.
    """
    check_tensor("image_feats", image_feats, ["B", "Q", "E"], DTYPES)
    queries, channels = image_feats.shape[1:]
    if queries == 0 or channels == 0:
        expected = "at least one query and one channel"
        raise ValueError(f"image_feats: expected {expected}, got {describe(image_feats)}")
    check_tensor("text_feats", text_feats, ["T", channels], [image_feats.dtype], image_feats.device)
    candidates = {
        "triton": partial(triton_op.supports, image_feats, text_feats),
        "torch": lambda: None,
        "reference": lambda: None,
    }
    chosen = choose_backend(backend, candidates)
    with no_autocast(image_feats.device):
        if chosen == "triton":
            return triton_op.image_text_similarity_triton(image_feats, text_feats)
        if chosen == "torch":
            return image_text_similarity_chunked(image_feats, text_feats)
        return image_text_similarity_reference(image_feats, text_feats)
