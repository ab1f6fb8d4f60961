"""Backend `csrc` of self_attention, the compiled operator on a CPU: against the reference, and by itself."""

import random

import pytest
import torch
from compiled_cases import DTYPES, needs_extension, with_gradients
from test_self_attention import MODE_IDS, MODES, B, C, U, draw, masks_of_lengths, run
from tolerances import assert_yardstick, max_error

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops import self_attention
from blip2_kernels.ops.philox import draw_key
from blip2_kernels.ops.self_attention import compiled

pytestmark = needs_extension
NAMES = ("out", "dq", "dk", "dv")


def check(tensors, q_layout, kv_layout, mask, **options):
    """The compiled operator beside the reference in its dtype, both against the reference in fp64."""

    def attend(backend):
        return lambda *given: self_attention(*given, q_layout, kv_layout, mask, backend=backend, **options)

    got, plain = (with_gradients(attend(backend), tensors) for backend in ("csrc", "reference"))
    truth = with_gradients(attend("reference"), [t.double() for t in tensors], tensors[0].dtype)
    for name, *values in zip(NAMES, got, plain, truth, strict=True):
        assert values[0].dtype == tensors[0].dtype and values[0].is_contiguous()
        assert_yardstick(name, *values)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("modes", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_queries", "lengths"),
    [(32, [7, 0, 32, 1]), (1, [31, 33, 5, 0]), (5, [1, 1, 1, 1]), (0, [64, 3, 0, 9])],
)
def test_against_the_reference(modes, dtype, num_queries, lengths, dropout):
    torch.manual_seed(num_queries)
    counts = [lengths, lengths[::-1]][: len(modes)]
    for padded in (False, True):
        masks = masks_of_lengths(counts, 64)
        layout = TokenLayout.from_attention_masks(num_queries, masks, samples=4, padded=padded)
        if layout.rows:
            options = {"dropout": dropout, "dropout_key": draw_key(), "layer": 7}
            tensors = draw(layout.rows, 2, 24, dtype)
            check(tensors, layout, layout, AttentionMask(modes), **options)


def test_random_cases(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        modes = rng.choice(MODES)
        samples, num_queries = rng.randint(1, 5), rng.choice([0, 1, 2, 7, 32, 75])
        masks = [torch.rand(samples, rng.randint(0, 90)) < rng.random() for _ in modes]
        padded = rng.random() < 0.5
        layout = TokenLayout.from_attention_masks(num_queries, masks, samples=samples, padded=padded)
        some = all(mask.any(1).all() for mask in masks)  # a sample without text has no first row
        choice = [rng.choice(["all", "none", *(["first", "last"] if some else [])]) for _ in modes]
        kept, index = layout.select(queries=rng.random() < 0.7, texts=choice)
        q, k, v = draw(layout.rows, rng.randint(1, 3), rng.choice([1, 3, 16, 17, 64]), rng.choice(DTYPES))
        print(modes, samples, num_queries, padded, choice, list(q.shape), q.dtype)
        dropout = rng.choice([0.0, 0.4])
        options = {"dropout": dropout, "dropout_key": draw_key(), "scale": rng.choice([None, 0.3, -1.0])}
        check([q[index], k, v], kept, layout, AttentionMask(modes), **options)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_reaches_all_that_see_it(poison, which):
    """And no row that it does not reach in the reference, where a hidden value is multiplied by 0."""
    torch.manual_seed(0)
    layout, mask = TokenLayout.from_attention_masks(2, masks_of_lengths([[3, 4]], 4)), AttentionMask((C,))
    tensors = draw(layout.rows, dtype=torch.float32)
    tensors[which][5, 1] = poison
    got, expected = (
        self_attention(*tensors, layout, layout, mask, backend=backend) for backend in ("csrc", "reference")
    )
    finite = expected.isfinite()
    assert max_error(got[finite], expected[finite]) <= 1e-5
    if which < 2:
        assert torch.equal(got.isnan(), expected.isnan())
    else:  # row 5 is a text's second token, seen by itself and by the one behind it
        assert not got[5:7, 1].isfinite().any()


def test_strided_views_are_read_in_place_and_channels_made_adjacent():
    torch.manual_seed(0)
    layout = TokenLayout.from_attention_masks(2, masks_of_lengths([[3, 1]], 4))
    views = torch.randn(layout.rows + 1, 3, 2, 8)[1:].unbind(1)
    apart = [view.transpose(1, 2).contiguous().transpose(1, 2) for view in views]
    assert not views[0].is_contiguous() and apart[0].stride(-1) != 1
    results = [
        run(given, layout, AttentionMask((C,)), backend="csrc")
        for given in (views, apart, [view.contiguous() for view in views])
    ]
    for values in zip(*results, strict=True):
        assert all(torch.equal(value, values[0]) for value in values)


def test_every_number_of_threads_gives_the_same_bits():
    torch.manual_seed(0)
    layout = TokenLayout.from_attention_masks(32, masks_of_lengths([[20, 3, 14] * 4], 20))
    tensors, threads = draw(layout.rows, 12, 64, torch.float32), torch.get_num_threads()
    options = {"dropout": 0.1, "dropout_key": torch.tensor(5), "backend": "csrc"}
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(tensors, layout, AttentionMask((B,)), **options))
    finally:
        torch.set_num_threads(threads)
    for values in zip(*results, strict=True):
        assert all(torch.equal(value, values[0]) for value in values)


