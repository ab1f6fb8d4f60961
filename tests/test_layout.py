"""TokenLayout: every row in its place, for any attention mask."""

import random

import pytest
import torch

from blip2_kernels.layout import (
    CAPTION_STREAM,
    MASK_DTYPES,
    MAX_SAMPLES,
    QUERY_STREAM,
    TEXT_STREAM,
    TokenLayout,
    padded_row_keys,
    real_tokens_first,
    row_keys,
)
from blip2_kernels.mask import AttentionMask

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "scattered": [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("num_queries", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_packed_rows_are_the_real_tokens_in_order(kind, num_queries, dtype):
    mask = torch.tensor(MASKS[kind]).to(dtype)
    texts, queries = torch.randn(3, 5, 7), torch.randn(3, num_queries, 7)
    layout = TokenLayout.from_attention_masks(num_queries, [mask])
    rows = layout.pack(queries if num_queries else None, [texts])
    expected = list(queries.flatten(0, 1))
    expected += [texts[s, t] for s in range(3) for t in range(5) if MASKS[kind][s][t]]
    assert torch.equal(rows, torch.stack(expected))
    assert layout.rows == len(expected)
    assert layout.texts[0].lengths.tolist() == [sum(row) for row in MASKS[kind]]
    assert layout.texts[0].max_length == max(sum(row) for row in MASKS[kind])
    assert torch.equal(layout.unpack_queries(rows), queries)
    assert torch.equal(layout.unpack_text(rows), texts * mask.float()[..., None])


@pytest.mark.parametrize("kind", MASKS)
def test_padded_layout_keeps_every_row_and_the_padding_behind(kind):
    mask, texts, queries = torch.tensor(MASKS[kind]), torch.randn(3, 5, 2), torch.randn(3, 4, 2)
    layout = TokenLayout.from_attention_masks(4, [mask], padded=True)
    rows = layout.pack(queries, [texts])
    assert layout.texts[0].offsets.tolist() == [0, 5, 10, 15]
    assert torch.equal(layout.unpack_text(rows), texts)
    for s, row in enumerate(MASKS[kind]):
        order = [t for t in range(5) if row[t]] + [t for t in range(5) if not row[t]]
        assert torch.equal(rows[12 + 5 * s : 17 + 5 * s], texts[s, order])


@pytest.mark.parametrize("padded", [False, True])
def test_row_keys_do_not_depend_on_the_packing(padded):
    first, second = torch.tensor(MASKS["scattered"]), torch.tensor(MASKS["left"])
    layout = TokenLayout.from_attention_masks(2, [first, second], padded=padded, first_sample=10)
    for i, (mask, stream) in enumerate(((first, TEXT_STREAM), (second, CAPTION_STREAM))):
        wide = padded_row_keys(3, 2, mask, text_stream=stream, first_sample=10)
        back = layout.unpack_text(layout.row_keys[:, None], i)
        real = mask.bool() if not padded else torch.ones_like(mask).bool()
        assert torch.equal(back[..., 0][real], wide[:, 2:][real])
        for s in range(3):
            ordinals = (wide[s, 2:][mask[s].bool()] % 1024).tolist()
            assert ordinals == list(range(int(mask[s].sum())))
            assert set((wide[s, 2:] >> 10).tolist()) == {(stream << 19) + 10 + s}
    assert layout.row_keys[: layout.query_rows].tolist() == [
        (QUERY_STREAM << 29) + ((10 + s) << 10) + i for s in range(3) for i in range(2)
    ]
    assert layout.row_keys.dtype == torch.int32 and layout.row_keys.unique().numel() == layout.rows


@pytest.mark.parametrize("padded", [False, True])
def test_rectangle_and_back(padded):
    seed = random.randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    masks = [torch.rand(4, width) < 0.5 for width in (6, 3)]
    layout = TokenLayout.from_attention_masks(3, masks, padded=padded)
    rows = torch.randn(layout.rows, 5)
    dense = layout.dense()
    assert torch.equal(dense.collect(dense.spread(rows)), rows)
    assert dense.exists.sum() == layout.rows
    assert dense.real.sum() == 12 + sum(int(mask.sum()) for mask in masks)
    assert torch.equal(dense.spread(layout.row_keys), dense.row_keys)
    assert (dense.spread(rows)[~dense.exists] == 0).all()
    assert dense.segment.tolist() == [-1] * 3 + [
        i for i, text in enumerate(layout.texts) for _ in range(text.max_length)
    ]


def test_selection_keeps_names_and_places():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]])
    layout = TokenLayout.from_attention_masks(2, [mask])
    rows = torch.arange(layout.rows)
    queries, index = layout.select(texts=["none"])
    assert index.tolist() == list(range(6)) and queries.rows == 6
    first, index = layout.select(queries=False, texts=["first"])
    assert torch.equal(rows[index], layout.first_rows()) and index.tolist() == [6, 9, 10]
    last, index = layout.select(queries=False, texts=["last"])
    assert index.tolist() == [8, 9, 12] and (last.dense().ordinal[:, 0]).tolist() == [2, 0, 2]
    for selected, chosen in (layout.select(), layout.select(queries=False), layout.select(texts=["last"])):
        assert torch.equal(selected.row_keys, layout.row_keys[chosen])
    assert first.num_queries == 0 and first.samples == 3


