"""FLOP formulas against counts by hand and against what is counted in the references' own matrix products."""

import pytest
import torch
from test_self_attention import B, C, U, masks_of_lengths
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from blip2_kernels import extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops.cross_attention.reference import cross_attention_reference
from blip2_kernels.ops.cross_attention.triton.op import cross_attention_triton
from blip2_kernels.ops.flops import FORMULAS
from blip2_kernels.ops.image_text_similarity.reference import image_text_similarity_reference
from blip2_kernels.ops.image_text_similarity.triton.op import image_text_similarity_triton
from blip2_kernels.ops.latent_attention.reference import latent_attention_reference
from blip2_kernels.ops.latent_attention.triton.op import latent_attention_triton
from blip2_kernels.ops.self_attention.compiled import self_attention_compiled
from blip2_kernels.ops.self_attention.reference import self_attention_reference
from blip2_kernels.ops.self_attention.triton.op import self_attention_triton

HEADS, HEAD_DIM = 3, 16
CALM = {"dropout": 0.0, "dropout_key": None, "layer": 0, "scale": 0.25}


def tensors(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Leaves; those on the device "meta" have no data, so that operators are counted without being run."""
    return [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]


def counted(call) -> tuple[int, int]:
    """FLOPs of a call and of its backward."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def products(pairs: int, channels: int, count: int) -> int:
    """FLOPs of `count` products over pairs of a row and a key: a multiplication and an addition a channel."""
    return 2 * pairs * channels * count


def assert_recomputes_scores(ours: tuple[int, int], reference: tuple[int, int]) -> None:
    """Two products forward on both sides; backward four in the reference, and the scores again in ours."""
    assert ours[0] == reference[0] > 0
    assert 4 * ours[1] == 5 * reference[1] > 0


# Lengths of three samples' texts; the longest has 5 or 6 tokens.
FIRST, SECOND = [3, 0, 5], [6, 2, 1]


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("modes", "lengths", "pairs"),
    [
        ((), [], 4 * 4),
        ((U,), [FIRST], 4 * 4 + 5 * 5),
        ((B,), [FIRST], 9 * 9),
        ((C,), [SECOND], 10 * 10),
        ((U, C), [FIRST, SECOND], 5 * 5 + 10 * 10),
    ],
    ids=["queries", "unimodal", "bidirectional", "causal", "pair"],
)
def test_self_attention(modes, lengths, pairs, padded):
    """Four queries a sample. The layout holds fewer rows than its rectangle where texts are packed."""
    masks = masks_of_lengths(lengths, 8)
    layout = TokenLayout.from_attention_masks(4, masks, samples=3, padded=padded)
    if padded:
        pairs = {(): 16, (U,): 16 + 64, (B,): 144, (C,): 144, (U, C): 64 + 144}[modes]
    shapes = [(layout.rows, HEADS, HEAD_DIM)] * 3
    arguments = (layout, layout, AttentionMask(modes))
    ours = counted(lambda: self_attention_triton(*tensors("meta", *shapes), *arguments, **CALM))
    channels = HEADS * HEAD_DIM
    assert ours == (products(3 * pairs, channels, 2), products(3 * pairs, channels, 5))
    if extension.reason() is None:
        # A joint tile holds scores of queries and a causal text too; the compiled operator has none.
        pairs -= 4 * (8 if padded else 6) * (C in modes)
        compiled = counted(lambda: self_attention_compiled(*tensors("cpu", *shapes), *arguments, **CALM))
        assert compiled == (products(3 * pairs, channels, 2), products(3 * pairs, channels, 5))
    if U not in modes:  # the reference attends over one rectangle, whatever sees each other in it
        leaves = tensors("cpu", *shapes)
        assert_recomputes_scores(ours, counted(lambda: self_attention_reference(*leaves, *arguments, **CALM)))