def arguments_of(layout, mask, dropout=0.0, dtype=torch.float32):
    table = compiled.TABLES.of(layout, layout, mask)
    drop = (dropout, draw_key(), layout.row_keys, layout.row_keys, 3)
    return [*draw(layout.rows, dtype=dtype), *table, 0.3, *drop]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_opcheck(dropout):
    layout = TokenLayout.from_attention_masks(3, masks_of_lengths([[2, 4], [1, 3]], 4))
    arguments = arguments_of(layout, AttentionMask((U, C)), dropout)
    leaves = [t.requires_grad_() for t in arguments[:3]]
    torch.library.opcheck(torch.ops.blip2_kernels.packed_attention.default, (*leaves, *arguments[3:]))
    inputs = [torch.randn_like(leaves[0]), *(t.detach() for t in leaves), *arguments[3:]]
    torch.library.opcheck(torch.ops.blip2_kernels.packed_attention_backward.default, tuple(inputs))


def test_a_gradient_of_the_gradient_raises():
    layout = TokenLayout.from_attention_masks(2, masks_of_lengths([[3, 1]], 4))
    leaves = [t.requires_grad_() for t in draw(layout.rows, dtype=torch.float32)]
    out = self_attention(*leaves, layout, layout, AttentionMask((B,)), backend="csrc")
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient of its gradient"):
        dq.sum().backward()


def test_a_compiled_graph_has_the_operator_and_its_numbers():
    layout = TokenLayout.from_attention_masks(2, masks_of_lengths([[3, 1]], 4))
    tensors = draw(layout.rows, dtype=torch.float32)

    def attend(q, k, v):
        return self_attention(q, k, v, layout, layout, AttentionMask((B,)), backend="csrc")

    whole = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for one, other in zip(with_gradients(whole, tensors), with_gradients(attend, tensors), strict=True):
        assert torch.equal(one, other)


def too_far(table, column):
    changed = table.clone()
    changed[0, 0, column] += 100
    return changed


LAYOUT = TokenLayout.from_attention_masks(3, masks_of_lengths([[2, 4]], 4))
BAD = [
    (0, lambda t: t.double(), "q: expected float32, float16 or bfloat16 [rows, heads, head_dim]"),
    (0, lambda t: t.new_zeros(12, 2, 257), "q: expected a width from 1 to 256"),
    (1, lambda t: t[:, :1], "k: expected float32 [12, 2, 8]"),
    (2, lambda t: t[:4], "v: expected float32 [12, 2, 8]"),
    (3, lambda t: t.long(), "spans: expected int32 [2, 2, 2]"),
    (3, lambda t: t[0], "spans: expected a contiguous int32 table of three dimensions"),
    (3, lambda t: too_far(t, 0), "spans: expected rows from 0 to 12, got 3 from 100 on"),
    (3, lambda t: too_far(t, 1) * -1, "spans: expected rows from 0 to 12"),
    (4, lambda t: t[:1].contiguous(), "parts: expected int32 [2, 2, 3]"),
    (4, lambda t: too_far(t, 1), "parts: expected rows from 0 to 12, got 103 from 0 on"),
    (4, lambda t: too_far(t, 2), "parts: expected rows from 0 to 5, got 0 from 100 on"),
    (5, lambda t: t + 1, "visible: expected rows from 0 to 5, got 6 from 0 on"),
    (5, lambda t: -t, "visible: expected rows from 0 to 5, got -5 from 0 on"),
    (5, lambda t: t[:4], "visible: expected int32 [12]"),
    (6, lambda pairs: -1, "pairs: expected a number of rows times keys, got -1"),
    (8, lambda p: 1.0, "dropout: expected a number in [0, 1)"),
    (9, lambda key: None, "dropout_key: expected int64 [] where dropout > 0, got None"),
    (10, lambda keys: keys[1:], "row_keys: expected int32 [12]"),
    (11, lambda keys: None, "kv_row_keys: expected int32 [rows] where dropout > 0, got None"),
    (11, lambda keys: keys[1:], "kv_row_keys: expected int32 [12]"),
]


@pytest.mark.parametrize(("place", "change", "words"), BAD)
def test_the_operator_refuses_what_does_not_fit(place, change, words):
    arguments = arguments_of(LAYOUT, AttentionMask((B,)), 0.2)
    assert arguments[0].shape == (12, 2, 8)
    torch.ops.blip2_kernels.packed_attention(*arguments)
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError) as caught:
        torch.ops.blip2_kernels.packed_attention(*arguments)
    assert words in str(caught.value)


def test_who_is_not_served_is_told_why():
    layout = TokenLayout.from_attention_masks(1000, [torch.ones(1, 25)])
    for tensors, words in (
        (draw(layout.rows, dtype=torch.float32), "samples of up to 1024 rows, got 1025"),
        (draw(12, head_dim=257, dtype=torch.float32), "heads of up to 256 channels, got 257"),
        (draw(12), "computes in fp32, fp16 and bf16, not in torch.float64"),
    ):
        its = layout if tensors[0].shape[0] == layout.rows else LAYOUT
        with pytest.raises(ValueError) as caught:
            self_attention(*tensors, its, its, AttentionMask((B,)), backend="csrc")
        assert words in str(caught.value)
        assert self_attention(*tensors, its, its, AttentionMask((B,))).isfinite().all()