def test_ordinary_corner_cases():
    only_queries = TokenLayout.from_attention_masks(3, samples=2)
    assert only_queries.rows == 6 and only_queries.texts == ()
    nobody = TokenLayout.from_attention_masks(3, [torch.zeros(0, 4)])
    assert nobody.rows == 0 and nobody.dense().exists.shape == (0, 3)
    no_columns = TokenLayout.from_attention_masks(1, [torch.zeros(2, 0)])
    assert no_columns.rows == 2 and no_columns.unpack_text(torch.zeros(2, 5)).shape == (2, 0, 5)
    silent = TokenLayout.from_attention_masks(0, [torch.zeros(2, 3)])
    assert silent.rows == 0 and silent.pack(None, [torch.randn(2, 3, 4)]).shape == (0, 4)


def test_gradients_reach_packed_tokens_only():
    mask = torch.tensor(MASKS["scattered"])
    layout = TokenLayout.from_attention_masks(1, [mask])
    text = torch.randn(3, 5, 2, requires_grad=True)
    layout.pack(torch.randn(3, 1, 2), [text]).sum().backward()
    assert torch.equal(text.grad, mask[..., None].expand(-1, -1, 2).float())


ONE = torch.ones(2, 3)
BAD_LAYOUTS = [
    (dict(num_queries=-1, text_masks=[ONE]), ValueError, "num_queries: expected an int in [0, 1024], got -1"),
    (dict(num_queries=2.0, text_masks=[ONE]), TypeError, "num_queries: expected an int"),
    (dict(num_queries=True, text_masks=[ONE]), TypeError, "num_queries: expected an int"),
    (dict(num_queries=1), ValueError, "samples: expected an int where there is no text mask"),
    (
        dict(num_queries=1, text_masks=[torch.ones(3)]),
        ValueError,
        "text_masks[0]: expected [samples, tokens]",
    ),
    (dict(num_queries=1, text_masks=[[1, 0]]), TypeError, "text_masks[0]: expected a tensor"),
    (dict(num_queries=1, text_masks=[ONE * 2]), ValueError, "text_masks[0]: expected only 0 and 1, got 2.0"),
    (dict(num_queries=1, text_masks=[-10000.0 * ONE]), ValueError, "expected only 0 and 1, got -10000.0"),
    (dict(num_queries=1, text_masks=[ONE * float("nan")]), ValueError, "expected only 0 and 1, got nan"),
    (dict(num_queries=1, text_masks=[ONE.to(torch.complex64)]), TypeError, "text_masks[0]: expected bool or"),
    (dict(num_queries=1, text_masks=[ONE, torch.ones(3, 3)]), ValueError, "text_masks[1]: expected"),
    (dict(num_queries=1, text_masks=[ONE], samples=3), ValueError, "text_masks[0]: expected"),
    (dict(num_queries=1, text_masks=[torch.ones(1, 1025)]), ValueError, "text_masks[0].shape[1]: expected"),
    (dict(num_queries=1, text_masks=[ONE], text_streams=[1, 2]), ValueError, "text_streams: expected 1, one"),
    (dict(num_queries=1, text_masks=[ONE, ONE], text_streams=[1, 1]), ValueError, "expected distinct values"),
    (dict(num_queries=1, text_masks=[ONE], text_streams=[0]), ValueError, "text_streams: expected distinct"),
    (dict(num_queries=1, samples=1, device="gpu"), ValueError, "device: expected a torch.device or its name"),
    (
        dict(num_queries=1, samples=1, device="cuda:99"),
        ValueError,
        "device: expected a device that torch",
    ),
    (dict(num_queries=1, samples=1, device=0), TypeError, "device: expected a torch.device or its name, got"),
    (dict(num_queries=1, text_masks=[ONE], padded=1), TypeError, "padded: expected a bool, got int 1"),
    (dict(num_queries=1, samples=MAX_SAMPLES + 1), ValueError, "samples: expected an int in"),
    (
        dict(num_queries=1, samples=2, first_sample=MAX_SAMPLES),
        ValueError,
        "samples: expected an int in [0, 0]",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_LAYOUTS)
def test_bad_layouts(arguments, error, words):
    with pytest.raises(error) as caught:
        TokenLayout.from_attention_masks(**arguments)
    assert words in str(caught.value)


def test_row_keys_of_numbers_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"^ordinals: expected a shape that goes with samples, \[2\], got"):
        row_keys(1, torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match=r"^ordinals: expected a tensor on cpu, got one on meta"):
        row_keys(1, torch.arange(2), torch.arange(2, device="meta"))
    with pytest.raises(TypeError, match=r"^mask: expected bool \[samples, tokens\], got int64"):
        real_tokens_first(torch.ones(2, 3, dtype=torch.int64))


