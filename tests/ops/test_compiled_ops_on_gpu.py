"""The CUDA kernels of the compiled extension against the plain sequence and the truth in fp64."""

import pytest
import torch
from compiled_cases import PAIRS, ROWS, compare, strided, with_gradients
from on_gpu import captured, no_synchronisation, on_a_busy_stream
from test_add_layer_norm import NAMES as NORM_NAMES
from test_add_layer_norm import draw as draw_norm
from test_add_layer_norm import names_of
from test_bias_gelu import NAMES as GELU_NAMES
from test_bias_gelu import draw as draw_gelu
from test_embed_tokens import NAMES as EMBED_NAMES
from test_embed_tokens import PLACES, SHAPES, VOCABULARY, draw_ids, layout_of
from test_embed_tokens import draw as draw_embed
from test_embed_tokens import function as embed
from tolerances import max_error

from blip2_kernels import extension
from blip2_kernels.device_errors import check_device_errors
from blip2_kernels.ops import add_layer_norm, bias_gelu, embed_tokens
from blip2_kernels.ops.philox import Site, draw_key, hidden_keep_mask, keep_scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        extension.device_reason("cuda") is not None, reason=str(extension.device_reason("cuda"))
    ),
]
DEVICE = "cuda"
WIDTHS = (1, 7, 33, 768, 1408, 3072, 4096)
KINDS = ["norm", "norm with dropout", "gelu", "embed", "embed with dropout"]


