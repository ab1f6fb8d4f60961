"""self_attention: every backend against attention written out, and against the paper's masks."""

import random
import sys

import pytest
import torch
from compiled_cases import needs_extension
from naive_attention import keep_element, naive_self_attention
from tolerances import assert_yardstick, max_error

from blip2_kernels import extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import self_attention
from blip2_kernels.ops.philox import dropout_attention

BACKENDS = ["reference", "torch"]
WAYS = [
    *((backend, torch.float64) for backend in BACKENDS),
    pytest.param("csrc", torch.float32, marks=needs_extension),
]
"""Backends, each with the widest dtype that it serves."""
U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
MODES = [(), (U,), (B,), (C,), (U, C)]
MODE_IDS = ["queries", "unimodal", "bidirectional", "causal", "pair"]


def masks_of_lengths(lengths: list[list[int]], width: int) -> list[torch.Tensor]:
    return [(torch.arange(width) < torch.tensor(counts)[:, None]).int() for counts in lengths]


def draw(rows: int, heads: int = 2, head_dim: int = 8, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(rows, heads, head_dim, dtype=torch.float64).to(dtype) for _ in range(3)]


def run(tensors, layout, mask, **options):
    """Output and gradients of a random projection of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = self_attention(*leaves, layout, layout, mask, **options)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modes", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_queries", "lengths"),
    [(32, [7, 0, 32, 1]), (1, [31, 33, 5, 0]), (5, [1, 1, 1, 1]), (0, [64, 3, 0, 9])],
)
def test_against_the_definition(backend, modes, dtype, num_queries, lengths):
    torch.manual_seed(num_queries)
    counts = [lengths, lengths[::-1]][: len(modes)]
    layout = TokenLayout.from_attention_masks(num_queries, masks_of_lengths(counts, 64), samples=4)
    low = [t.to(dtype) for t in draw(layout.rows)]
    names = tuple(mode.name for mode in modes)

    def plain(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in low]
        out = naive_self_attention(*leaves, num_queries, counts, 4, names)
        weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]

    if layout.rows == 0:
        assert (
            self_attention(*low, layout, layout, AttentionMask(modes), backend=backend).shape == low[0].shape
        )
        return
    got = run(low, layout, AttentionMask(modes), backend=backend)
    for name, *values in zip(("out", "dq", "dk", "dv"), got, plain(dtype), plain(torch.float64), strict=True):
        assert values[0].dtype == dtype
        assert_yardstick(name, *values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_head_dims_and_scale(backend, head_dim):
    torch.manual_seed(0)
    layout = TokenLayout.from_attention_masks(4, masks_of_lengths([[3, 6]], 6))
    tensors = draw(layout.rows, 3, head_dim)
    got = run(tensors, layout, AttentionMask((B,)), backend=backend, scale=0.25)
    halved = [tensors[0] * 0.25 * head_dim**0.5, *tensors[1:]]
    truth = naive_self_attention(*halved, 4, [[3, 6]], 2, ("BIDIRECTIONAL",))
    assert max_error(got[0], truth) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modes", MODES[1:], ids=MODE_IDS[1:])
def test_padded_and_packed_agree_for_any_padding(backend, modes):
    torch.manual_seed(0)
    masks = [torch.rand(5, 9) < 0.5 for _ in modes]
    masks[0][2] = False
    packed = TokenLayout.from_attention_masks(3, masks)
    padded = TokenLayout.from_attention_masks(3, masks, padded=True)
    queries = torch.randn(5, 3, 48, dtype=torch.float64)
    texts = [torch.randn(5, 9, 48, dtype=torch.float64) for _ in modes]
    results = []
    for layout in (packed, padded):
        q, k, v = layout.pack(queries, texts).view(-1, 3, 2, 8).unbind(1)
        out = self_attention(q, k, v, layout, layout, AttentionMask(modes), backend=backend)
        unpacked = [layout.unpack_text(out, i) * mask[..., None, None] for i, mask in enumerate(masks)]
        results.append(torch.cat([layout.unpack_queries(out), *unpacked], 1))
    assert max_error(results[0], results[1]) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_of_one_projection_are_read_in_place(backend):
    torch.manual_seed(0)
    layout = TokenLayout.from_attention_masks(2, masks_of_lengths([[3, 1]], 4))
    fused = torch.randn(layout.rows + 1, 3, 2, 8, dtype=torch.float64)[1:]
    views = fused.unbind(1)
    assert not views[0].is_contiguous() and views[0].storage_offset()
    mask = AttentionMask((C,))
    got = run(views, layout, mask, backend=backend)
    again = run([view.contiguous() for view in views], layout, mask, backend=backend)
    for a, b in zip(got, again, strict=True):
        assert max_error(a, b) < 1e-14


def paper_table(num_queries, texts, modes):
    """Figure 2, spelled out: may row r (first index) attend to row c? texts: (real tokens, rows) of each."""
    rows = [(None, i, True) for i in range(num_queries)]
    rows += [(t, i, i < real) for t, (real, count) in enumerate(texts) for i in range(count)]

    def may(row, column):
        (text, place, _), (other, other_place, real) = row, column
        if text is None and other is None:
            return True
        if text is None:
            return real and modes[other] == B
        if other is None:
            return modes[text] != U
        return real and text == other and (modes[text] != C or other_place <= place)

    return torch.tensor([[may(row, column) for column in rows] for row in rows])


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "modes", [(U,), (B,), (C,), (U, C)], ids=lambda modes: "+".join(m.name for m in modes)
)
def test_no_leak_by_value_and_by_gradient(backend, dtype, modes, padded):
    """Row r reacts to row c exactly where the paper's table says so."""
    torch.manual_seed(0)
    texts = [torch.tensor([[1, 0, 1, 1, 0]]), torch.tensor([[0, 1, 1, 0, 0]])][: len(modes)]
    layout = TokenLayout.from_attention_masks(3, texts, padded=padded)
    mask = AttentionMask(modes)
    allowed = paper_table(3, [(int(text.sum()), 5 if padded else int(text.sum())) for text in texts], modes)
    assert torch.equal(mask.dense(layout)[0], allowed)
    tensors = [t.requires_grad_() for t in draw(layout.rows, dtype=dtype)]
    out = self_attention(*tensors, layout, layout, mask, backend=backend)
    for row in range(layout.rows):
        _, dk, dv = torch.autograd.grad(out[row].sum(), tensors, retain_graph=True)
        assert torch.equal(dv.abs().sum((1, 2)) > 0, allowed[row])
        assert (dk[~allowed[row]] == 0).all()
    for column in range(layout.rows):
        q, k, v = (t.detach().clone() for t in tensors)
        k[column] += 1
        v[column] += 1
        moved = (self_attention(q, k, v, layout, layout, mask, backend=backend) != out).any(2).any(1)
        assert torch.equal(moved, allowed[:, column])


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MaskMode)
def test_poison_in_padding_changes_no_bit(backend, dtype, poison, mode):
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    layout = TokenLayout.from_attention_masks(2, [mask], padded=True)
    dense = layout.dense()
    padding = ~dense.collect(dense.real)
    tensors = draw(layout.rows, dtype=dtype)
    clean = run(tensors, layout, AttentionMask((mode,)), backend=backend)
    tensors[1][padding], tensors[2][padding] = poison, poison
    dirty = run(tensors, layout, AttentionMask((mode,)), backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_op_changes_nothing(backend, dtype):
    torch.manual_seed(0)
    layout = TokenLayout.from_attention_masks(2, masks_of_lengths([[3, 1]], 4))
    tensors = draw(layout.rows, dtype=dtype)
    results = []
    for enabled in (False, True):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = self_attention(*leaves, layout, layout, AttentionMask((C,)), backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_give_zero_and_no_gradient(backend):
    torch.manual_seed(0)
    layout = TokenLayout.from_attention_masks(0, [torch.tensor([[0, 0, 0], [1, 1, 0]])], padded=True)
    out, dq, dk, dv = run(draw(layout.rows), layout, AttentionMask((U,)), backend=backend)
    for t in (out, dq, dk, dv):
        assert torch.isfinite(t).all() and (t[:3] == 0).all()
    assert (out[3:] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modes", MODES[1:], ids=MODE_IDS[1:])
@pytest.mark.parametrize("choice", ["first", "last", "none"])
def test_a_subset_of_rows_gives_its_rows_of_the_whole(backend, modes, choice):
    torch.manual_seed(0)
    counts = [[3, 1, 5], [2, 4, 1]][: len(modes)]
    layout = TokenLayout.from_attention_masks(4, masks_of_lengths(counts, 6))
    mask = AttentionMask(modes)
    q, k, v = draw(layout.rows)
    whole = self_attention(q, k, v, layout, layout, mask, backend=backend)
    for queries in (True, False):
        part, index = layout.select(queries=queries, texts=[choice] * len(modes))
        got = self_attention(q[index], k, v, part, layout, mask, backend=backend)
        assert max_error(got, whole[index]) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_permuted_batch_gives_a_permuted_result(backend):
    torch.manual_seed(0)
    mask = torch.rand(6, 7) < 0.6
    queries, text = torch.randn(6, 3, 24, dtype=torch.float64), torch.randn(6, 7, 24, dtype=torch.float64)

    def encode(order):
        layout = TokenLayout.from_attention_masks(3, [mask[order]])
        q, k, v = layout.pack(queries[order], [text[order]]).view(-1, 3, 1, 8).unbind(1)
        out = self_attention(q, k, v, layout, layout, AttentionMask((C,)), backend=backend)
        return layout.unpack_queries(out), layout.unpack_text(out)

    order = torch.randperm(6)
    for a, b in zip(encode(torch.arange(6)), encode(order), strict=True):
        assert max_error(a[order], b) < 1e-14


def test_dropout_is_the_contract_whatever_the_packing():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    key = torch.tensor(77)
    packed = TokenLayout.from_attention_masks(3, [mask])
    queries, text = torch.randn(2, 3, 48, dtype=torch.float64), torch.randn(2, 4, 48, dtype=torch.float64)
    options = {"dropout": 0.4, "dropout_key": key, "layer": 2}

    def encode(layout):
        q, k, v = layout.pack(queries, [text]).view(-1, 3, 2, 8).unbind(1)
        return q, k, v, self_attention(q, k, v, layout, layout, AttentionMask((B,)), **options)

    q, k, v, out = encode(packed)
    padded = TokenLayout.from_attention_masks(3, [mask], padded=True)
    wide = encode(padded)[3]
    assert torch.equal(padded.unpack_queries(wide), packed.unpack_queries(out))

    rows = [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9]]
    for sample in rows:
        for row in sample:
            probs = (torch.einsum("hd,khd->hk", q[row], k[sample]) * 8**-0.5).softmax(-1)
            for h in range(2):
                for i, other in enumerate(sample):
                    names = (int(packed.row_keys[row]), int(packed.row_keys[other]))
                    kept = keep_element(77, *names, h, 2, 0, 0.4)
                    probs[h, i] *= kept / (1 - round(0.4 * 65536) / 65536)
            assert max_error(out[row], torch.einsum("hk,khd->hd", probs, v[sample])) < 1e-13


@pytest.mark.parametrize("modes", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_of_the_reference(modes, dropout):
    torch.manual_seed(0)
    counts = [[2, 0], [1, 2]][: len(modes)]
    layout = TokenLayout.from_attention_masks(2, masks_of_lengths(counts, 3), samples=2)
    leaves = [t.requires_grad_() for t in draw(layout.rows, 1, 3)]
    options = {"dropout": dropout, "dropout_key": torch.tensor(4), "backend": "reference"}

    def attend(q, k, v):
        return self_attention(q, k, v, layout, layout, AttentionMask(modes), **options)

    assert torch.autograd.gradcheck(attend, leaves)


def test_random_cases_agree_between_backends():
    seed = random.randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        modes = rng.choice(MODES)
        samples, num_queries = rng.randint(1, 5), rng.choice([0, 1, 2, 7, 32])
        masks = [torch.rand(samples, rng.randint(0, 40)) < rng.random() for _ in modes]
        padded = rng.random() < 0.5
        layout = TokenLayout.from_attention_masks(num_queries, masks, samples=samples, padded=padded)
        tensors = draw(layout.rows, rng.randint(1, 3), rng.randint(1, 20))
        results = [run(tensors, layout, AttentionMask(modes), backend=backend) for backend in BACKENDS]
        for a, b in zip(*results, strict=True):
            assert max_error(a, b) < 1e-12, (seed, modes, layout)


LAYOUT = TokenLayout.from_attention_masks(2, [torch.ones(2, 3)])
OTHER = TokenLayout.from_attention_masks(2, [torch.ones(3, 3)])
LATER = TokenLayout.from_attention_masks(2, [torch.ones(2, 3)], first_sample=9)
SHORTER = TokenLayout.from_attention_masks(2, [torch.tensor([[1, 1, 0], [1, 0, 0]])])
BARE = TokenLayout.from_attention_masks(2, samples=5)
X = torch.randn(10, 2, 4)
BAD = [
    ({"q": X.tolist()}, TypeError, "q: expected a tensor"),
    (
        {"q": X[0]},
        ValueError,
        "q: expected float16 or bfloat16 or float32 or float64 [rows, heads, head_dim]",
    ),
    ({"q": X.int()}, TypeError, "q: expected float16 or"),
    ({"q": X.double()}, TypeError, "k: expected float64 [rows, 2, 4], got float32 [10, 2, 4]"),
    ({"k": X.half()}, TypeError, "k: expected float32 [rows, 2, 4], got float16"),
    ({"k": X[:, :1]}, ValueError, "k: expected float32 [rows, 2, 4], got float32 [10, 1, 4]"),
    ({"v": X[..., :3]}, ValueError, "v: expected float32 [rows, 2, 4], got float32 [10, 2, 3]"),
    ({"v": X[:9]}, ValueError, "v: expected [10, 2, 4], got float32 [9, 2, 4]"),
    ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, ValueError, "q: expected at least one head"),
    ({"q": X.to("meta")}, ValueError, "k: expected a tensor on meta, got one on cpu"),
    ({"q": X[:9]}, ValueError, "q: expected 10 rows, as q_layout has, got 9"),
    ({"k": X[:9], "v": X[:9]}, ValueError, "k: expected 10 rows, as kv_layout has, got 9"),
    ({"q_layout": None}, TypeError, "q_layout: expected a TokenLayout, got NoneType"),
    ({"q_layout": OTHER, "q": torch.randn(15, 2, 4)}, ValueError, "kv_layout: expected 3 samples"),
    ({"q_layout": BARE}, ValueError, "q_layout: expected 1 text segments, one a mode, got 0"),
    (
        {"q_layout": LATER},
        ValueError,
        "q_layout: expected rows of kv_layout (by their row keys), got another",
    ),
    (
        {"kv_layout": SHORTER, "k": X[:7], "v": X[:7]},
        ValueError,
        "q_layout: expected rows of kv_layout (by their row keys), got another in row 6",
    ),
    ({"mask": MaskMode.UNIMODAL}, TypeError, "mask: expected an AttentionMask"),
    ({"mask": AttentionMask()}, ValueError, "q_layout: expected 0 text segments"),
    ({"dropout": 1.0}, ValueError, "dropout: expected a number in [0, 1), got 1.0"),
    ({"dropout": 0.1}, ValueError, "dropout_key: expected an int64 [] tensor"),
    ({"dropout": 0.1, "dropout_key": torch.zeros(())}, TypeError, "dropout_key: expected int64 []"),
    (
        {"dropout": 0.1, "dropout_key": torch.tensor(1), "backend": "torch"},
        ValueError,
        "cannot serve this call: sc",
    ),
    ({"layer": -1}, ValueError, "layer: expected an int"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number or None, got nan"),
    ({"scale": "1"}, TypeError, "scale: expected a finite number"),
    (
        {"backend": "cuda"},
        ValueError,
        "backend: expected one of 'auto', 'triton', 'csrc', 'torch', 'reference', got str 'cuda'",
    ),
    ({"backend": None}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    good = {"q": X, "k": X, "v": X, "q_layout": LAYOUT, "kv_layout": LAYOUT, "mask": AttentionMask((B,))}
    with pytest.raises(error) as caught:
        self_attention(**(good | change))
    assert words in str(caught.value)


def test_more_queries_than_the_key_side_is_refused():
    q_layout = TokenLayout.from_attention_masks(4, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="q_layout: expected 0 or 2 queries a sample"):
        self_attention(torch.randn(14, 2, 4), X, X, q_layout, LAYOUT, AttentionMask((B,)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_takes_the_documented_backend(dtype, dropout, monkeypatch):
    taken = []
    api = sys.modules["blip2_kernels.ops.self_attention.api"]
    compiled, sdpa, reference = names = [f"self_attention_{way}" for way in ("compiled", "sdpa", "reference")]
    for owner, name in zip((api.compiled, api.sdpa, api), names, strict=True):
        monkeypatch.setattr(owner, name, lambda *a, _name=name, **k: taken.append(_name))
    key, x = torch.tensor(1), X.to(dtype)
    self_attention(x, x, x, LAYOUT, LAYOUT, AttentionMask((B,)), dropout=dropout, dropout_key=key)
    plain = reference if dropout else sdpa
    has_extension = dtype == torch.float32 and extension.reason() is None
    assert taken == [compiled if has_extension else plain]


def test_dropout_of_probabilities_refuses_names_that_do_not_fit():
    names = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"query_keys: expected int32 \[2, 4\]"):
        dropout_attention(torch.ones(2, 1, 4, 3), 0.1, torch.tensor(1), names, names, layer=0, site=0)