@pytest.mark.parametrize(
    ("modes", "kept", "pairs"),
    [((B,), ["none"], 4 * (4 + 6)), ((B,), ["first"], (4 + 1) * (4 + 6)), ((U,), ["first"], 4 * 4 + 1 * 6)],
    ids=["queries of matching", "queries and first token", "contrast"],
)
def test_self_attention_of_some_rows(modes, kept, pairs):
    kv_layout = TokenLayout.from_attention_masks(4, masks_of_lengths([SECOND], 6))
    q_layout, _ = kv_layout.select(texts=kept)
    shapes = [(layout.rows, HEADS, HEAD_DIM) for layout in (q_layout, kv_layout, kv_layout)]
    arguments = (q_layout, kv_layout, AttentionMask(modes))
    ours = counted(lambda: self_attention_triton(*tensors("meta", *shapes), *arguments, **CALM))
    channels = HEADS * HEAD_DIM
    assert ours == (products(3 * pairs, channels, 2), products(3 * pairs, channels, 5))
    if extension.reason() is None:
        assert ours == counted(lambda: self_attention_compiled(*tensors("cpu", *shapes), *arguments, **CALM))
    if U not in modes:
        leaves = tensors("cpu", *shapes)
        assert_recomputes_scores(ours, counted(lambda: self_attention_reference(*leaves, *arguments, **CALM)))


@pytest.mark.parametrize("index", [None, [1, 0, 0, 1, 1]], ids=["own images", "shared images"])
@pytest.mark.parametrize(("queries", "tokens"), [(4, 7), (32, 33)])
def test_cross_attention(index, queries, tokens):
    samples, images = 5, 5 if index is None else 2
    keys = (images, tokens, HEADS, HEAD_DIM)
    shapes = [(samples, queries, HEADS, HEAD_DIM), keys, keys]
    index = None if index is None else torch.tensor(index, dtype=torch.int32)
    image_lengths = torch.full((images,), tokens - 2, dtype=torch.int32)
    on_meta = (None if index is None else index.to("meta"), image_lengths.to("meta"), None, None)
    ours = counted(lambda: cross_attention_triton(*tensors("meta", *shapes), *on_meta, **CALM))
    pairs, channels = samples * queries * tokens, HEADS * HEAD_DIM
    assert ours == (products(pairs, channels, 2), products(pairs, channels, 5))
    leaves = tensors("cpu", *shapes)
    reference = counted(lambda: cross_attention_reference(*leaves, index, None, None, **CALM))
    assert_recomputes_scores(ours, reference)


@pytest.mark.parametrize("index", [None, [0, 0, 1, 0]], ids=["own images", "shared images"])
@torch.no_grad()
def test_latent_attention(index):
    samples, rows, tokens, width = 4, 6, 9, 20
    shapes = (samples, rows, width), (samples if index is None else 2, tokens, width)
    index = None if index is None else torch.tensor(index, dtype=torch.int32)
    on_meta = None if index is None else index.to("meta")
    counts = []
    for call in (
        lambda: latent_attention_triton(*tensors("meta", *shapes), on_meta, None, None, scale=1.0),
        lambda: latent_attention_reference(*tensors("cpu", *shapes), index, None, scale=1.0),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts == [products(samples * rows * tokens, width, 2)] * 2


def test_image_text_similarity():
    """One product forward. Backward each gradient row is a sum, where the reference multiplies by zeros."""
    images, queries, texts, width = 3, 5, 7, 12
    shapes = (images, queries, width), (texts, width)
    ours = counted(lambda: image_text_similarity_triton(*tensors("meta", *shapes)))
    assert ours == (products(images * queries * texts, width, 1), 0)
    reference = counted(lambda: image_text_similarity_reference(*tensors("cpu", *shapes)))
    assert reference == (ours[0], 2 * ours[0])


def test_fused_attention_of_the_cpu():
    shapes = [(2, HEADS, rows, HEAD_DIM) for rows in (5, 9, 9)]
    ours = counted(lambda: F.scaled_dot_product_attention(*tensors("cpu", *shapes)))
    pairs, channels = 2 * 5 * 9, HEADS * HEAD_DIM
    assert ours == (products(pairs, channels, 2), products(pairs, channels, 5))


def test_every_formula_is_tested_here_or_beside_its_op():
    names = {str(operator).removeprefix("blip2_kernels.").removeprefix("aten.") for operator in FORMULAS}
    compiled = {"packed_attention", "packed_attention_backward"} if extension.reason() is None else set()
    assert names == compiled | {
        "self_attention", "self_attention_backward", "cross_attention", "cross_attention_backward",
        "latent_attention", "image_text_similarity", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "mkldnn._linear_pointwise",  # test_linear.py
    }  # fmt: skip
