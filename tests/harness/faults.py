"""What the interpreter guard refuses, by name."""


class KernelFault(Exception):
    """A kernel did something that is wrong, or undefined, on a GPU; the traceback ends in its own line."""


class OutOfBounds(KernelFault):
    """A lane that is not masked touches memory outside the tensor whose pointer it was computed from."""


class DuplicateStore(KernelFault):
    """Two lanes of one store write the same element: which value stays is undefined."""


class Race(KernelFault):
    """Two programs touch the same element, at least one of them writes it, and nothing orders them.

    Also a program that reads what it wrote itself before a `tl.debug_barrier()`: other threads wrote it.
    """


class RawBfloat16(KernelFault):
    """Arithmetic on bf16 values: each operation would round to 8 bits. Kernels compute in fp32."""


class SmallDot(KernelFault):
    """`tl.dot` with a dimension below 16, which not every supported Triton and GPU can do."""
