"""Errors that a kernel finds in the values of device tensors, raised without a synchronisation of their own.

Whether an index on a GPU is in range cannot be asked without waiting for it. A kernel never reads out of
bounds because of one: it goes on with the nearest admissible value and sets its device's flag, which is
looked at where the host waits for the device anyway, and by `check_device_errors`.
"""

import torch
from torch import Tensor

from .checks import name_of_device

_flags: dict[torch.device, Tensor] = {}


def error_flag(device: torch.device) -> Tensor:
    """The device's flag, int32 [1]: 0, or about how many wrong values kernels met (at least one)."""
    if device.type == "meta":
        return torch.zeros(1, dtype=torch.int32, device=device)  # nothing runs there
    if device not in _flags:
        with torch.inference_mode(False):  # else it could only be cleared in inference mode
            _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def error_count(device: torch.device) -> Tensor:
    """The device's flag as a number, int32 [], to be read where something else is read back anyway."""
    return error_flag(device)[0]


def check_device_errors(device: torch.device | str | None = None) -> None:
    """Raise if a kernel met a wrong value since the last check; waits for the device.

    Args:
        device: to look at; default every one on which a kernel ran.

    Raises:
        TypeError, ValueError: `device` names none.
        IndexError: an `image_index`, token ids or position ids had values out of range; `validate=True` says
            which call it was.
    """
    wanted = None if device is None else name_of_device("device", device)  # "cuda" is every one of them
    for found, flag in _flags.items():
        if wanted is None or (wanted.type == found.type and wanted.index in (None, found.index)):
            raise_if_set(found, int(flag.item()))


def raise_if_set(device: torch.device, count: int) -> None:
    """Raise for a flag's value that the host has read, and clear it; see `check_device_errors`."""
    if count:
        _flags[device].zero_()
        raise IndexError(
            f"image_index: expected values in [0, images), got {count} others in an earlier call on {device}"
            " (or input_ids or position_ids beyond their table); pass validate=True to find it"
        )