def test_bad_packing():
    layout = TokenLayout.from_attention_masks(2, [ONE])
    queries, text = torch.randn(2, 2, 4), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"texts: expected 1, one a text segment, got 0"):
        layout.pack(queries)
    with pytest.raises(ValueError, match=r"queries: expected \[2, 2, channels\], got float32 \[2, 1, 4\]"):
        layout.pack(queries[:, :1], [text])
    with pytest.raises(TypeError, match="texts: expected a sequence, one entry a text segment, got int 5"):
        layout.pack(queries, 5)
    with pytest.raises(ValueError, match="queries: expected a tensor on cpu, got one on meta"):
        layout.pack(queries.to("meta"), [text])
    with pytest.raises(ValueError, match=r"texts\[0\]: expected a tensor on cpu, got one on meta"):
        layout.pack(queries, [text.to("meta")])
    with pytest.raises(ValueError, match="rows: expected a tensor on cpu, got one on meta"):
        layout.unpack_text(torch.zeros(layout.rows, 4, device="meta"))
    with pytest.raises(TypeError, match="texts: expected a sequence, one entry a text segment, got int 5"):
        layout.select(texts=5)
    with pytest.raises(TypeError, match="queries: expected a bool, got str 'yes'"):
        layout.select(queries="yes")
    with pytest.raises(TypeError, match="queries: expected a tensor"):
        layout.pack(None, [text])
    with pytest.raises(ValueError, match=r"texts\[0\]: expected float32 \[2, 3, 4\]"):
        layout.pack(queries, [text[:, :2]])
    with pytest.raises(
        ValueError, match=r"texts\[0\]: expected 'all', 'first', 'last' or 'none', got 'some'"
    ):
        layout.select(texts=["some"])


