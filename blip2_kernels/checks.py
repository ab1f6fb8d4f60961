"""Argument checks shared by every public function: one wording, `name: expected …, got …`."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


def describe(value: object) -> str:
    """What came, in the words of an error message: dtype and shape of a tensor, type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return (
        f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type(value).__name__
    )


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str] | None,
    dtypes: Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Check rank, sizes, dtype and device of a tensor.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        shape: one entry a dimension: an int must match, a str only names a free dimension; None for any.
        dtypes: admissible dtypes; empty for any.
        device: where the tensor must live; None for anywhere.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another rank, size or device.
    """
    if isinstance(value, Tensor):
        got = value.shape
        fits = shape is None or len(got) == len(shape)
        if fits and shape is not None:
            for size, want in zip(got, shape, strict=True):
                if size != want and not isinstance(want, str):
                    fits = False
        if fits and (not dtypes or value.dtype in dtypes) and (device is None or value.device == device):
            return value
    # Everything below is for the message: a call that is right does not pay for it.
    if shape is None:
        shape = value.shape if isinstance(value, Tensor) else ["..."]
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expected = f"{kinds} {wanted}".strip()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {describe(value)}")
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Check a host integer in [minimum, maximum]; raises TypeError or ValueError."""
    most = math.inf if maximum is None else maximum
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= most:
        return value
    bounds = f"an int in [{minimum}, {maximum}]" if maximum is not None else f"an int >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {bounds}, got {describe(value)}")
    raise ValueError(f"{name}: expected {bounds}, got {value}")


def check_finite(
    name: str,
    value: object,
    minimum: float | None = None,
    *,
    above: float | None = None,
    maximum: float | None = None,
) -> float:
    """Check a finite host number, at least `minimum`, more than `above`, at most `maximum`; raises TypeError
    or ValueError."""
    limits = ((">=", minimum), (">", above), ("<=", maximum))
    bounds = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
    expected = f"a finite number {bounds}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if (
        not math.isfinite(value)
        or (minimum is not None and value < minimum)
        or (above is not None and value <= above)
        or (maximum is not None and value > maximum)
    ):
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return value


def check_bool(name: str, value: object) -> bool:
    """Check a switch; raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return value


def check_function(name: str, value: object, *, optional: bool = True) -> None:
    """Check a function, or None where it is `optional`; raises TypeError."""
    if not callable(value) and not (optional and value is None):
        expected = "a function or None" if optional else "a function"
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def name_of_device(name: str, value: object) -> torch.device:
    """Check that a str or torch.device names a device, here or elsewhere; raises TypeError or ValueError."""
    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name}: expected a torch.device or its name, got {describe(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a torch.device or its name, got {value!r}") from error


def home_of(weight: Tensor) -> torch.device | None:
    """Where what meets a weight must live: with it; anywhere (None) while it waits elsewhere for its turn."""
    return None if weight.is_meta else weight.device


def check_device(name: str, value: Any) -> torch.device:
    """Check a device, such as "cpu" or "cuda:1", and that torch has it here.

    Returns:
        The device with its number: the current one where only its type was named.

    Raises:
        TypeError: neither a str nor a torch.device.
        ValueError: the name of no device, or of one that is not here.
    """
    if torch.compiler.is_compiling():  # whose tracer does not follow what is caught below
        return torch.empty(0, device=value).device
    device = name_of_device(name, value)
    try:
        return torch.empty(0, device=device).device
    # A torch without a device's driver says so in one of these.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"{name}: expected a device that torch has here, got {str(device)!r}") from error


def check_folder(name: str, value: object, *, writable: bool = True) -> Path:
    """Check a path that is a folder, or can become one, and (if `writable`) may be written in; touches
    nothing.

    Raises:
        TypeError: no path.
        ValueError: a file is in its way, or what there is of it is read-only.
    """
    if not isinstance(value, str | Path):
        raise TypeError(f"{name}: expected a path, got {describe(value)}")
    path = Path(value)
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise ValueError(f"{name}: expected a folder, got {path}, where {nearest} is a file")
    if writable and not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: expected a folder to write in, got {path}, where {nearest} is read-only")
    return path


def check_probability(name: str, value: object) -> float:
    """Check a dropout probability in [0, 1); raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number in [0, 1), got {describe(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return float(value)


def values_are_free(device: torch.device) -> bool:
    """Whether looking at the values of a device's tensors costs nothing: on the CPU, and outside compilation,
    which would have to stop for it."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def can_look(device: torch.device, force: bool) -> bool:
    """Whether to look at values: on a device only when asked to, and never while a graph is traced."""
    return values_are_free(device) or (force and not torch.compiler.is_compiling())


def check_range(
    name: str, values: Tensor, size: int, *, ignored: int | None = None, force: bool = False
) -> None:
    """Check that integers, such as token ids or labels, are in [0, size).

    Args:
        name: the argument's name, for the message.
        values: integers of any shape.
        size: of what they number.
        ignored: a value that is admissible too.
        force: look at a device tensor, at the price of a synchronisation; by default only a CPU tensor is
            looked at. While a graph is compiled none is.

    Raises:
        ValueError: another value was found; the message names one.
    """
    if not can_look(values.device, force) or not values.numel():
        return
    if ignored is None:
        low, high = map(int, values.aminmax())
        wrong = [] if low >= 0 and high < size else [low if low < 0 else high]
        expected = f"values in [0, {size})"
    else:
        wrong = values[((values < 0) & (values != ignored)) | (values >= size)].tolist()
        expected = f"{ignored} or values in [0, {size})"
    if wrong:
        raise ValueError(f"{name}: expected {expected}, got {wrong[0]}")


def check_binary(name: str, mask: Tensor, *, force: bool = False) -> None:
    """Check that a mask holds only 0 and 1.

    A CPU tensor is always checked, but for while a graph is compiled. A device tensor is checked only with
    `force`, since looking at its values costs a synchronisation.

    Raises:
        ValueError: another value was found; the message names it.
    """
    if mask.dtype == torch.bool or not (force or values_are_free(mask.device)):
        return
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise ValueError(f"{name}: expected only 0 and 1, got {wrong[0].item()}")
