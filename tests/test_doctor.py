"""doctor: what works is said to work, a broken extension is named, and the package goes on without it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_cases import needs_extension
from processes import clean_environment

from blip2_kernels import doctor, extension

ROOT = Path(__file__).resolve().parent.parent

needs_elf = pytest.mark.skipif(sys.platform != "linux", reason="breaks ELF libraries")


def findings_by_name():
    return {(f.op, f.backend): f for f in doctor.examine(["cpu"])}


def test_every_operator_and_backend_is_examined():
    found = findings_by_name()
    from blip2_kernels import ops

    assert {op for op, _ in found} == set(ops.__all__)
    assert all(found[op, "reference"].works for op in ops.__all__)
    assert all(f.healthy for f in found.values())
    compiled = found["bias_gelu", "csrc"]
    assert compiled.works == (extension.reason() is None)


def test_a_wrong_backend_is_seen(monkeypatch):
    monkeypatch.setattr(doctor, "bias_gelu", lambda x, bias, backend: (x + bias) * (1 + (backend == "csrc")))
    found = findings_by_name()["bias_gelu", "csrc"]
    assert not found.works and not found.healthy and "other numbers" in found.reason


def test_json():
    command = [sys.executable, "-m", "blip2_kernels.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "PyTorch version" in found["environment"] and found["findings"]


SCRIPT = """
import torch
import torch.nn.functional as F
from blip2_kernels import doctor, extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.ops import add_layer_norm, bias_gelu, embed_tokens
x, residual, weight, bias = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4), torch.randn(4)
assert torch.equal(bias_gelu(x, bias), F.gelu(x + bias))
expected = F.layer_norm(residual + x, (4,), weight, bias, 1e-12)
assert torch.equal(add_layer_norm(x, residual, weight, bias), expected)
layout = TokenLayout.from_attention_masks(1, [torch.ones(2, 1)])
rows = torch.cat([x[:1], x[:1], residual[[2, 0]] + x[2:]])
expected = F.layer_norm(rows, (4,), weight, bias, 1e-12)
ids = [torch.tensor([[2], [0]])]
assert torch.equal(embed_tokens(x[:1, None], ids, residual, x[2:], weight, bias, layout), expected)
print(extension.reason())
compiled = [f for f in doctor.examine(["cpu"]) if f.backend == "csrc"]
assert {f.op for f in compiled} == {"self_attention", "add_layer_norm", "bias_gelu", "embed_tokens"}
assert not any(f.works for f in compiled) and all(f.healthy for f in compiled)
print({f.reason for f in compiled})
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the package whose library a test may break; runs SCRIPT beside it."""
    for name in ("blip2_kernels", "model"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        env = clean_environment(PYTHONPATH=str(tmp_path))
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        reason, findings = done.stdout.splitlines()
        assert reason[:40] in findings
        return reason

    run.library = tmp_path / "blip2_kernels" / extension.LIBRARY.name
    return run


@needs_extension
@needs_elf
@pytest.mark.parametrize("kept", [0, 30, 5000, 0.5, 0.999])
def test_a_truncated_library(copy, kept):
    data = copy.library.read_bytes()
    copy.library.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    reason = copy()
    assert "truncated" in reason or "no ELF library" in reason, reason


@needs_extension
@needs_elf
def test_a_library_for_another_processor(copy):
    data = bytearray(copy.library.read_bytes())
    data[18:20] = (40).to_bytes(2, "little")
    copy.library.write_bytes(data)
    assert "was built for machine 40, this machine is" in copy()


@needs_extension
@needs_elf
def test_a_missing_symbol(copy):
    """As where a library was built for a newer torch."""
    data = copy.library.read_bytes()
    assert b"torch_parallel_for\0" in data
    copy.library.write_bytes(data.replace(b"torch_parallel_for\0", b"torch_parallel_fox\0"))
    reason = copy()
    assert "cannot be loaded" in reason and "torch_parallel_fox" in reason


@needs_extension
@needs_elf
@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("schema", extension.SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_a_library_of_another_version(copy, schema, rename):
    """Whose operator has another name for an argument, or another name."""
    data, name = copy.library.read_bytes(), schema.split("(")[0].encode()
    old = schema.encode() + b"\0"
    assert data.count(old) == 1
    if rename:
        data = data.replace(old, b"X" + old[1:]).replace(b"\0" + name + b"\0", b"\0X" + name[1:] + b"\0")
    else:
        new = old.replace(b" place", b" plays").replace(b"? bias)", b"? bi_s)")
        assert new != old
        data = data.replace(old, new)
    copy.library.write_bytes(data)
    assert f"is of another version than the package ({name.decode()} differs)" in copy()


def test_no_library(copy):
    copy.library.unlink(missing_ok=True)
    assert "was not built" in copy()


@needs_extension
def test_cuda_tensors_without_a_cuda_build():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("blip2_kernels::bias_gelu", "CUDA"):
        assert extension.device_reason("cuda") == "the extension was built without CUDA"
    assert "not on xpu" in extension.device_reason("xpu")


@pytest.mark.parametrize(
    ("devices", "error", "message"),
    [
        ("cpu", TypeError, "expected a list of devices, got str 'cpu'"),
        (["cpu", "gpu"], ValueError, "expected a torch.device or its name, got 'gpu'"),
        (["cuda:99"], ValueError, "expected a device that torch has here, got 'cuda:99'"),
    ],
)
def test_devices_that_are_none_or_not_here_are_refused(devices, error, message):
    with pytest.raises(error, match=f"^devices: {message}"):
        doctor.examine(devices)
