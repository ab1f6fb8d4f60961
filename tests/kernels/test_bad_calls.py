"""Wrong calls of the kernels: each is refused by name, with what was expected and what came, unlaunched."""

from functools import partial

import pytest
import torch

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import cross_attention, self_attention

LAYOUT = TokenLayout.from_attention_masks(2, [torch.ones(2, 3)])
LAST = LAYOUT.select(texts=["last"])[0]
OTHER = TokenLayout.from_attention_masks(2, [torch.ones(3, 3)])
TWO = TokenLayout.from_attention_masks(2, [torch.ones(2, 3)] * 2)
BARE = TokenLayout.from_attention_masks(2, samples=5)
MORE = TokenLayout.from_attention_masks(4, [torch.ones(2, 3)])
B = MaskMode.BIDIRECTIONAL
X = torch.randn(10, 2, 16)
KEY = torch.tensor(1)
NAN, INF = float("nan"), float("inf")

SELF = {"q": X, "k": X, "v": X, "q_layout": LAYOUT, "kv_layout": LAYOUT, "mask": AttentionMask((B,))}
SELF_BAD = [
    ({"q": X.tolist()}, TypeError, "q: expected a tensor"),
    ({"k": None}, TypeError, "k: expected a tensor"),
    ({"v": "v"}, TypeError, "v: expected a tensor"),
    (
        {"q": X[0]},
        ValueError,
        "q: expected float16 or bfloat16 or float32 or float64 [rows, heads, head_dim]",
    ),
    ({"q": X[None]}, ValueError, "q: expected float16 or"),
    ({"k": X[0]}, ValueError, "k: expected float32 [rows, 2, 16], got float32 [2, 16]"),
    ({"q": X.int()}, TypeError, "q: expected float16 or"),
    ({"q": X.double()}, TypeError, "k: expected float64 [rows, 2, 16], got float32"),
    ({"k": X.half()}, TypeError, "k: expected float32 [rows, 2, 16], got float16"),
    ({"v": X.bfloat16()}, TypeError, "v: expected float32 [rows, 2, 16], got bfloat16"),
    ({"k": X[:, :1]}, ValueError, "k: expected float32 [rows, 2, 16], got float32 [10, 1, 16]"),
    ({"v": X[..., :8]}, ValueError, "v: expected float32 [rows, 2, 16], got float32 [10, 2, 8]"),
    ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, ValueError, "q: expected at least one head"),
    ({"q": X[..., :0], "k": X[..., :0], "v": X[..., :0]}, ValueError, "q: expected at least one head"),
    ({"q": X[:9]}, ValueError, "q: expected 10 rows, as q_layout has, got 9"),
    ({"k": X[:9], "v": X[:9]}, ValueError, "k: expected 10 rows, as kv_layout has, got 9"),
    ({"v": X[:9]}, ValueError, "v: expected [10, 2, 16], got float32 [9, 2, 16]"),
    ({"q": X.to("meta")}, ValueError, "k: expected a tensor on meta, got one on cpu"),
    ({"v": X.to("meta")}, ValueError, "v: expected a tensor on cpu, got one on meta"),
    ({"q_layout": None}, TypeError, "q_layout: expected a TokenLayout, got NoneType"),
    ({"kv_layout": 3}, TypeError, "kv_layout: expected a TokenLayout, got int 3"),
    ({"q_layout": OTHER, "q": torch.randn(15, 2, 16)}, ValueError, "kv_layout: expected 3 samples"),
    ({"q_layout": BARE}, ValueError, "q_layout: expected 1 text segments, one a mode, got 0"),
    ({"kv_layout": TWO}, ValueError, "kv_layout: expected 1 text segments, one a mode, got 2"),
    ({"q_layout": MORE, "q": torch.randn(14, 2, 16)}, ValueError, "q_layout: expected 0 or 2 queries"),
    ({"mask": B}, TypeError, "mask: expected an AttentionMask"),
    ({"mask": AttentionMask()}, ValueError, "q_layout: expected 0 text segments"),
    ({"dropout": 1.0}, ValueError, "dropout: expected a number in [0, 1), got 1.0"),
    ({"dropout": -0.1}, ValueError, "dropout: expected a number in [0, 1), got -0.1"),
    ({"dropout": NAN}, ValueError, "dropout: expected a number in [0, 1), got nan"),
    ({"dropout": "0.1"}, TypeError, "dropout: expected a number in [0, 1)"),
    ({"dropout": 0.1}, ValueError, "dropout_key: expected an int64 [] tensor"),
    ({"dropout": 0.1, "dropout_key": 3}, TypeError, "dropout_key: expected a tensor int64 []"),
    ({"dropout": 0.1, "dropout_key": KEY.int()}, TypeError, "dropout_key: expected int64 []"),
    ({"dropout": 0.1, "dropout_key": KEY[None]}, ValueError, "dropout_key: expected int64 []"),
    ({"layer": -1}, ValueError, "layer: expected an int"),
    ({"layer": 1 << 29}, ValueError, "layer: expected an int"),
    ({"layer": 1.0}, TypeError, "layer: expected an int"),
    ({"scale": NAN}, ValueError, "scale: expected a finite number or None, got nan"),
    ({"scale": INF}, ValueError, "scale: expected a finite number or None, got inf"),
    ({"scale": "1"}, TypeError, "scale: expected a finite number"),
    (
        {"backend": "cuda"},
        ValueError,
        "backend: expected one of 'auto', 'triton', 'csrc', 'torch', 'reference'",
    ),
    ({"backend": None}, ValueError, "backend: expected one of"),
    # What only the kernels cannot do: the backend is named, so nothing else is tried.
    (dict.fromkeys("qkv", X.double()), ValueError, "'triton' cannot serve this call: q is float64"),
    (
        dict.fromkeys("qkv", torch.randn(10, 2, 129)),
        ValueError,
        "'triton' cannot serve this call: q has head dim 129, the kernels take at most 128",
    ),
    (
        {"v": torch.randn(10, 16, 2).mT},
        ValueError,
        "'triton' cannot serve this call: the last dimension of v is not contiguous (its stride is 2)",
    ),
    (
        {"k": X[..., ::2], "q": X[..., :8], "v": X[..., :8]},
        ValueError,
        "the last dimension of k is not contiguous",
    ),
    (
        {
            "q_layout": LAST,
            "kv_layout": LAST,
            **dict.fromkeys("qkv", X[:6]),
            "dropout": 0.1,
            "dropout_key": KEY,
        },
        ValueError,
        "'triton' cannot serve this call: with dropout the kernels need",
    ),
    (dict.fromkeys("qkv", X.to("meta")), ValueError, "q_layout: expected a layout on meta, got one on cpu"),
]