def to_device(tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def norm(rows, dropout=0.0, **options):
    """add_layer_norm as a function of its five tensors, with dropout drawn once."""
    drop = {"dropout": dropout, "dropout_key": draw_key().to(DEVICE), "row_keys": names_of(rows).to(DEVICE)}

    def call(x, residual, weight, bias, input_bias, backend="csrc"):
        given = {"input_bias": input_bias, "backend": backend, "eps": 1e-5}
        return add_layer_norm(x, residual, weight, bias, **given, **drop, **options)

    return call


def gelu(x, bias, backend="csrc"):
    return bias_gelu(x, bias, backend=backend)


def case(kind, rows, width, x_dtype=torch.float32, dtype=torch.float32):
    """Names of the results, a call, and its tensors."""
    if kind == "gelu":
        return GELU_NAMES, gelu, to_device(draw_gelu(rows, width, x_dtype, dtype))
    if "embed" in kind:
        text = min(rows // 2, PLACES)
        samples, queries, tokens = SHAPES.get(rows, (1, rows - text, text))
        layout = layout_of(samples, queries, torch.ones(samples, tokens), device=DEVICE)
        ids = to_device(draw_ids(layout))
        call = embed(layout, ids, dropout=0.1 if "dropout" in kind else 0.0)
        tensors = to_device(draw_embed(samples, queries, width, dtype))
        return [n for n, t in zip(EMBED_NAMES, [ids, *tensors], strict=True) if t is not None], call, tensors
    call = norm(rows, 0.1 if "dropout" in kind else 0.0, layer=5, site=Site.CROSS_OUTPUT)
    return NORM_NAMES, call, to_device(draw_norm(rows, width, x_dtype, dtype))


def assert_equal(names, results, others):
    for name, a, b in zip(names, results, others, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
def test_every_width_and_row_count(x_dtype, dtype, kind):
    for width in WIDTHS:
        for rows in ROWS:
            print(f"{rows} rows of {width}")
            names, call, tensors = case(kind, rows, width, x_dtype, dtype)
            compare(names, call, lambda *t, call=call: call(*t, backend="reference"), tensors)


@pytest.mark.parametrize("width", [1, 8, 33, 768, 4096])
def test_the_dropout_mask_is_the_contract(width):
    """Against the mask as the CPU draws it, with x so large that a single wrong decision would show."""
    rows, p, key = 50, 0.3, draw_key()
    names, options = names_of(rows), {"layer": 3, "site": Site.FEED_FORWARD}
    keep = hidden_keep_mask(key, names, width, p, **options).to(DEVICE)
    key, names = key.to(DEVICE), names.to(DEVICE)
    assert torch.equal(hidden_keep_mask(key, names, width, p, **options), keep)
    x = torch.full((rows, width), 1000.0, device=DEVICE, requires_grad=True)
    residual, ones = torch.randn(rows, width).to(DEVICE), torch.ones(width, device=DEVICE)
    drop = {"dropout": p, "dropout_key": key, "row_keys": names, **options}
    out = add_layer_norm(x, residual, ones, torch.zeros_like(ones), eps=1e6, backend="csrc", **drop)
    hidden = (residual + torch.where(keep, x.detach() * keep_scale(p), 0)).double()
    assert max_error(out.detach(), torch.nn.functional.layer_norm(hidden, (width,), eps=1e6)) < 1e-5
    (dx,) = torch.autograd.grad(out, x, torch.randn(rows, width).to(DEVICE))
    assert (dx[~keep] == 0).all() and (width == 1 or (dx[keep] != 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [7, 33, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_apart_and_unaligned(kind, width, dtype):
    names, call, tensors = case(kind, 9, width, dtype, dtype)
    direct = with_gradients(call, tensors)
    apart = [strided(t) if t.dim() == 2 else t for t in tensors]
    across = [t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in tensors]
    assert not across[0].is_contiguous()
    assert_equal(names, direct, with_gradients(call, apart))
    assert_equal(names, direct, with_gradients(call, across))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_runs_give_the_same_bits(kind, dtype):
    names, call, tensors = case(kind, 1000, 768, dtype, dtype)
    first = with_gradients(call, tensors)
    for _ in range(100):
        assert_equal(names, first, with_gradients(call, tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_one_s_own(kind):
    names, call, tensors = case(kind, 1000, 768)
    first = with_gradients(call, tensors)
    assert_equal(names, first, on_a_busy_stream(lambda: with_gradients(call, tensors)))


def forward_and_backward(call, tensors):
    """A function that writes nothing but device memory, and the gradient of the output that it uses."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    grad = torch.randn_like(call(*leaves)).detach()

    def run():
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return run, leaves, grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cuda_graph_replayed_on_other_numbers(kind, dtype):
    names, call, tensors = case(kind, 100, 768, dtype, dtype)
    run, leaves, grad = forward_and_backward(call, tensors)
    graph, outputs = captured(run)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(-0.5)
        grad.add_(0.25)
    graph.replay()
    assert_equal(names, outputs, run())


@pytest.mark.parametrize("kind", KINDS)
def test_no_synchronisation_in_a_call(kind):
    _, call, tensors = case(kind, 100, 768)
    run, _, _ = forward_and_backward(call, tensors)
    run()
    with no_synchronisation():
        run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x_dtype", "dtype"), [PAIRS[0], PAIRS[2], PAIRS[3]])
def test_opcheck(kind, x_dtype, dtype):
    _, _, tensors = case(kind, 5, 12, x_dtype, dtype)
    leaves = [t.clone().requires_grad_() for t in tensors]
    ops = torch.ops.blip2_kernels
    if kind == "gelu":
        torch.library.opcheck(ops.bias_gelu.default, tuple(leaves))
        torch.library.opcheck(ops.bias_gelu_backward.default, (torch.randn_like(tensors[0]), *tensors))
        return
    drop = (0.0, None, None, 9)
    if "dropout" in kind:
        drop = (0.25, draw_key(DEVICE), names_of(5).to(DEVICE), 9)
    if "embed" in kind:
        queries, *rest = leaves
        ids = torch.tensor([1, 3], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
        inputs = (queries[0].detach().requires_grad_(), *rest[:2], *ids, 3, -1, *rest[2:])
        torch.library.opcheck(ops.embed_tokens.default, (*inputs, 1e-5, *drop))
        return
    torch.library.opcheck(ops.add_layer_norm.default, (*leaves, 1e-5, *drop))
    x, residual, weight, _, extra = tensors
    rest = (extra, torch.randn(5, device=DEVICE), torch.rand(5, device=DEVICE))
    arguments = (torch.randn_like(residual), x, residual, weight, *rest, *drop)
    torch.library.opcheck(ops.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_under_compile(kind):
    names, call, tensors = case(kind, 6, 24)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(
        names, with_gradients(compiled, tensors), with_gradients(call, tensors), strict=True
    ):
        assert max_error(a, b) < 1e-5, name


@pytest.mark.parametrize("which", ["input_ids", "position_ids"])
def test_ids_out_of_range_are_flagged(which):
    """Nothing is read out of bounds: the nearest row stands in, and the next check raises."""
    layout = layout_of(2, 3, torch.ones(2, 4), device=DEVICE)
    tensors = to_device(draw_embed(2, 3, 40))
    size = VOCABULARY if which == "input_ids" else PLACES
    ids = torch.tensor([[0, -1, 2, size], [1, 1 << 40, 0, 3]], device=DEVICE)
    fine = torch.zeros_like(ids)

    def call(values, **options):
        given = {"input_ids": [fine], "position_ids": [fine]} | {which: [values]}
        words = given.pop("input_ids")
        return embed_tokens(tensors[0], words, *tensors[1:], layout, backend="csrc", **given, **options)

    check_device_errors()
    nearest = call(ids.clamp(0, size - 1))
    check_device_errors()
    assert torch.equal(call(ids), nearest)
    with pytest.raises(IndexError, match="input_ids or position_ids"):
        check_device_errors(DEVICE)
    check_device_errors()
    with pytest.raises(ValueError, match=rf"{which}\[0\]: expected values in \[0, {size}\), got -1"):
        call(ids, validate=True)


@pytest.mark.parametrize("place", range(5))
def test_tensors_on_two_devices_are_refused(place):
    tensors = to_device(draw_norm(3, 8))
    tensors[place] = tensors[place].cpu()
    with pytest.raises(ValueError, match=r"expected a tensor on (cuda:0|cpu), got one on (cpu|cuda:0)"):
        norm(3)(*tensors)
    with pytest.raises(RuntimeError):  # past the checks of the Python function
        torch.ops.blip2_kernels.add_layer_norm.default(*tensors, 1e-5, 0.0, None, None, 0)


def test_dropout_arguments_on_another_device_are_refused():
    x, residual, weight, bias, _ = to_device(draw_norm(3, 8))
    good = {"dropout": 0.5, "dropout_key": draw_key(DEVICE), "row_keys": names_of(3).to(DEVICE)}
    for name in ("dropout_key", "row_keys"):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cuda:0, got one on cpu"):
            add_layer_norm(x, residual, weight, bias, **good | {name: good[name].cpu()})


def test_a_bias_on_another_device_is_refused():
    x, bias = to_device(draw_gelu(3, 8))
    for pair in ((x.cpu(), bias), (x, bias.cpu())):
        with pytest.raises(ValueError, match="bias: expected a tensor on"):
            gelu(*pair)
        with pytest.raises(RuntimeError):
            torch.ops.blip2_kernels.bias_gelu.default(*pair)
