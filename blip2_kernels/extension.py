"""The compiled extension (csrc/): loaded if it is there and in order; else the reason why it is not used."""

import platform
import struct
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_C.abi3.so"

SCHEMAS = (
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? input_bias, float eps,"
    " float dropout, Tensor? dropout_key, Tensor? row_keys, int place)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    "add_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor? input_bias,"
    " Tensor mean, Tensor rstd, float dropout, Tensor? dropout_key, Tensor? row_keys, int place)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dinput_bias)",
    "embed_tokens_forward(Tensor? queries, Tensor? words, Tensor? positions, Tensor? token_ids,"
    " Tensor? position_ids, int query_rows, Tensor weight, Tensor bias, float eps, float dropout,"
    " Tensor? dropout_key, Tensor? row_keys, int place, Tensor(a!)? errors)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    "embed_tokens_backward(Tensor grad, Tensor? queries, Tensor? words, Tensor? positions,"
    " Tensor? token_ids, Tensor? position_ids, int query_rows, Tensor? token_order,"
    " Tensor? position_order, int padding_idx, Tensor weight, Tensor mean, Tensor rstd, float dropout,"
    " Tensor? dropout_key, Tensor? row_keys, int place)"
    " -> (Tensor dqueries, Tensor dwords, Tensor dpositions, Tensor dweight, Tensor dbias)",
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor parts, Tensor visible, int pairs,"
    " float scale, float dropout, Tensor? dropout_key, Tensor? q_row_keys, Tensor? kv_row_keys, int place)"
    " -> Tensor",
    "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor spans, Tensor parts,"
    " Tensor visible, int pairs, float scale, float dropout, Tensor? dropout_key, Tensor? q_row_keys,"
    " Tensor? kv_row_keys, int place) -> (Tensor dq, Tensor dk, Tensor dv)",
)
"""What csrc/library.cpp registers. A library of another version has others, and is not used."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_NORM_WIDTH = 4096
"""Channels of a row that is normalised: what a CUDA block, or a buffer in a first-level cache, holds."""

_MACHINES = {62: "x86_64", 183: "aarch64"}
"""ELF's numbers of processor architectures."""


def _file_reason(library: Path) -> str | None:
    """None for a library that is whole and made for this machine; loading any other might end the process."""
    try:
        with library.open("rb") as file:
            header = file.read(64)
            size = file.seek(0, 2)
    except OSError as error:
        return f"{library} cannot be read: {error.strerror}"
    if header[:4] != b"\x7fELF":  # another system's format: its loader decides
        return None if platform.system() != "Linux" else f"{library} is no ELF library; install it again"
    if len(header) < 64:
        return f"{library} is truncated ({size} bytes); install it again"
    machine = struct.unpack_from("<H", header, 18)[0]
    # The table of sections is the last thing in a library.
    table, entry_size, entries = struct.unpack_from("<Q", header, 40) + struct.unpack_from("<HH", header, 58)
    if size < table + entry_size * entries:
        return f"{library} is truncated ({size} bytes); install it again"
    built_for = _MACHINES.get(machine, f"machine {machine}")
    if platform.system() == "Linux" and built_for != platform.machine():
        return f"{library} was built for {built_for}, this machine is {platform.machine()}"
    return None


@cache
def reason() -> str | None:
    """None where the extension is loaded (by the first call), else why it is not."""
    if not LIBRARY.exists():
        return "the extension was not built: `pip install -v .` says why"
    problem = _file_reason(LIBRARY)
    if problem is not None:
        return problem
    if hasattr(torch.ops.blip2_kernels, "add_layer_norm"):
        return "another copy of the extension is already loaded in this process"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} cannot be loaded: {error.__cause__ or error}"
    for schema in SCHEMAS:
        name = schema.split("(")[0]
        loaded = getattr(torch.ops.blip2_kernels, name, None)
        if loaded is None or str(loaded.default._schema) != f"blip2_kernels::{schema}":
            return f"{LIBRARY} is of another version than the package ({name} differs); install it again"
    return None


@torch.compiler.assume_constant_result
def device_reason(device_type: str) -> str | None:
    """None where the extension runs on tensors of a device type, else why not."""
    return _device_reason(device_type)


def rows_reason(dtype: torch.dtype, device_type: str, norm_width: int = 0) -> str | None:
    """None where the compiled operators can serve rows on such a device, else why not.

    Args:
        dtype: of the rows.
        device_type: where they are.
        norm_width: channels over which they are normalised; 0 where they are not.
    """
    if dtype not in DTYPES:
        return f"the extension computes in fp32, fp16 and bf16, not in {dtype}"
    if norm_width > MAX_NORM_WIDTH:
        return f"the extension takes rows of up to {MAX_NORM_WIDTH} channels, got {norm_width}"
    return device_reason(device_type)


@cache
def _device_reason(device_type: str) -> str | None:
    problem = reason()
    if problem is not None:
        return problem
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return f"the extension runs on CPU and CUDA tensors, not on {device_type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("blip2_kernels::add_layer_norm", key):
        return "the extension was built without CUDA"
    return None
