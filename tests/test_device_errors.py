"""The flag of wrong device values: of which device, and whoever made it first."""

import pytest
import torch

from blip2_kernels import device_errors
from blip2_kernels.device_errors import check_device_errors, error_flag

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(device_errors, "_flags", {})


def test_a_flag_first_met_in_inference_mode_can_be_cleared_outside():
    with torch.inference_mode():
        error_flag(CPU).add_(2)
    with pytest.raises(IndexError, match="got 2 others in an earlier call on cpu"):
        check_device_errors()
    check_device_errors()


@pytest.mark.parametrize("device", [None, "cpu", CPU])
def test_a_device_is_found_by_its_name(device):
    error_flag(CPU).fill_(1)
    check_device_errors("meta")
    with pytest.raises(IndexError):
        check_device_errors(device)


def test_what_names_no_device_is_refused():
    with pytest.raises(ValueError, match=r"^device: expected a torch.device or its name, got 'gpu'"):
        check_device_errors("gpu")
    with pytest.raises(TypeError, match=r"^device: expected a torch.device or its name, got int 3"):
        check_device_errors(3)
