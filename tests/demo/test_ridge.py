"""The baseline is the minimum it says it is."""

import pytest
import torch

from blip2_kernels.model.demo.ridge import choose_penalty, fit_ridge, pooled, scores


def test_fit_is_the_minimum_of_the_penalised_error():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 3, generator=generator, dtype=torch.float64) + 5
    fit = fit_ridge(x, y, 2.5)

    weight = fit.weight.clone().requires_grad_()
    offset = (fit.y_mean - fit.x_mean @ fit.weight).clone().requires_grad_()
    loss = (x @ weight + offset - y).square().sum() + 2.5 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, offset)):
        assert gradient.abs().max() < 1e-9
    # The penalty as extra rows of an ordinary least-squares problem: another route to the same numbers.
    rows = torch.cat([x - x.mean(0), 2.5**0.5 * torch.eye(7, dtype=torch.float64)])
    targets = torch.cat([y - y.mean(0), torch.zeros(7, 3, dtype=torch.float64)])
    assert torch.allclose(fit.weight, torch.linalg.lstsq(rows, targets).solution, atol=1e-10)
    assert torch.allclose(fit(x).mean(0), y.mean(0), atol=1e-10)


def test_scores_find_a_linear_relation_and_validation_chooses():
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(6, 5, generator=generator)
    features = torch.randn(60, 4, 6, generator=generator)
    embeddings = pooled(features) @ truth + 0.01 * torch.randn(60, 5, generator=generator)
    fit = choose_penalty((features[:40], embeddings[:40]), (features[40:], embeddings[40:]), (1e-3, 1e6))
    found = scores(fit, features[40:], embeddings[40:])
    assert (found.argmax(1) == torch.arange(20)).all()
    assert torch.equal(fit.weight, fit_ridge(pooled(features[:40]), embeddings[:40], 1e-3).weight)


def test_refusals():
    with pytest.raises(
        ValueError, match=r"expected \[n, inputs\] and \[n, outputs\], got \[3, 2\] and \[4, 2\]"
    ):
        fit_ridge(torch.zeros(3, 2), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="penalty: expected a positive number, got 0"):
        fit_ridge(torch.zeros(3, 2), torch.zeros(3, 2), 0)
