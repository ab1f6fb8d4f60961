"""Linear layers by oneDNN: the numbers of `torch.nn.functional.linear`, and where they are taken."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_yardstick
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blip2_kernels.encoder.modules import call_linear
from blip2_kernels.ops import linear as module
from blip2_kernels.ops.linear import linear, linear_by_head, plain_linear_reason

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def by_onednn(monkeypatch):
    """As on a CPU on which oneDNN is the faster one."""
    if not ONEDNN:
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(module, "_fast_blas_reason", lambda: None)


@pytest.fixture
def products(monkeypatch):
    """Shapes of what was multiplied by oneDNN."""
    shapes, product = [], module._product
    monkeypatch.setattr(
        module, "_product", lambda x, *rest: (shapes.append(tuple(x.shape)), product(x, *rest))[1]
    )
    return shapes


def strided(*shape: int) -> torch.Tensor:
    """A transposed view into a larger tensor."""
    return torch.randn(*shape[:-2], shape[-1] + 3, shape[-2])[..., 3:, :].transpose(-1, -2)


CASES = {
    "rows": lambda: (torch.randn(33, 48), torch.randn(20, 48), torch.randn(20)),
    "no bias": lambda: (torch.randn(33, 48), torch.randn(20, 48), None),
    "images": lambda: (torch.randn(2, 17, 48), torch.randn(20, 48), torch.randn(20)),
    "one row": lambda: (torch.randn(1, 7), torch.randn(1, 7), torch.randn(1)),
    "strided": lambda: (strided(33, 48), strided(20, 48), torch.randn(40)[::2]),
    "strided images": lambda: (strided(2, 17, 48), torch.randn(48, 20).t(), None),
    "expanded": lambda: (torch.randn(1, 48).expand(9, -1), torch.randn(20, 48), None),
    "a head's columns": lambda: (torch.randn(33, 3, 48)[:, 1], torch.randn(3, 48, 20)[1].t(), None),
}


def values_and_gradients(function, tensors, dtype, weight):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], weight.to(dtype))]


@pytest.mark.usefixtures("by_onednn", "seed")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_linear_layer(name, products):
    tensors = CASES[name]()
    weight = torch.randn_like(F.linear(*tensors))
    got = values_and_gradients(linear, tensors, torch.float32, weight)
    assert len(products) == 3, "forward, and the gradients of x and weight"
    plain = values_and_gradients(F.linear, tensors, torch.float32, weight)
    truth = values_and_gradients(F.linear, tensors, torch.float64, weight)
    for what, *values in zip(("out", "dx", "dweight", "dbias"), got, plain, truth, strict=False):
        assert_yardstick(f"{what} of {name}", *values)


@pytest.mark.usefixtures("by_onednn", "seed")
def test_gradients_of_gradients():
    x, weight, bias = (t.requires_grad_() for t in CASES["rows"]())

    def penalty(function) -> tuple[torch.Tensor, ...]:
        out = function(x, weight, bias).sigmoid().sum()
        (dx,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    for got, expected in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("by_onednn", "seed")
def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = CASES["rows"]()
    out = linear(x, weight.requires_grad_(), bias)
    out.sum().backward()
    assert x.grad is None and bias.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(20, -1))


@pytest.mark.usefixtures("by_onednn", "seed")
@pytest.mark.parametrize("needing", ["x", "weight", "bias"])
def test_only_what_a_gradient_needs_is_kept(needing):
    tensors = dict(zip(("x", "weight", "bias"), CASES["rows"](), strict=True))
    tensors[needing].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: None):
        linear(*tensors.values())
    shapes = {"x": [tensors["weight"].shape], "weight": [tensors["x"].shape], "bias": []}
    assert kept == shapes[needing]


@pytest.mark.usefixtures("by_onednn", "seed")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_in_inference_mode_and_under_vmap(products):
    x, weight, bias = CASES["images"]()
    expected = F.linear(x, weight, bias)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, bias), expected)
    assert products
    torch.testing.assert_close(torch.vmap(linear, (0, None, None))(x, weight, bias), expected)


@pytest.mark.parametrize("fast", [True, False], ids=["onednn", "blas"])
def test_a_product_for_each_head(fast, monkeypatch, seed, products):
    if fast and not ONEDNN:
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(module, "_fast_blas_reason", lambda: None if fast else "for the test")
    x, weight = torch.randn(9, 3, 8), torch.randn(3, 8, 5).transpose(1, 2)
    torch.testing.assert_close(linear_by_head(x, weight), torch.einsum("rhi,hoi->rho", x, weight))
    assert bool(products) == fast


HALF = torch.randn(3, 4, dtype=torch.bfloat16)
WHOLE = torch.randn(3, 4)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (HALF, HALF, "a tensor is bfloat16"),
        (WHOLE, WHOLE.double(), "a tensor is float64"),
        (WHOLE.to("meta"), WHOLE.to("meta"), "a tensor is on meta"),
        (WHOLE, WHOLE[:, 1:], "do not fit"),
        (WHOLE[0], WHOLE, "next to nothing"),
        (WHOLE[:0], WHOLE, "next to nothing"),
        (WHOLE, WHOLE[:0], "next to nothing"),
    ],
)
def test_what_is_left_to_torch(x, weight, reason):
    assert plain_linear_reason(WHOLE, WHOLE) is None
    assert reason in plain_linear_reason(x, weight)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("bias", [torch.zeros(2), torch.zeros(1, 3)])
def test_a_bias_that_does_not_fit_is_never_read_past_its_end(bias, products):
    assert "do not fit" in plain_linear_reason(WHOLE, WHOLE, bias)
    with pytest.raises(RuntimeError) if bias.shape == (2,) else nullcontext():
        linear(WHOLE, WHOLE, bias)
    assert not products


@pytest.mark.usefixtures("by_onednn")
def test_switches_of_torch_are_obeyed(products, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert "switched off" in plain_linear_reason(WHOLE, WHOLE)
        linear(WHOLE, WHOLE)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in plain_linear_reason(WHOLE, WHOLE)
        assert linear(WHOLE, WHOLE).dtype == torch.bfloat16
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(WHOLE, WHOLE), F.linear(WHOLE, WHOLE))
    assert not products


@pytest.mark.parametrize(
    ("capability", "described", "mkl", "reason"),
    [
        ("AVX512", "vendor_id : AuthenticAMD", True, None),
        ("AVX512", "vendor_id : GenuineIntel", True, "Intel"),
        ("AVX2", "vendor_id : AuthenticAMD", True, "no AVX-512"),
        ("AVX512", "vendor_id : AuthenticAMD", False, "not MKL"),
    ],
)
def test_on_which_cpus(capability, described, mkl, reason, monkeypatch):
    if not ONEDNN:
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(module, "_cpu_description", lambda: described)
    said = module._fast_blas_reason.__wrapped__()
    assert said is None if reason is None else reason in said


@pytest.mark.usefixtures("by_onednn")
def test_a_module_that_was_touched_is_called(products):
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    torch.testing.assert_close(call_linear(layer, x), layer(x))
    assert products.pop() == (3, 4) and not products
    layer.register_forward_hook(lambda *_: torch.full((3, 2), 7.0))
    assert (call_linear(layer, x) == 7).all() and not products


@pytest.mark.usefixtures("by_onednn")
def test_its_products_are_counted_as_a_linear_layer_s():
    x, weight, bias = (t.requires_grad_() for t in CASES["images"]())

    def counted(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias).sum().backward()
        return counter.get_total_flops()

    assert counted(linear) == counted(F.linear) == 3 * 2 * 2 * 17 * 48 * 20
