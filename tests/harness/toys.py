"""Small kernels for the tests of the interpreter guard; each does one thing, some of them a thing refused.

To be imported under `interpreter.switched_on()`.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

# ---------------------------------------------------------------------------------------------------- numbers


@triton.jit
def cast(source_ptr, target_ptr, length, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < length
    values = tl.load(source_ptr + lanes, mask=inside)
    tl.store(target_ptr + lanes, values.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def sum_of_products(
    a_ptr, b_ptr, out_ptr, blocks, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for block in range(blocks):
        a = tl.load(a_ptr + m[:, None] * K + k[None, :] + block)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :] + block)
        total += tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def raw(x_ptr, out_ptr, WHAT: tl.constexpr):
    lanes = tl.arange(0, 16)
    x = tl.load(x_ptr + lanes)
    if WHAT == "add":
        y = x + x
    elif WHAT == "negate":
        y = -x
    elif WHAT == "compare":
        y = tl.where(x < x, x, x)
    elif WHAT == "abs of difference":
        y = tl.abs(x - 1.0)
    elif WHAT == "fma":
        y = tl.fma(x, x, x)
    elif WHAT == "clamp":
        y = tl.clamp(x, x, x)
    elif WHAT == "sum":
        y = tl.broadcast_to(tl.sum(x, 0), (16,))
    elif WHAT == "cumsum":
        y = tl.cumsum(x, 0)
    else:
        y = x.to(tl.float32) + 1.0
    if WHAT == "atomic":
        tl.atomic_add(out_ptr + lanes, x)
    else:
        tl.store(out_ptr + lanes, y.to(x.dtype))


@triton.jit
def random_words(key_low, key_high, counter_ptr, out_ptr):
    """The four words of Philox for four counters, through join, reshape and permute."""
    lanes = tl.arange(0, 4)
    c0 = tl.load(counter_ptr + lanes * 4).to(tl.uint32)
    c1 = tl.load(counter_ptr + lanes * 4 + 1).to(tl.uint32)
    c2 = tl.load(counter_ptr + lanes * 4 + 2).to(tl.uint32)
    c3 = tl.load(counter_ptr + lanes * 4 + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, key_low.to(tl.uint32), key_high.to(tl.uint32), 10)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(16)
    tl.store(out_ptr + tl.arange(0, 16), words.to(tl.int64))


@triton.jit
def library(x_ptr, out_ptr, N: tl.constexpr):
    """Functions of Triton's own library, called both ways; and integers that wrap around."""
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, tl.cumsum(x, 0))
    tl.store(out_ptr + N + lanes, tl.softmax(x))
    tl.store(out_ptr + 2 * N, tl.max(x, 0))
    tl.store(out_ptr + 2 * N + 1, x.sum())
    tl.store(out_ptr + 2 * N + 2, tl.argmax(x, 0).to(tl.float32))
    tl.store(out_ptr + 2 * N + 3, tl.cdiv(N + 1, 2))
    wrapped = (lanes + 2147483647).to(tl.uint32) * 4 + 8
    tl.store(out_ptr + 2 * N + 4, tl.sum(wrapped, 0).to(tl.float32))


@triton.jit
def extremes(x_ptr, out_ptr):
    """What NumPy warns of: infinities, NaN, divisions by zero, integers that overflow."""
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(out_ptr, tl.max(x - x, 0))
    tl.store(out_ptr + 1, tl.sum(tl.exp2(x) / (x - x), 0))
    tl.store(out_ptr + 2, tl.sum(tl.log2(-x), 0))
    big = tl.program_id(0) + 2147483647
    tl.store(out_ptr + 3, (big * big).to(tl.float32))


# ---------------------------------------------------------------------------------------------------- memory


