"""embed_tokens: the compiled operator against the plain sequence, and both against the truth in fp64."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from compiled_cases import DTYPES, ON_CPU, ROWS, WIDTHS, compare, needs_extension, strided, with_gradients
from tolerances import max_error

from blip2_kernels import extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.ops import embed_tokens
from blip2_kernels.ops.philox import LANES, Site, draw_key, hidden_keep_mask, keep_scale

NAMES = ("out", "dqueries", "dwords", "dpositions", "dweight", "dbias")
BACKENDS = ["reference", pytest.param("csrc", marks=needs_extension)]
VOCABULARY, PLACES = 11, 9
SHAPES = {0: (0, 2, 3), 1: (1, 0, 1), 3: (1, 2, 1), 1000: (25, 32, 8)}
"""Samples, queries and tokens of so many rows."""


def layout_of(samples, queries, *masks, **options):
    return TokenLayout.from_attention_masks(queries, masks, samples=samples, **options)


def draw(samples, queries, width, dtype=torch.float32, *, own=False):
    """Queries (each sample's own, or the same for all), words, positions, weight and bias."""
    shapes = (
        (samples if own else 1, queries, width),
        (VOCABULARY, width),
        (PLACES, width),
        (width,),
        (width,),
    )
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return tensors if queries else [None, *tensors[1:]]


def draw_ids(layout):
    return [torch.randint(0, VOCABULARY, (layout.samples, text.width)) for text in layout.texts]


def function(layout, ids, backend="csrc", dropout=0.0, **options):
    """embed_tokens as a function of its five tensors, with dropout drawn once."""
    key = draw_key().to(layout.device)

    def call(queries, words, positions, weight, bias, backend=backend):
        given = {"eps": 1e-5, "dropout": dropout, "dropout_key": key, "backend": backend} | options
        return embed_tokens(queries, ids, words, positions, weight, bias, layout, **given)

    return call


def plain_of(call):
    return lambda *tensors: call(*tensors, backend="reference")


def names_of(tensors):
    return ["out", *(name for name, t in zip(NAMES[1:], tensors, strict=True) if t is not None)]


def check(layout, ids, tensors, **options):
    call = function(layout, ids, **options)
    compare(names_of(tensors), call, plain_of(call), tensors)


@needs_extension
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_width_and_row_count(dtype, width, rows, dropout):
    samples, queries, tokens = SHAPES[rows]
    layout = layout_of(samples, queries, torch.ones(samples, tokens, dtype=torch.bool))
    assert layout.rows == rows
    tensors = draw(samples, queries, width, dtype)
    check(layout, draw_ids(layout), tensors, dropout=dropout, layer=5, site=Site.CROSS_OUTPUT)


@needs_extension
def test_random_cases(seed):
    rng = random.Random(seed)
    for _ in range(60):
        samples, queries, width = rng.randint(1, 9), rng.randint(0, 5), rng.randint(1, 300)
        segments, padded, own = rng.randint(not queries, 2), rng.random() < 0.5, rng.random() < 0.5
        masks = [torch.rand(samples, rng.randint(1, PLACES)) < rng.random() for _ in range(segments)]
        case = (samples, queries, width, [m.shape[1] for m in masks], padded, own)
        options = {"dropout": rng.choice([0.0, 0.01, 0.5, 0.9]), "padding_idx": rng.choice([None, 0, 3])}
        options["eps"] = rng.choice([1e-12, 1e-5, 0.1])
        dtype = rng.choice(DTYPES)
        print(case, options, dtype)
        layout = layout_of(samples, queries, *masks, padded=padded)
        tensors = draw(samples, queries, width, dtype, own=own)
        if not segments:
            tensors[1:3] = [None, None]
        ids = draw_ids(layout)
        if segments and rng.random() < 0.5:
            options["position_ids"] = [torch.randint(0, PLACES, (1, m.shape[1])).int() for m in masks]
        check(layout, ids, tensors, **{k: v for k, v in options.items() if segments or k != "padding_idx"})


def by_hand(layout, ids, queries, words, positions, weight, bias):
    """The rows one by one, from the padded batch."""
    rows = [q for sample in queries.expand(layout.samples, -1, -1) for q in sample]
    for segment, tokens in zip(layout.texts, ids, strict=True):
        for place in segment.source.tolist():
            sample, column = divmod(place, segment.width)
            rows.append(words[tokens[sample, column]] + positions[column])
    return F.layer_norm(torch.stack(rows), weight.shape, weight, bias, 1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_lie_where_the_layout_has_them(backend, padded):
    """With left, right and scattered padding, and two texts of different widths."""
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]]), torch.tensor([[1, 1], [0, 1], [1, 0]])
    layout = layout_of(3, 2, *masks, padded=padded)
    tensors, ids = draw(3, 2, 16), draw_ids(layout)
    got, expected = function(layout, ids, backend)(*tensors), by_hand(layout, ids, *tensors)
    assert got.shape == (layout.rows, 16) and max_error(got, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 8, 33, 768])
