"""What follows a matrix product: compiled operators where modules are as built, else the modules."""

import pytest
import torch
from compiled_cases import needs_extension
from tolerances import max_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import GELUActivation

from blip2_kernels.encoder.epilogues import HiddenDropout, dense_add_norm, dense_gelu
from blip2_kernels.ops.philox import Site, draw_key, dropout_hidden


class Calls(TorchDispatchMode):
    """Names of the package's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "blip2_kernels":
            self.names.append(func.name().split("::")[1])
        return func(*args, **kwargs or {})


def parts(dtype=torch.float32, bias=True):
    dense, norm = nn.Linear(8, 16, bias=bias, dtype=dtype), nn.LayerNorm(16, dtype=dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return dense, norm, torch.randn(5, 8, dtype=dtype), torch.randn(5, 16, dtype=dtype)


def plain(dense, norm, x, residual, drop):
    y = dense(x)
    if drop is not None:
        y = dropout_hidden(y, drop.p, drop.key, drop.names, layer=drop.layer, site=drop.site)
    return norm(residual + y)


@needs_extension
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_operator_a_norm_and_one_an_activation(autocast, bias, drops):
    dense, norm, x, residual = parts(bias=bias)
    names = torch.arange(5, dtype=torch.int32)
    drop = HiddenDropout(0.3, draw_key(), names, 2, Site.FEED_FORWARD) if drops else None
    activation = GELUActivation()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Calls() as calls:
        out = dense_add_norm(dense, norm, x, residual, drop)
        inner = dense_gelu(dense, activation, x)
    assert calls.names == ["add_layer_norm", "bias_gelu"][: 1 + bias]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, inner_expected = plain(dense, norm, x, residual, drop), activation(dense(x))
    assert out.dtype == expected.dtype and inner.dtype == inner_expected.dtype
    bound = 0.1 if autocast else 1e-5
    assert max_error(out.detach(), expected) < bound and max_error(inner.detach(), inner_expected) < bound
    parameters = [*dense.parameters(), *norm.parameters()]
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, parameters, weight)
    wanted = torch.autograd.grad(expected, parameters, weight)
    for a, b in zip(got, wanted, strict=True):
        assert max_error(a, b) < (0.2 if autocast else 1e-4)


@needs_extension
@pytest.mark.parametrize("which", ["dense", "norm", "activation"])
def test_a_hook_is_called(which):
    dense, norm, x, residual = parts()
    activation, seen = GELUActivation(), []
    {"dense": dense, "norm": norm, "activation": activation}[which].register_forward_hook(
        lambda module, inputs, output: seen.append(1) or output * 2
    )
    out, inner = dense_add_norm(dense, norm, x, residual, None), dense_gelu(dense, activation, x)
    assert len(seen) == (2 if which == "dense" else 1)
    assert max_error(out.detach(), plain(dense, norm, x, residual, None)) < 1e-5
    assert max_error(inner.detach(), activation(dense(x))) < 1e-5


def test_other_activations_norms_and_dtypes_run_as_they_are():
    dense, norm, x, residual = parts(torch.float64)
    with Calls() as calls:
        out = dense_add_norm(dense, norm, x, residual, None)
        dense_gelu(dense, GELUActivation(), x)
        dense, norm, x, residual = parts()
        dense_gelu(dense, nn.GELU(approximate="tanh"), x)
        dense_add_norm(dense, nn.RMSNorm(16), x, residual, None)
    assert calls.names == [] and out.dtype == torch.float64
