"""bf16 and tf32 as a GPU computes them, for Triton's interpreter.

The interpreter keeps bf16 as uint16 bit patterns and forgets it in places: `tl.dot` multiplies the patterns,
arithmetic adds them, casts to and from integers copy them, and casts from fp32 round halves away from zero.
It takes `input_precision="tf32"` for exact fp32.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from harness.faults import RawBfloat16, SmallDot
from harness.patches import Patches

SMALLEST_DOT = 16


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A matrix product by BLAS: fast, but a row's last bits may depend on where in the matrix it stands."""
    return np.matmul(left, right)


def product_row_by_row(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """As tensor cores do it: a row's bits depend on the row alone. For tests that permute rows."""
    return np.einsum("...mk,...kn->...mn", left, right)


def fp32_from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns (uint16); exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_from_fp32(values: np.ndarray) -> np.ndarray:
    """The bit patterns (uint16) of fp32 values rounded to bf16: to nearest, halves to even, NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def tf32_from_fp32(values: np.ndarray) -> np.ndarray:
    """fp32 values as a tensor core reads them for tf32: the last 13 of 23 mantissa bits are cut off.

    Triton hands `input_precision="tf32"` operands over as they are, so they are cut, not rounded.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    cut = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(values), values, cut)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar.name == "bf16"


def refuse_bf16(what: str, *arguments: object) -> None:
    for argument in arguments:
        if isinstance(argument, TensorHandle) and is_bf16(argument):
            raise RawBfloat16(f"{what} on bf16 values: expected a cast to fp32 first (.to(tl.float32))")


def install(patches: Patches) -> None:
    """Give the interpreter right bf16 and tf32 until the patches are taken back."""
    for name in ("binary_op", "unary_op"):
        patches.wrap(InterpreterBuilder, name, _refusing_elementwise)
    for name in ("create_fma", "create_clampf", "create_erf", "create_rsqrt"):
        patches.wrap(InterpreterBuilder, name, _refusing(name.removeprefix("create_")))
    patches.wrap(InterpreterBuilder, "create_atomic_rmw", _refusing("an atomic"))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        patches.wrap(operation, "apply_impl", _refusing_reduction)
    patches.wrap(InterpreterBuilder, "cast_impl", _casting)
    patches.wrap(InterpreterBuilder, "create_fp_to_fp", _rounding)
    patches.wrap(InterpreterBuilder, "create_dot", _multiplying)
    # Missing from Triton 3.6.
    patches.set(
        InterpreterBuilder, "get_bf16", lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)
    )


def _refusing(what):
    def wrap(original):
        def call(self, *args):
            refuse_bf16(what, *args)
            return original(self, *args)

        return call

    return wrap


def _refusing_elementwise(original):
    def operation(self, *args):
        refuse_bf16(args[-1].__name__, *args[:-1])
        return original(self, *args)

    return operation


def _refusing_reduction(original):
    def apply_impl(self, values):
        refuse_bf16(
            f"a {type(self).__name__.removesuffix('Ops').lower()}", *(value.handle for value in values)
        )
        return original(self, values)

    return apply_impl


def _casting(original):
    def cast_impl(self, source, target):
        if is_bf16(source) and target.scalar == tl.bfloat16:
            return source
        if is_bf16(source):
            values = TensorHandle(fp32_from_bf16(source.data), tl.float32)
            return values if target.scalar == tl.float32 else original(self, values, target)
        if target.scalar == tl.bfloat16:
            return TensorHandle(bf16_from_fp32(source.data), tl.bfloat16)
        return original(self, source, target)

    return cast_impl


def _rounding(original):
    def create_fp_to_fp(self, source, target, rounding_mode):
        if not is_bf16(source) and target.scalar != tl.bfloat16:
            return original(self, source, target, rounding_mode)
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError("a cast to or from bf16 with another rounding than to nearest even")
        return self.cast_impl(source, target)

    return create_fp_to_fp


def _multiplying(original):
    def create_dot(self, a, b, accumulator, input_precision, *rest):
        (rows, depth), columns = a.data.shape[-2:], b.data.shape[-1]
        if min(rows, depth, columns) < SMALLEST_DOT:
            sizes = f"{rows}x{depth} times {depth}x{columns}"
            raise SmallDot(f"tl.dot of {sizes}: expected no dimension below {SMALLEST_DOT}")
        scalar = a.dtype.scalar
        if scalar not in (tl.bfloat16, tl.float16, tl.float32) or accumulator.data.dtype != np.float32:
            return original(self, a, b, accumulator, input_precision, *rest)
        if scalar == tl.bfloat16:
            left, right = fp32_from_bf16(a.data), fp32_from_bf16(b.data)
        elif scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            left, right = tf32_from_fp32(a.data), tf32_from_fp32(b.data)
        else:
            left, right = a.data.astype(np.float32, copy=False), b.data.astype(np.float32, copy=False)
        return TensorHandle(product(left, right) + accumulator.data, tl.float32)

    return create_dot