def test_the_dropout_mask_is_the_contract(backend, width):
    layout = layout_of(4, 3, torch.ones(4, 5))
    tensors, ids, p, key = draw(4, 3, width), draw_ids(layout), 0.3, draw_key()
    tensors[4] += 1000.0  # so large that a single wrong decision would show
    leaves = [t.requires_grad_() for t in tensors]
    options = {"layer": 3, "site": Site.FEED_FORWARD}
    out = function(layout, ids, backend, p, dropout_key=key, **options)(*leaves)
    keep = hidden_keep_mask(key, layout.row_keys, width, p, **options)
    calm = function(layout, ids, "reference")(*tensors)
    assert max_error(out.detach(), torch.where(keep, calm * keep_scale(p), 0).detach()) < 1e-2
    (dbias,) = torch.autograd.grad(out.sum(), leaves[4])
    assert max_error(dbias, keep.sum(0) * keep_scale(p)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_one_sample_only(backend):
    layout = layout_of(4, 3, torch.ones(4, 5))
    tensors, ids = draw(4, 3, 24), draw_ids(layout)
    whole = with_gradients(function(layout, ids, backend), tensors)[0]
    shared = with_gradients(function(layout, ids, backend, expand_queries=False), tensors)
    assert torch.equal(shared[0], torch.cat([whole[:3], whole[layout.query_rows :]]))
    truth = with_gradients(function(layout, ids, "reference", expand_queries=False), tensors)
    for name, a, b in zip(NAMES, shared, truth, strict=True):
        assert max_error(a, b) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_that_was_embedded_elsewhere(backend):
    layout = layout_of(4, 3, torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]))
    queries, words, positions, weight, bias = draw(4, 3, 24)
    (ids,) = draw_ids(layout)
    text = (words[ids] + positions[:3]).flatten(0, 1)[layout.texts[0].source]
    expected = function(layout, [ids], "reference")(queries, words, positions, weight, bias)
    call = function(layout, None, backend)
    results = with_gradients(call, [queries, text, None, weight, bias])
    assert max_error(results[0], expected) < 1e-5
    truth = with_gradients(plain_of(call), [queries, text, None, weight, bias])
    for a, b in zip(results, truth, strict=True):
        assert max_error(a, b) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padding_word_gets_no_gradient_and_another_word_only_its_own_rows(backend):
    layout = layout_of(3, 0, torch.ones(3, 4))
    ids = [torch.tensor([[5, 2, 5, 0], [5, 0, 0, 2], [0, 5, 2, 7]])]
    _, dwords, *_ = with_gradients(function(layout, ids, backend, padding_idx=0), draw(3, 0, 8))
    assert dwords.any(1).nonzero().flatten().tolist() == [2, 5, 7]