Q = torch.randn(3, 4, 2, 16)
KV = torch.randn(2, 5, 2, 16)
INDEX = torch.tensor([0, 1, 1], dtype=torch.int32)
CROSS = {"q": Q, "k": KV, "v": KV, "image_index": INDEX}
CROSS_BAD = [
    ({"q": Q.tolist()}, TypeError, "q: expected a tensor"),
    (
        {"q": Q[0]},
        ValueError,
        "q: expected float16 or bfloat16 or float32 or float64 [S, Q, heads, head_dim]",
    ),
    ({"k": KV[0]}, ValueError, "k: expected float32 [images, tokens, 2, 16]"),
    ({"v": KV[:1]}, ValueError, "v: expected [2, 5, 2, 16], got float32 [1, 5, 2, 16]"),
    ({"v": KV[:, :4]}, ValueError, "v: expected [2, 5, 2, 16]"),
    ({"k": KV.half()}, TypeError, "k: expected float32 [images, tokens, 2, 16], got float16"),
    ({"k": KV[:, :, :1]}, ValueError, "k: expected float32 [images, tokens, 2, 16]"),
    ({"q": Q.to("meta")}, ValueError, "k: expected a tensor on meta"),
    ({"image_index": None}, ValueError, "image_index: expected int32 [3] where 3 samples meet 2 images"),
    ({"image_index": INDEX.long()}, TypeError, "image_index: expected int32 [3] with values in [0, 2)"),
    ({"image_index": [0, 1, 1]}, TypeError, "image_index: expected int32 [3]"),
    ({"image_index": INDEX[:2]}, ValueError, "image_index: expected int32 [3]"),
    ({"image_index": INDEX[None]}, ValueError, "image_index: expected int32 [3]"),
    ({"image_index": INDEX + 1}, ValueError, "image_index: expected int32 [3] with values in [0, 2), got"),
    ({"image_index": INDEX - 1}, ValueError, "image_index: expected int32 [3] with values in [0, 2), got"),
    ({"image_index": INDEX.to("meta")}, ValueError, "image_index: expected a tensor on cpu"),
    ({"image_lengths": torch.tensor([6, 1]).int()}, ValueError, "image_lengths: expected values in [0, 5]"),
    ({"image_lengths": torch.tensor([-1, 1]).int()}, ValueError, "image_lengths: expected values in [0, 5]"),
    ({"image_lengths": torch.tensor([3, 1])}, TypeError, "image_lengths: expected int32 [2]"),
    ({"image_lengths": torch.tensor([3]).int()}, ValueError, "image_lengths: expected int32 [2]"),
    ({"image_mask": torch.ones(2, 4)}, ValueError, "image_mask: expected"),
    ({"image_mask": torch.full((2, 5), 2)}, ValueError, "image_mask: expected only 0 and 1, got 2"),
    ({"image_mask": torch.full((2, 5), NAN)}, ValueError, "image_mask: expected only 0 and 1, got nan"),
    (
        {"image_mask": torch.ones(2, 5), "image_lengths": torch.tensor([3, 1]).int()},
        ValueError,
        "image_mask: expected None beside image_lengths",
    ),
    ({"row_keys": torch.zeros(3, 4)}, TypeError, "row_keys: expected int32 [3, 4]"),
    ({"row_keys": torch.zeros(12).int()}, ValueError, "row_keys: expected int32 [3, 4]"),
    ({"dropout": 1}, ValueError, "dropout: expected a number in [0, 1)"),
    ({"dropout": 0.1}, ValueError, "dropout_key: expected an int64 [] tensor"),
    ({"layer": True}, TypeError, "layer: expected an int"),
    ({"scale": -INF}, ValueError, "scale: expected a finite number"),
    ({"backend": "sdpa"}, ValueError, "backend: expected one of"),
    (
        {"q": Q.double(), "k": KV.double(), "v": KV.double()},
        ValueError,
        "'triton' cannot serve this call: q is float64",
    ),
    (
        {"q": torch.randn(3, 4, 2, 160), "k": torch.randn(2, 5, 2, 160), "v": torch.randn(2, 5, 2, 160)},
        ValueError,
        "'triton' cannot serve this call: q has head dim 160",
    ),
    (
        {"k": torch.randn(2, 5, 16, 2).mT},
        ValueError,
        "'triton' cannot serve this call: the last dimension of k is not contiguous",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), SELF_BAD)
def test_self_attention(change, error, words, launches):
    with pytest.raises(error) as caught:
        self_attention(**({"backend": "triton"} | SELF | change))
    assert words in str(caught.value)
    assert launches == []


@pytest.mark.parametrize(("change", "error", "words"), CROSS_BAD)
def test_cross_attention(change, error, words, launches):
    with pytest.raises(error) as caught:
        cross_attention(**({"backend": "triton"} | CROSS | change))
    assert words in str(caught.value)
    assert launches == []


@pytest.mark.parametrize("call", [partial(self_attention, **SELF), partial(cross_attention, **CROSS)])
def test_the_calls_that_the_tables_change_are_good(call, launches):
    call(backend="triton")
    assert launches
