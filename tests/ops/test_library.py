"""How operators are called: past torch's registration while nobody watches, by it once somebody does."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blip2_kernels.ops.library import Gradient, _watched, define


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return 2 * ctx.factor * x * grad, None


square = define(
    "test_square(Tensor x, float factor) -> Tensor",
    lambda x, factor: factor * x * x,
    lambda x, factor: torch.empty_like(x),
    Gradient(_backward, _save),
)
without_gradient = define("test_negate(Tensor x) -> Tensor", lambda x: -x, lambda x: torch.empty_like(x))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


def path(x: Tensor) -> str:
    """Which of both ways a call takes, by the name of what it records."""
    name = type(square(x, 3.0).grad_fn).__name__
    assert name in ("test_squareBackward", "GeneratedBackwardFor_blip2_kernels_test_square_defaultBackward")
    return "direct" if name == "test_squareBackward" else "registered"


@pytest.mark.parametrize("kind", [lambda t: t.requires_grad_(), nn.Parameter], ids=["tensor", "parameter"])
def test_both_ways_give_the_same(kind):
    x = kind(torch.randn(5))
    assert path(x) == "direct"
    (direct,) = torch.autograd.grad(square(x, 3.0).sum(), x)
    with Seen() as seen:
        out = square(x, 3.0)
        (registered,) = torch.autograd.grad(out.sum(), x)
    assert "blip2_kernels.test_square.default" in seen.names
    assert torch.equal(direct, registered) and torch.equal(direct, 6 * x.detach())
    with torch.no_grad():
        assert torch.equal(square(x, 3.0), out) and not square(x, 3.0).requires_grad


def test_who_watches_sees_operators():
    x = torch.randn(5, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        square(x, 3.0)
    assert any(event.name == "blip2_kernels::test_square" for event in profiler.events())
    assert path(x) == "direct", "and afterwards none"

    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda t: square(t, 3.0))(x.detach()).graph
    assert any(node.target is torch.ops.blip2_kernels.test_square.default for node in graph.nodes)
    compiled = torch.compile(lambda t: square(t, 3.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), square(x, 3.0))
    assert _watched((x.detach().as_subclass(Wrapped), 3.0)) and not _watched((x, 3.0))
    assert square(torch.empty(5, device="meta"), 3.0).shape == (5,)


def test_a_view_with_a_pending_sign_is_no_plain_tensor():
    imaginary = torch.view_as_complex(torch.randn(5, 2)).conj().imag
    assert imaginary.is_neg()
    assert torch.equal(without_gradient(imaginary), -imaginary.resolve_neg())


def test_gradients_of_gradients_are_refused():
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(square(x, 3.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="test_square has no gradient of its gradient"):
        grad.sum().backward()
