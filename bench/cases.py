"""What a benchmark is made of: a case, the peers that compute it, and the setting they run in.

A file of cases is called bench_<group>.py and has a dictionary `CASES` of `Spec` by name; bench/conftest.py
makes one benchmark of every peer of every case. A case is built when its turn comes, not before.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from measure import Call
from torch import Tensor

Result = list[Tensor]
OURS = "ours"
SHORT, FULL, NAMED = range(3)
"""When a case runs: always, with `--full`, or when `--only` names it."""


@dataclass(frozen=True)
class Setting:
    """What holds for all cases.

    Attributes:
        device: "cuda" or "cpu".
        tiny: small models and batches, to try the benchmarks themselves.
        compiles: peers of torch.compile take part.
        autotune: those in its mode "max-autotune" too.
        capture_steps: training steps are captured in CUDA graphs.
        full: there is time for more peers.
    """

    device: str = "cpu"
    tiny: bool = False
    compiles: bool = True
    autotune: bool = False
    capture_steps: bool = False
    full: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What the device computes in unless a case says otherwise."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def few(self, count: int, tiny: int) -> int:
        return min(count, tiny) if self.tiny else count

    def randn(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers that depend on the seed and the device alone."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32)
        return drawn.to(dtype or self.dtype)

    def without_compiler(self) -> str | None:
        """Why peers of torch.compile stay away."""
        return None if self.compiles else "not asked for: --no-compile"

    def empty_cache(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    Attributes:
        calls: the call on one or several sets of inputs.
        check: what it must agree on; default the first call's result.
        unchecked: nothing to compare (a part of another peer's work).
        part: of the case's whole: its share of the time is told, not a ratio.
        captured: its kernels are also timed alone, in a CUDA graph.
        host: the time until its launches are out is taken.
        graph: the call replays a CUDA graph, so its time is that of kernels.
        counted: its FLOPs and peak memory are (not those of a replayed graph, which say nothing).
        floor: what the check allows beside rounding, where it is not the case's (a lower precision).
    """

    calls: Sequence[Call]
    check: Callable[[], Result] | None = None
    unchecked: bool = False
    part: bool = False
    captured: bool = False
    host: bool = False
    graph: bool = False
    counted: bool = True
    floor: float | None = None

    def result(self) -> Result:
        return self.check() if self.check is not None else [self.calls[0]()]