@triton.jit
def copy(source_ptr, target_ptr, length, shift, BLOCK: tl.constexpr):
    """target[i] = source[i + shift] for i < length."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < length
    tl.store(target_ptr + lanes, tl.load(source_ptr + lanes + shift, mask=inside), mask=inside)


@triton.jit
def copy_rows(source_ptr, target_ptr, source_stride, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """target[r, c] = source[r, c + offset], the pointers through a permute, a reshape and a function."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointers = tl.trans(_pointers(source_ptr + offset, columns, rows, source_stride))
    values = tl.load(pointers.reshape(ROWS * COLUMNS)).reshape(ROWS, COLUMNS)
    tl.store(_pointers(target_ptr, rows, columns, 1, COLUMNS), values)


@triton.jit
def _pointers(base, first, second, second_stride, first_stride=1):
    return base + first[:, None] * first_stride + second[None, :] * second_stride


@triton.jit
def fill(target_ptr, first, step, value, BLOCK: tl.constexpr, ATOMIC: tl.constexpr = False):
    """target[first + p * step + i] for lanes i of program p."""
    pointers = target_ptr + first + tl.program_id(0) * step + tl.arange(0, BLOCK)
    if ATOMIC:
        tl.atomic_add(pointers, value)
    else:
        tl.store(pointers, value)


@triton.jit
def scatter(target_ptr, index_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(target_ptr + tl.load(index_ptr + lanes), lanes.to(tl.float32))


@triton.jit
def select(a_ptr, b_ptr, out_ptr, which):
    """Load from the one or the other through one pointer."""
    pointer = tl.where(which != 0, a_ptr, b_ptr)
    tl.store(out_ptr, tl.load(pointer + which))


@triton.jit
def copy_described(source_ptr, target_ptr, rows, BLOCK: tl.constexpr):
    """Copy rows of 16 elements, block by block, by tensor descriptors that say how many rows there are."""
    source = tl.make_tensor_descriptor(source_ptr, [rows, 16], [16, 1], [BLOCK, 16])
    target = tl.make_tensor_descriptor(target_ptr, [rows, 16], [16, 1], [BLOCK, 16])
    first = tl.program_id(0) * BLOCK
    target.store([first, 0], source.load([first, 0]))


@triton.jit
def copy_bytes(source_ptr, target_ptr, BYTES: tl.constexpr):
    """Copy memory byte by byte, whatever lies in it."""
    lanes = tl.arange(0, BYTES)
    source, target = source_ptr.to(tl.pointer_type(tl.int8)), target_ptr.to(tl.pointer_type(tl.int8))
    tl.store(target + lanes, tl.load(source + lanes))


@triton.jit
def exchange(target_ptr, index):
    tl.atomic_cas(target_ptr + index, 0, 1)


@triton.jit
def neighbour(x_ptr, out_ptr, distance):
    """Program p writes x[p] and reads x[p + distance], where it is."""
    program = tl.program_id(0)
    other = program + distance
    inside = (other >= 0) & (other < tl.num_programs(0))
    value = tl.load(x_ptr + other, mask=inside, other=0.0)
    tl.store(x_ptr + program, value + 1.0)
    tl.store(out_ptr + program, value)


@triton.jit
def read_by_all(x_ptr, writer):
    """Every program reads one element, and one of them writes it."""
    value = tl.load(x_ptr)
    if tl.program_id(0) == writer:
        tl.store(x_ptr, value + 1.0)


@triton.jit
def count_then(counter_ptr, out_ptr, READ: tl.constexpr, WRITE: tl.constexpr):
    """Every program counts; a read or a write of the counter besides is a race."""
    turn = tl.atomic_add(counter_ptr, 1)
    if READ:
        turn = tl.load(counter_ptr)
    if WRITE:
        tl.store(counter_ptr, turn)
    tl.store(out_ptr + tl.program_id(0), turn)


@triton.jit
def read_back(x_ptr, out_ptr, BARRIER: tl.constexpr):
    lanes = tl.arange(0, 16)
    tl.store(x_ptr + lanes, lanes)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + lanes, tl.load(x_ptr + 15 - lanes))


@triton.jit
def own_place(out_ptr):
    """out[x, y, z] = when this program ran."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    counter_ptr = out_ptr + tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    tl.store(out_ptr + place, tl.atomic_add(counter_ptr, 1))