EMPTY = torch.tensor([[1, 1, 1], [0, 0, 0]])
PACKED = TokenLayout.from_attention_masks(2, [ONE])
BAD_CALLS = [
    (lambda: TokenLayout.from_attention_masks(2, [EMPTY]).first_rows(), ValueError, "got none in sample 1"),
    (
        lambda: TokenLayout.from_attention_masks(2, [EMPTY]).select(texts=["first"]),
        ValueError,
        "texts[0]: expected 'first' only where every sample has a real token, got none in sample 1",
    ),
    (
        lambda: TokenLayout.from_attention_masks(2, [EMPTY], padded=True).select(texts=["last"]),
        ValueError,
        "texts[0]: expected 'last' only where every sample has a real token, got none in sample 1",
    ),
    (
        lambda: TokenLayout.from_attention_masks(2, ONE),
        TypeError,
        "text_masks: expected a sequence, one entry",
    ),
    (
        lambda: TokenLayout.from_attention_masks(2, None),
        TypeError,
        "text_masks: expected a sequence, one entry",
    ),
    (
        lambda: TokenLayout.from_attention_masks(2, [ONE], text_streams=3),
        TypeError,
        "text_streams: expected a sequence, one entry a segment, got int 3",
    ),
    (
        lambda: TokenLayout.from_attention_masks(2, [ONE], text_streams=["a"]),
        TypeError,
        "text_streams: expected an int >= 0, got str 'a'",
    ),
    (
        lambda: TokenLayout.from_attention_masks(2, [ONE], padded="yes"),
        TypeError,
        "padded: expected a bool, got str 'yes'",
    ),
    (lambda: PACKED.select(texts="first"), TypeError, "texts: expected a sequence, one entry a text"),
    (lambda: PACKED.first_rows(3), ValueError, "segment: expected an int in [0, 0], got 3"),
    (lambda: PACKED.text_start(7), ValueError, "segment: expected an int in [0, 0], got 7"),
    (lambda: PACKED.unpack_text(torch.zeros(10, 4), 1), ValueError, "segment: expected an int in [0, 0]"),
    (
        lambda: PACKED.unpack_text(torch.zeros(4, 4)),
        ValueError,
        "rows: expected [10, ...], got float32 [4, 4]",
    ),
    (lambda: PACKED.unpack_queries(torch.zeros(3, 4)), ValueError, "rows: expected [10, ...]"),
    (lambda: PACKED.unpack_queries([1]), TypeError, "rows: expected a tensor [10, ...], got list"),
    (
        lambda: PACKED.pack(torch.zeros(2, 2, 4).half(), [torch.zeros(2, 3, 4)]),
        TypeError,
        "texts[0]: expected float16 [2, 3, 4], got float32 [2, 3, 4]",
    ),
    (
        lambda: PACKED.pack(torch.zeros(2, 2, 4), [torch.zeros(2, 3, 5)]),
        ValueError,
        "texts[0]: expected float32 [2, 3, 4], got float32 [2, 3, 5]",
    ),
    (lambda: row_keys(9, ONE.long(), ONE.long()), ValueError, "stream: expected an int in [0, 3], got 9"),
    (
        lambda: row_keys(1, ONE.long() * MAX_SAMPLES, ONE.long()),
        ValueError,
        f"samples: expected values in [0, {MAX_SAMPLES}), got {MAX_SAMPLES}",
    ),
    (
        lambda: row_keys(1, ONE.long(), -ONE.long()),
        ValueError,
        "ordinals: expected values in [0, 1024), got -1",
    ),
    (lambda: row_keys(1, ONE, ONE.long()), TypeError, "samples: expected int64 or int32 [2, 3], got float32"),
    (lambda: row_keys(1, [1], ONE.long()), TypeError, "samples: expected a tensor"),
    (lambda: padded_row_keys(2, 3, ONE, text_stream=8), ValueError, "text_stream: expected an int in [1, 3]"),
    (lambda: padded_row_keys(2, 3, [[1]]), TypeError, "text_mask: expected a tensor"),
    (lambda: AttentionMask().check(None), TypeError, "layout: expected a TokenLayout, got NoneType"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS)
def test_bad_calls(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_a_mask_may_be_of_any_real_dtype(dtype):
    mask = torch.tensor(MASKS["scattered"])
    layout = TokenLayout.from_attention_masks(2, [mask.to(dtype)])
    assert torch.equal(layout.row_keys, TokenLayout.from_attention_masks(2, [mask]).row_keys)
    assert {torch.float64, torch.int8, torch.int16} <= set(MASK_DTYPES)
