"""The one table of tolerances. No test and no environment softens it.

The yardstick: an implementation may be at most twice as far from the fp64 truth as the same computation in
plain PyTorch at the same dtype, plus a floor for results that happen to be exact there.
"""

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
WHOLE_MODEL = {torch.float64: 1e-10, torch.float32: 1e-4}
WHOLE_MODEL_FLOOR = 1e-6
"""Of the largest gradient of all: below it a gradient is rounding noise (key biases have exactly 0)."""


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where `value` is not finite or has another shape."""
    if value.shape != truth.shape or not torch.isfinite(value).all():
        return float("inf")
    return (value.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_yardstick(name: str, value: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Assert that `value` is within twice the error of `plain`, both against the fp64 `truth`."""
    bound = 2 * max_error(plain, truth) + FLOOR[value.dtype]
    error = max_error(value, truth)
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"


def assert_same_gradients(named: dict[str, Tensor | None], truth: dict[str, Tensor | None], dtype) -> None:
    """Assert whole-model parity: relative to each parameter's largest gradient, with a floor.

    A key bias shifts all scores of a row alike: its true gradient is 0, what is computed is rounding noise.
    """
    largest = max(float(g.abs().max()) for g in truth.values() if g is not None)
    for name, expected in truth.items():
        got = named[name]
        assert (got is None) == (expected is None), f"{name}: gradient {got is None=} but {expected is None=}"
        if expected is None:
            continue
        error, noise = max_error(got, expected), WHOLE_MODEL_FLOOR * largest
        if name.endswith("attention.key.bias"):
            assert max(error, float(got.abs().max())) <= noise, f"{name}: no rounding noise"
            continue
        bound = WHOLE_MODEL[dtype] * max(float(expected.abs().max()), noise)
        assert error <= bound, f"{name}: gradient error {error:.3e} exceeds {bound:.3e}"