@dataclass(frozen=True)
class Case:
    """Peers that compute the same.

    Attributes:
        peers: by name; the reason instead of one that cannot take part here.
        truth: what all must give, in higher precision.
        plain: what plain PyTorch gives in the peers' precision.
        shape: the sizes that tell it from its neighbours, for reports and fits.
        dtype: that it is computed in.
        floor: error allowed beside twice that of `plain`, as a share of the norm.
        order: of the norm in which results are compared.
        moved: bytes that must be moved whatever the algorithm.
        operations: floating-point operations; None where those of `ours` are counted.
        rounds: part of the rounds asked for.
        clean: frees what a call leaves behind (gradients).
    """

    peers: Mapping[str, Peer | str]
    truth: Callable[[], Result] | None = None
    plain: Callable[[], Result] | None = None
    shape: Mapping[str, int | float | str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    floor: float = 1e-3
    order: float = float("inf")
    moved: float = 0.0
    operations: float | None = None
    rounds: float = 1.0
    clean: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Spec:
    """A case before it is built.

    Attributes:
        group: what it is shown with.
        build: makes it.
        peers: names of all its peers, present or not.
        cpu, cuda: when it runs there: SHORT, FULL or NAMED.
        ours: the peer that the others are measured by.
    """

    group: str
    build: Callable[[Setting], Case]
    peers: tuple[str, ...]
    cpu: int = NAMED
    cuda: int = SHORT
    ours: str = OURS


# ------------------------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class Way:
    """A way to compute an operator's result.

    Attributes:
        compute: takes the tensors of `prepare` and returns the result, one tensor or several.
        prepare: makes them of the operator's inputs, untimed.
        read: makes the result of what was computed, untimed.
        counted: FLOPs and memory can be counted (not of what was compiled: counters do not see into it).
    """

    compute: Callable[..., Tensor | Sequence[Tensor]]
    prepare: Callable[..., Sequence[Tensor]] = lambda *tensors: tensors
    read: Callable[..., Tensor] = lambda out: out
    counted: bool = True


def listed(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def without_gradients(compute: Callable[..., object], tensors: Sequence[Tensor]) -> object:
    with torch.no_grad():
        return compute(*tensors)


def with_backward(compute: Callable[..., object], tensors: Sequence[Tensor]) -> Call:
    """The call and the gradients of all its tensors, for random output gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    grads: list[Tensor] = []

    def call() -> object:
        outs = listed(compute(*leaves))
        if not grads:  # drawn when first called: nothing computes while a case is built
            grads.extend(torch.randn_like(out) for out in outs)
        return torch.autograd.grad(outs, leaves, grads)

    return call


def input_sets(
    draw: Callable[[], Sequence[Tensor]], moved: float, setting: Setting
) -> list[Sequence[Tensor]]:
    """Enough sets of inputs that none is still in the last cache when its turn comes again."""
    cache = 2**25
    if setting.device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(12, round(3 * cache / moved)))
    return [draw() for _ in range(setting.few(count, 2))]


def results_of(way: Way, inputs: Sequence[Tensor], backward: bool) -> Result:
    """The result, and with `backward` the gradients of the inputs for fixed output gradients."""
    if not backward:
        with torch.no_grad():
            return [way.read(way.compute(*way.prepare(*inputs)))]
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = way.read(way.compute(*way.prepare(*leaves)))
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float32).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def operator_case(
    setting: Setting,
    draw: Callable[[], Sequence[Tensor]],
    reference: Callable[..., Tensor],
    ways: Mapping[str, Way | str],
    *,
    backward: bool,
    moved: tuple[float, float],
    operations: tuple[float, float],
    shape: Mapping[str, int | float | str],
) -> Case:
    """A case of an operator's forward, or of its forward and backward together.

    Args:
        draw: makes its inputs.
        reference: the result of inputs in any dtype; the truth in fp64 on a CPU and in fp32 on a GPU.
        ways: by peer.
        moved: bytes that any kernel must move, forward; backward.
        operations: floating-point operations, forward; backward.
        shape: as `Case` has it.
    """
    sets = input_sets(draw, moved[0], setting)
    dtype = sets[0][0].dtype
    exact = torch.float64 if setting.device == "cpu" else torch.float32
    plain = Way(reference)

    def peer(way: Way) -> Peer:
        made = [way.prepare(*(t.detach() for t in inputs)) for inputs in sets]
        make = with_backward if backward else partial(partial, without_gradients)
        calls = [make(way.compute, tensors) for tensors in made]
        check = partial(results_of, way, sets[0], backward)
        return Peer(calls, check, captured=True, host=True, counted=way.counted)

    peers: dict[str, Peer | str] = {}
    for name, way in ways.items():
        try:
            peers[name] = way if isinstance(way, str) else peer(way)
        except Exception as error:  # the first call of a backward: said where its result would be checked
            peers[name] = replace(Peer([partial(_raise, error)]), counted=False)
    return Case(
        peers,
        truth=lambda: results_of(plain, [t.to(exact) for t in sets[0]], backward),
        plain=lambda: results_of(plain, sets[0], backward),
        shape={**shape, "direction": "forward+backward" if backward else "forward"},
        dtype=dtype,
        floor=1e-5 if dtype == torch.float32 else 1e-2,
        moved=sum(moved[: 1 + backward]),
        operations=sum(operations[: 1 + backward]),
    )


def _raise(error: Exception) -> object:
    raise error
