"""AttentionMask: the dense form against the paper's table, row by row."""

import itertools

import pytest
import torch

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode

U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL


def test_the_three_masks_spelt_out():
    layout = TokenLayout.from_attention_masks(2, [torch.tensor([[1, 1, 1]])])
    full, none = [1, 1], [0, 0]
    assert AttentionMask((U,)).dense(layout)[0].int().tolist() == [
        [*full, 0, 0, 0],
        [*full, 0, 0, 0],
        [*none, 1, 1, 1],
        [*none, 1, 1, 1],
        [*none, 1, 1, 1],
    ]
    assert AttentionMask((B,)).dense(layout)[0].all()
    assert AttentionMask((C,)).dense(layout)[0].int().tolist() == [
        [*full, 0, 0, 0],
        [*full, 0, 0, 0],
        [*full, 1, 0, 0],
        [*full, 1, 1, 0],
        [*full, 1, 1, 1],
    ]


def test_two_texts_side_by_side_never_meet():
    layout = TokenLayout.from_attention_masks(1, [torch.tensor([[1, 1]]), torch.tensor([[1, 1, 0]])])
    assert AttentionMask((U, C)).dense(layout)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_padding_is_never_seen_and_causality_follows_the_real_tokens():
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])
    packed = AttentionMask((C,)).dense(TokenLayout.from_attention_masks(0, [mask]))
    assert packed[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    padded = AttentionMask((C,)).dense(TokenLayout.from_attention_masks(0, [mask], padded=True))
    assert padded[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("mode", MaskMode)
@pytest.mark.parametrize("choice", ["first", "last", "none", "all"])
def test_a_selection_sees_what_its_rows_saw(mode, choice):
    layout = TokenLayout.from_attention_masks(2, [torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])])
    mask = AttentionMask((mode,))
    whole = mask.dense(layout)
    for queries in (True, False):
        selected, index = layout.select(queries=queries, texts=[choice])
        part = mask.dense(selected, layout)
        dense, full = selected.dense(), layout.dense()
        for row, number in enumerate(index.tolist()):
            place = int(dense.place[row])
            sample, column = divmod(place, part.shape[1])
            original = int(full.place[number]) % whole.shape[1]
            assert torch.equal(part[sample, column], whole[sample, original])


def test_only_the_pair_that_shares_its_queries_is_accepted():
    allowed = AttentionMask((U, C))
    assert allowed.modes == (U, C)
    for pair in itertools.product(MaskMode, MaskMode):
        if pair != (U, C):
            with pytest.raises(
                ValueError, match=r"modes: expected one mode or \(UNIMODAL, MULTIMODAL_CAUSAL\)"
            ):
                AttentionMask(pair)
    with pytest.raises(ValueError, match="modes: expected one mode"):
        AttentionMask((U, C, C))
    with pytest.raises(TypeError, match="modes: expected a tuple of MaskMode"):
        AttentionMask(B)
    with pytest.raises(TypeError, match="modes: expected a tuple of MaskMode"):
        AttentionMask((2,))


def test_mask_and_layout_must_belong_together():
    layout = TokenLayout.from_attention_masks(2, [torch.ones(1, 3)])
    with pytest.raises(ValueError, match="q_layout: expected 0 text segments, one a mode, got 1"):
        AttentionMask().dense(layout)
