"""fp32 products follow torch's switches for tf32, the older one and the newer one, in all four ops."""

import cross_cases
import pytest
import self_cases
import torch
from cross_cases import CrossCase
from self_cases import B, SelfCase
from tolerances import max_error

from blip2_kernels.ops import image_text_similarity, latent_attention, launching


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def self_attention_results(backend, dtype):
    case = SelfCase((B,), 5, ((3, 5),), 5, head_dim=16)
    return self_cases.run(case, case.tensors(torch.Generator().manual_seed(0)), backend, dtype)


def cross_attention_results(backend, dtype):
    case = CrossCase((1, 0, 1), 3, 2, 20, num_queries=3, head_dim=16)
    return cross_cases.run(case, case.tensors(torch.Generator().manual_seed(0)), backend, dtype)


def latent_attention_results(backend, dtype):
    tensors = [t.to(dtype) for t in draw((2, 5, 16), (2, 20, 16))]
    return [latent_attention(*tensors, scale=0.25, backend=backend)]


def similarity_results(backend, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in draw((3, 4, 16), (5, 16))]
    out = image_text_similarity(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


OPS = {
    "self_attention": self_attention_results,
    "cross_attention": cross_attention_results,
    "latent_attention": latent_attention_results,
    "image_text_similarity": similarity_results,
}


@pytest.fixture
def matmul():
    """torch's switches of matrix products, as they were found once the test is over."""
    switches = torch.backends.cuda.matmul
    before = switches.fp32_precision
    yield switches
    switches.allow_tf32 = False
    switches.fp32_precision = before


def allow_with_the_older_switch(matmul):
    matmul.allow_tf32 = True


def allow_with_the_newer_switch(matmul):
    matmul.fp32_precision = "tf32"


ALLOW = [allow_with_the_older_switch, allow_with_the_newer_switch]


@pytest.mark.parametrize("allow", ALLOW, ids=["older", "newer"])
@pytest.mark.parametrize("op", OPS)
def test_tf32_is_used_where_torch_allows_it(op, allow, matmul):
    """Its eleven bits are seen in the output, and only where they were asked for."""
    results = OPS[op]
    plain, truth = results("triton", torch.float32)[0], results("reference", torch.float64)[0]
    assert max_error(plain, truth) < 1e-5
    allow(matmul)
    coarse = results("triton", torch.float32)[0]
    assert 1e-5 < max_error(coarse, truth) < 1e-1
    matmul.fp32_precision = "ieee"
    assert torch.equal(results("triton", torch.float32)[0], plain)


def test_what_is_multiplied_how(matmul):
    assert launching.input_precision(torch.float32) == "ieee"
    for allow in ALLOW:
        allow(matmul)
        assert launching.input_precision(torch.float32) == "tf32"
        assert launching.input_precision(torch.bfloat16) == "ieee"
        matmul.fp32_precision = "ieee"
        assert launching.input_precision(torch.float32) == "ieee"


def test_a_torch_without_the_newer_switch_is_asked_by_the_older(monkeypatch):
    class Switches:
        allow_tf32 = False

    monkeypatch.setattr(torch.backends.cuda, "matmul", Switches)
    assert launching.input_precision(torch.float32) == "ieee"
    Switches.allow_tf32 = True
    assert launching.input_precision(torch.float32) == "tf32"