@needs_extension
@pytest.mark.parametrize("width", [7, 33, 768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart_and_unaligned(dtype, width):
    layout = layout_of(3, 2, torch.ones(3, 4))
    call, tensors = function(layout, draw_ids(layout), dropout=0.2), draw(3, 2, width, dtype)
    direct = with_gradients(call, tensors)
    apart = [strided(tensors[0][0])[None], *map(strided, tensors[1:3]), *tensors[3:]]
    across = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors[:3]]
    across += [torch.stack([t, t], 1)[:, 0] for t in tensors[3:]]
    for other in (apart, across):
        assert not other[0].is_contiguous() or width == 1
        for name, a, b in zip(NAMES, direct, with_gradients(call, other), strict=True):
            assert torch.equal(a, b), name


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads(dtype):
    layout = layout_of(50, 32, torch.rand(50, PLACES) < 0.7)
    call, tensors = function(layout, draw_ids(layout), dropout=0.1), draw(50, 32, 384, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(call, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


@needs_extension
def test_a_constant_row_and_nan():
    layout = layout_of(2, 3, torch.ones(2, 2))
    tensors, ids = draw(2, 3, 33), draw_ids(layout)
    tensors[0][0, 1] = 3.0
    clean = function(layout, ids)(*tensors)
    assert torch.equal(clean[1], tensors[4]) and torch.equal(clean[4], tensors[4])
    tensors[0][0, 2, 7] = float("nan")
    out = function(layout, ids)(*tensors)
    assert out[[2, 5]].isnan().all() and torch.equal(out[[0, 1, 3, 4, 6]], clean[[0, 1, 3, 4, 6]])


@needs_extension
def test_what_needs_no_gradient_gets_none():
    layout = layout_of(2, 3, torch.ones(2, 2))
    queries, words, positions, weight, bias = draw(2, 3, 8)
    call = function(layout, draw_ids(layout))
    call(queries.requires_grad_(), words, positions, weight, bias).sum().backward()
    assert words.grad is None and weight.grad is None and queries.grad is not None
    call(queries.detach(), words.requires_grad_(), positions, weight, bias).sum().backward()
    assert positions.grad is None and words.grad.shape == words.shape
    assert not call(queries.detach(), words.detach(), positions, weight, bias).requires_grad


def flat_inputs(dtype=torch.float32, *, embedded=False):
    """Inputs of the registered operators: two samples of three queries, and four text rows."""
    queries, words, positions, weight, bias = draw(2, 3, 12, dtype)
    ids, places = torch.tensor([1, 5, 1, 3]), torch.tensor([0, 1, 0, 1])
    if embedded:
        return [queries[0], words[:4], None, None, None, 6], weight, bias
    return [queries[0], words, positions, ids, places, 6], weight, bias


@needs_extension
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, embedded, dropout):
    inputs, weight, bias = flat_inputs(dtype, embedded=embedded)
    drop = (dropout, draw_key(), torch.arange(10, dtype=torch.int32), 9) if dropout else (0.0, None, None, 9)
    ops = torch.ops.blip2_kernels
    leaves = [
        t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs[:5]
    ]
    norm = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    torch.library.opcheck(ops.embed_tokens.default, (*leaves, 6, 1, *norm, 1e-5, *drop))
    errors = torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(
        ops.embed_tokens_forward.default,
        (*inputs, weight, bias, 1e-5, *drop, errors),
        test_utils=("test_schema", "test_autograd_registration"),
    )
    orders = (None, None) if embedded else (torch.tensor([0, 2, 3, 1]), torch.tensor([0, 2, 1, 3]))
    rest = (*inputs, *orders, 1, weight, torch.randn(10), torch.rand(10), *drop)
    torch.library.opcheck(ops.embed_tokens_backward.default, (torch.randn(10, 12).to(dtype), *rest))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_under_compile(dtype, backend):
    layout = layout_of(3, 2, torch.ones(3, 4), torch.ones(3, 4))
    # Dynamo cannot trace how the reference draws a mask: the operator's dropout is traced whole.
    dropout = 0.2 if extension.reason() is None and backend != "reference" else 0.0
    call, tensors = function(layout, draw_ids(layout), backend, dropout), draw(3, 2, 24, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(
        NAMES, with_gradients(compiled, tensors), with_gradients(call, tensors), strict=True
    ):
        assert max_error(a, b) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_op_changes_nothing(backend):
    layout = layout_of(3, 2, torch.ones(3, 4))
    call, tensors = function(layout, draw_ids(layout), backend), draw(3, 2, 24)
    outside = call(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(*tensors)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@needs_extension
def test_a_far_row_of_a_table_is_addressed_in_64_bits():
    """Rows 2^30 elements apart: untouched pages of the storage take no memory."""
    words = torch.empty(3 << 30, dtype=torch.bfloat16).as_strided((3, 16), (1 << 30, 1))
    words.copy_(torch.randn(3, 16))
    layout = layout_of(1, 0, torch.ones(1, 3))
    rest = (None, torch.ones(16).bfloat16(), torch.zeros(16).bfloat16(), layout)
    ids = [torch.tensor([[2, 0, 1]])]
    far, near = (embed_tokens(None, ids, t, *rest, backend="csrc") for t in (words, words.contiguous()))
    assert torch.equal(far, near)


LAYOUT = layout_of(2, 3, torch.ones(2, 4))
GOOD = dict(zip(("queries", "words", "positions", "weight", "bias"), draw(2, 3, 8), strict=True))
GOOD |= {"input_ids": [torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])], "layout": LAYOUT}
BAD = [
    (
        {"queries": torch.randn(2, 4, 8)},
        ValueError,
        "queries: expected float32 [S or 1, 3, 8], got float32 [2, 4, 8]",
    ),
    (
        {"queries": torch.randn(3, 3, 8)},
        ValueError,
        "queries: expected [2 or 1, 3, 8], got float32 [3, 3, 8]",
    ),
    ({"queries": None}, ValueError, "queries: expected a tensor [2 or 1, 3, 8] for 3 queries, got NoneType"),
    ({"queries": torch.randn(1, 3, 8).half()}, TypeError, "queries: expected float32"),
    ({"words": torch.randn(9, 7)}, ValueError, "words: expected float32 [vocabulary, 8], got float32 [9, 7]"),
    ({"words": None}, TypeError, "words: expected a tensor"),
    ({"positions": torch.randn(9, 8).double()}, TypeError, "positions: expected float32 [places, 8]"),
    (
        {"positions": torch.randn(3, 8)},
        ValueError,
        "input_ids[0]: expected at most 3 tokens, as there are positions",
    ),
    ({"weight": torch.randn(8).long()}, TypeError, "weight: expected"),
    ({"weight": torch.randn(0)}, ValueError, "weight: expected at least one channel"),
    ({"bias": torch.randn(9)}, ValueError, "bias: expected float32 [8], got float32 [9]"),
    ({"layout": "here"}, TypeError, "layout: expected a TokenLayout, got str 'here'"),
    (
        {"input_ids": GOOD["input_ids"][0]},
        TypeError,
        "input_ids: expected a sequence, one entry a text segment, got int64 [2, 4]",
    ),
    (
        {"input_ids": 5},
        TypeError,
        "input_ids: expected a sequence, one entry a text segment, got int 5",
    ),
    ({"input_ids": []}, ValueError, "input_ids: expected 1, one a text segment, got 0"),
    (
        {"input_ids": [torch.ones(2, 4)]},
        TypeError,
        "input_ids[0]: expected int64 or int32 [2, 4], got float32",
    ),
    ({"input_ids": [torch.ones(2, 5).long()]}, ValueError, "input_ids[0]: expected"),
    ({"input_ids": [torch.full((2, 4), 11)]}, ValueError, "input_ids[0]: expected values in [0, 11), got 11"),
    ({"input_ids": [torch.full((2, 4), -1)]}, ValueError, "input_ids[0]: expected values in [0, 11), got -1"),
    ({"input_ids": None}, ValueError, "words: expected float32 [8, 8], got float32 [11, 8]"),
    (
        {"position_ids": [torch.full((1, 4), 9)]},
        ValueError,
        "position_ids[0]: expected values in [0, 9), got 9",
    ),
    (
        {"position_ids": [torch.zeros(3, 4).long()]},
        ValueError,
        "position_ids[0]: expected [2 or 1, 4], got [3, 4]",
    ),
    (
        {"positions": None, "position_ids": [None]},
        ValueError,
        "positions: expected a table beside position_ids",
    ),
    ({"expand_queries": 1}, TypeError, "expand_queries: expected a bool, got int 1"),
    ({"padding_idx": 11}, ValueError, "padding_idx: expected an int in [0, 10], got 11"),
    ({"validate": "x"}, TypeError, "validate: expected a bool, got str 'x'"),
    ({"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
    ({"eps": math.nan}, ValueError, "eps: expected"),
    ({"dropout": 1.0}, ValueError, "dropout: expected a number in [0, 1), got 1.0"),
    ({"dropout": 0.5}, TypeError, "dropout_key: expected a tensor int64 [], got NoneType"),
    (
        {"dropout": 0.5, "dropout_key": draw_key(), "expand_queries": False},
        ValueError,
        "dropout: expected 0 where expand_queries is False, got 0.5",
    ),
    ({"site": 3}, TypeError, "site: expected a Site, got int 3"),
    ({"layer": -1}, ValueError, "layer: expected an int in"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'csrc', 'reference', got str 'cuda'"),
    (
        {"weight": torch.randn(8, device="meta")},
        ValueError,
        "weight: expected a tensor on cpu, got one on meta",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_refusals(changes, error, message):
    given = GOOD | changes
    if changes.get("expand_queries") is False:
        given["queries"] = given["queries"][:1]
    with pytest.raises(error) as caught:
        embed_tokens(**given)
    assert message in str(caught.value)


def test_what_a_layout_without_text_refuses():
    layout, weight = layout_of(2, 3), torch.ones(8)
    with pytest.raises(ValueError, match="words: expected None in a layout without text, got float32"):
        embed_tokens(GOOD["queries"], None, GOOD["words"], None, weight, weight, layout)
    with pytest.raises(ValueError, match="queries: expected None for 0 queries"):
        embed_tokens(GOOD["queries"], None, None, None, weight, weight, layout_of(2, 0))


META = object()
NAMED = (
    *enumerate(("queries", "words", "positions", "token_ids", "position_ids")),
    *((7, "bias"), (10, "dropout_key"), (11, "row_keys"), (13, "errors")),
)


@needs_extension
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(3, 5), "queries: expected float32 [3, 12], got float32 [3, 5]"),
        (0, torch.randn(3), "queries: expected float32 [rows, 12], got float32 [3]"),
        (0, torch.randn(4, 12), "query_rows: expected a multiple of the 4 rows of queries, got 6"),
        (0, None, "query_rows: expected a multiple of the 0 rows of queries, got 6"),
        (1, torch.randn(9, 12).half(), "words: expected float32 [9, 12], got float16 [9, 12]"),
        (1, torch.randn(0, 12), "token_ids: expected int64 [0] where the table has no rows, got int64 [4]"),
        (1, None, "words: expected a table beside token_ids, got None"),
        (2, torch.randn(9, 13), "positions: expected float32 [9, 12], got float32 [9, 13]"),
        (2, None, "positions: expected a table beside position_ids, got None"),
        (3, torch.ones(4, dtype=torch.int32), "token_ids: expected int64 [4], got int32 [4]"),
        (3, torch.ones(2, 2).long(), "token_ids: expected int64 [text rows], got int64 [2, 2]"),
        (3, torch.tensor([0, 1, 11, 2]), "token_ids: expected values in [0, 11), got 11"),
        (3, torch.tensor([0, 1, -1, 2]), "token_ids: expected values in [0, 11), got -1"),
        (
            3,
            torch.zeros(1).long().expand((1 << 31) - 13),
            "token_ids: expected at most 2^31 - 8 rows with those of the",
        ),
        (4, torch.zeros(3).long(), "position_ids: expected int64 [4], got int64 [3]"),
        (4, torch.tensor([0, 1, 9, 2]), "position_ids: expected values in [0, 9), got 9"),
        (4, None, "position_ids: expected int64 [text rows] beside positions, got None"),
        (5, -3, "query_rows: expected a multiple of the 3 rows of queries, got -3"),
        (
            5,
            3 << 31,
            "token_ids: expected at most 2^31 - 8 rows with those of the queries, got 6442450944 and",
        ),
        (6, torch.ones(12, 1), "weight: expected float32, float16 or bfloat16 [width], got float32 [12, 1]"),
        (
            6,
            torch.ones(12).double(),
            "weight: expected float32, float16 or bfloat16 [width], got float64 [12]",
        ),
        (6, torch.ones(4097), "weight: expected a width from 1 to 4096, got float32 [4097]"),
        (7, torch.ones(12).half(), "bias: expected float32 [12], got float16 [12]"),
        (8, -1.0, "eps: expected a finite number >= 0, got -1"),
        (8, math.nan, "eps: expected"),
        (9, 1.0, "dropout: expected a number in [0, 1), got 1"),
        (9, -0.1, "dropout: expected"),
        (9, 0.5, "dropout_key: expected int64 [] where dropout > 0, got None"),
        (10, torch.zeros(2).long(), "dropout_key: expected int64 [], got int64 [2]"),
        (11, torch.zeros(9, dtype=torch.int32), "row_keys: expected int32 [10], got int32 [9]"),
        (12, -1, "place: expected an int in [0, 2^32), got -1"),
        (13, torch.zeros(1), "errors: expected int32 [1], got float32 [1]"),
        *[(place, META, f"{name}: expected a tensor on the device of the others") for place, name in NAMED],
    ],
)
def test_the_operator_itself_refuses(place, value, message):
    """Before any launch, for callers who go around the Python function."""
    inputs, weight, bias = flat_inputs()
    drop = (0.5, draw_key(), torch.zeros(10, dtype=torch.int32)) if place in (10, 11) else (0.0, None, None)
    arguments = [*inputs, weight, bias, 1e-5, *drop, LANES, torch.zeros(1, dtype=torch.int32)]
    arguments[place] = arguments[place].to("meta") if value is META else value
    with pytest.raises(RuntimeError) as caught:
        torch.ops.blip2_kernels.embed_tokens_forward.default.redispatch(ON_CPU, *arguments)
    assert message in str(caught.value)


@needs_extension
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(9, 12), "grad: expected float32 [10, 12], got float32 [9, 12]"),
        (7, torch.arange(3), "token_order: expected int64 [4], got int64 [3]"),
        (7, torch.tensor([0, 1, 2, 4]), "token_order: expected values in [0, 4), got 4"),
        (8, torch.tensor([0, -1, 2, 3]), "position_order: expected values in [0, 4), got -1"),
        (8, META, "position_order: expected a tensor on the device of the others"),
        (11, torch.zeros(9), "mean: expected float32 [10], got float32 [9]"),
        (12, META, "rstd: expected a tensor on the device of the others"),
        (13, 1.0, "dropout: expected a number in [0, 1), got 1"),
    ],
)
def test_the_backward_refuses(place, value, message):
    inputs, weight, _ = flat_inputs()
    orders = (torch.tensor([0, 2, 3, 1]), torch.tensor([0, 2, 1, 3]))
    arguments = [torch.randn(10, 12), *inputs, *orders, -1, weight, torch.zeros(10), torch.ones(10)]
    arguments += [0.0, None, None, 0]
    arguments[place] = arguments[place].to("meta") if value is META else value
    with pytest.raises(RuntimeError) as caught:
        torch.ops.blip2_kernels.embed_tokens_backward.default.redispatch(ON_CPU, *arguments)
    assert message in str(caught.value)


def test_a_backend_that_cannot_serve_says_why():
    layout, ids = LAYOUT, GOOD["input_ids"]
    with pytest.raises(ValueError, match=r"'csrc' cannot serve this call: .*float64"):
        function(layout, ids)(*(t.double() for t in draw(2, 3, 8)))
    wide = draw(2, 3, 5000)
    with pytest.raises(ValueError, match=r"'csrc' cannot serve this call: .*up to 4096 channels, got 5000"):
        function(layout, ids)(*wide)
    assert max_error(*(function(layout, ids, b)(*wide) for b in ("auto", "reference"))) == 0
