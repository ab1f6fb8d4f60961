"""The launch path of the attention kernels, compiled for a GPU that is not there (`harness.fake_driver`).

What is compiled anew, and what is not: never for another batch size, row count, text start or number of
images; always for a pointer that is not a multiple of 16 bytes or a number beyond 32 bits. A launch like an
earlier one must reach the GPU without Triton's own analysis of its arguments. The fake driver also refuses
every launch of a kernel with arguments it was not compiled for.

Kernels are compiled in processes of their own, by the functions in the first half of this file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from cross_cases import CrossCase
from harness import fake_driver
from harness.fresh_process import call
from self_cases import C, SelfCase, U

from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops import launching
from blip2_kernels.ops.cross_attention import launch as cross_launch
from blip2_kernels.ops.self_attention import launch as self_launch
from blip2_kernels.ops.self_attention.triton import op as self_op

pytestmark = pytest.mark.compiles

HALF = torch.float16
PAST_32_BITS = 2**31

# -------------------------------------------------------------------------- what runs in the other processes


class Counts(NamedTuple):
    """What a call did.

    Attributes:
        compiled: kernels made ready, by name.
        bound: times Triton's own launch analysed a kernel's arguments.
        launched: kernels handed to the GPU, by name.
    """

    compiled: list[str]
    bound: int
    launched: list[str]


class Gpu:
    """A GPU of an architecture that counts what calls do."""

    def __init__(self, recorder: fake_driver.Recorder) -> None:
        self.recorder = recorder
        self.bound = 0

    def counts(self, function: Callable, *args: object) -> Counts:
        made, bound, launched = len(self.recorder.compilations), self.bound, len(self.recorder.launches)
        function(*args)
        return Counts(
            [compilation.name for compilation in self.recorder.compilations[made:]],
            self.bound - bound,
            [launch.kernel for launch in self.recorder.launches[launched:]],
        )


@contextmanager
def gpu(arch: int) -> Iterator[Gpu]:
    """Let CPU tensors count as those of a GPU of this architecture, with no kernel kept from another."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def counted(kernel, *args, **kwargs):
        found.bound += 1
        return run(kernel, *args, **kwargs)

    with (
        fake_driver.drive(arch) as recorder,
        mock.patch.object(JITFunction, "run", counted),
        mock.patch.object(launching, "architecture", lambda device: arch),
        mock.patch.object(launching, "processors", lambda device: fake_driver.LIMITS[arch].processors),
        mock.patch.object(launching, "_compiled", {}),
        mock.patch.object(launching, "_too_large", {}),
    ):
        found = Gpu(recorder)
        yield found


def run_self(
    case: SelfCase, *, layer: int = 7, change: Callable | None = None, places: dict | None = None
) -> None:
    """Forward and backward; `change` replaces q, k and v, `places` host numbers of the layouts."""
    q_layout, kv_layout, _ = case.layouts()
    q, k, v = case.tensors(torch.Generator().manual_seed(0))
    if change is not None:
        q, k, v = (change(t) for t in (q, k, v))
    rows, sizes = self_op._flatten(q_layout, kv_layout, AttentionMask(case.modes))
    key = torch.tensor(1) if case.dropout else None
    scale = case.scale or 0.125
    options = (*rows, key, list(sizes._replace(**(places or {}))), scale, case.dropout, layer)
    out, lse = torch.ops.blip2_kernels.self_attention(q, k, v, *options)
    torch.ops.blip2_kernels.self_attention_backward(torch.empty_like(out), q, k, v, lse, *options)


def run_cross(case: CrossCase, *, layer: int = 7, change: Callable | None = None) -> None:
    """Forward and backward; `change` replaces q, k and v."""
    q, k, v = case.tensors(torch.Generator().manual_seed(0))
    if change is not None:
        q, k, v = (change(t) for t in (q, k, v))
    given = case.options()
    visible = given.get("image_lengths")
    if case.visible == "mask":
        visible = given["image_mask"].to(torch.uint8)
    key = row_keys = None
    if case.dropout:
        key, row_keys = torch.tensor(1), torch.zeros(case.samples, case.num_queries, dtype=torch.int32)
    options = (given.get("image_index"), visible, row_keys, key, case.scale or 0.125, case.dropout, layer)
    out, lse = torch.ops.blip2_kernels.cross_attention(q, k, v, *options, True)
    torch.ops.blip2_kernels.cross_attention_backward(torch.empty_like(out), q, k, v, lse, *options)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same, one element behind a multiple of 16 bytes."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return buffer[1:].view(tensor.shape)


def oversized(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, with a first stride that passes 32 bits; its memory is never touched."""
    stride = -(-PAST_32_BITS // (tensor.shape[0] - 1) // 16) * 16
    inner = tensor[0].contiguous().stride()
    buffer = torch.empty(stride * tensor.shape[0], dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, (stride, *inner))


SELF = {
    "fp32": SelfCase(head_dim=16),
    "fp16": SelfCase(head_dim=16, dtype=HALF),
    "bf16": SelfCase(head_dim=16, dtype=torch.bfloat16),
    "queries alone": SelfCase((), lengths=(), head_dim=16, dtype=HALF),
    "text alone": SelfCase(num_queries=0, head_dim=16, dtype=HALF),
    "unimodal": SelfCase((U,), head_dim=16, dtype=HALF),
    "causal": SelfCase((C,), head_dim=16, dtype=HALF),
    "two parts": SelfCase((U, C), lengths=((7, 31),) * 2, head_dim=16, dtype=HALF),
    "dropout": SelfCase((U, C), lengths=((7, 31),) * 2, head_dim=16, dtype=HALF, dropout=0.1),
    "blocks": SelfCase(lengths=((7, 130),), width=130, head_dim=16, dtype=HALF),
    "blocks fp32": SelfCase((C,), lengths=((7, 130),), width=130, head_dim=16),
    "blocks dropout": SelfCase(
        (U, C), lengths=((7, 130),) * 2, width=130, head_dim=16, dtype=HALF, dropout=0.1
    ),
    "padded": SelfCase(padded=True, head_dim=16, dtype=HALF),
    "plain": SelfCase(memory="plain", head_dim=16, dtype=HALF),
    "queries attend": SelfCase(select="none", head_dim=16, dtype=HALF),
    "first rows attend": SelfCase(select="first", head_dim=16, dtype=HALF),
    "one head": SelfCase(heads=1, head_dim=16, dtype=HALF),
    "one query": SelfCase(num_queries=1, head_dim=16, dtype=HALF),
    "one token": SelfCase(lengths=((1, 1),), head_dim=16, dtype=HALF),
    "head dim 24": SelfCase(heads=2, head_dim=24, dtype=HALF),
    "head dim 128": SelfCase(head_dim=128, dtype=HALF),
}

CROSS = {
    "fp32": CrossCase(head_dim=16),
    "fp16": CrossCase(head_dim=16, dtype=HALF),
    "bf16": CrossCase(head_dim=16, dtype=torch.bfloat16),
    "plain": CrossCase(head_dim=16, dtype=HALF, memory="plain"),
    "lengths": CrossCase(head_dim=16, dtype=HALF, visible="lengths"),
    "mask": CrossCase(head_dim=16, dtype=HALF, visible="mask"),
    "dropout": CrossCase(head_dim=16, dtype=HALF, dropout=0.1),
    "grouped": CrossCase((0, 1, 1, 0), samples=4, head_dim=16, dtype=HALF),
    "grouped fp32": CrossCase((0, 1, 1, 0), samples=4, head_dim=16),
    "grouped dropout": CrossCase(
        (0, 1, 1, 0), samples=4, head_dim=16, dtype=HALF, dropout=0.1, visible="mask"
    ),
    "one head": CrossCase(head_dim=16, dtype=HALF, heads=1),
    "one query": CrossCase(head_dim=16, dtype=HALF, num_queries=1),
    "many queries": CrossCase(head_dim=16, dtype=HALF, num_queries=70),
    "head dim 24": CrossCase(head_dim=24, dtype=HALF),
    "head dim 128": CrossCase(head_dim=128, dtype=HALF),
    "chunks": CrossCase(samples=200, images=200, tokens=520, head_dim=16, dtype=HALF),
}
SPLIT = {
    "split": CrossCase(tokens=520, head_dim=16, dtype=HALF),
    "split grouped": CrossCase((0, 1, 1, 0), samples=4, tokens=520, head_dim=16, dtype=HALF),
}


def self_variations(case: SelfCase) -> dict[str, Callable[[], None]]:
    """Calls that no kernel may be compiled for again: by what they change."""
    longest = max((count for counts in case.lengths for count in counts), default=0)
    calls = {}
    for samples in (1, 3, 16):
        # The longest text stays in its power-of-two bucket; none is longer than before.
        counts = tuple(max(longest - 2 * (i % 2), min(longest, 1)) for i in range(samples))
        other = replace(case, lengths=(counts,) * len(case.lengths))
        if case.lengths:
            calls[f"{samples} samples"] = lambda other=other: run_self(other)
    calls["layer"] = lambda: run_self(case, layer=0)
    calls["scale"] = lambda: run_self(replace(case, scale=1.0))
    if case.dropout:
        calls["dropout"] = lambda: run_self(replace(case, dropout=0.5))
    starts = [name for name in self_op.Sizes._fields if name.endswith("_start")]
    for start in (0, 1, 17, 4096):
        calls[f"text from row {start}"] = lambda at=start: run_self(case, places=dict.fromkeys(starts, at))
    return calls


def cross_variations(case: CrossCase) -> dict[str, Callable[[], None]]:
    """Calls that no kernel may be compiled for again: by what they change."""
    calls = {}
    for samples in (1, 3, 16):
        if case.samples > 16:
            samples += case.samples
        images = samples if case.index is None else max(samples // 2, 1)
        index = None if case.index is None else tuple(i % images for i in range(samples))
        other = replace(case, samples=samples, images=images, index=index)
        calls[f"{samples} samples of {images} images"] = lambda other=other: run_cross(other)
    first = case.tokens // cross_launch.CHUNK * cross_launch.CHUNK
    for tokens in (first + 1, first + 16, first + 257):
        calls[f"{tokens} tokens"] = lambda tokens=tokens: run_cross(replace(case, tokens=tokens))
    calls["layer"] = lambda: run_cross(case, layer=0)
    calls["scale"] = lambda: run_cross(replace(case, scale=1.0))
    if case.dropout:
        calls["dropout"] = lambda: run_cross(replace(case, dropout=0.5))
    return calls


def drive_cases(arch: int, kind: str, names: list[str]) -> dict[str, dict]:
    """For each case: its first call, the same again, and the calls that differ in what must not matter."""
    found = {}
    run, cases, variations = {
        "self": (run_self, SELF, self_variations),
        "cross": (run_cross, CROSS | SPLIT, cross_variations),
    }[kind]
    for name in names:
        with gpu(arch) as device:
            counts = {"first": device.counts(run, cases[name]), "again": device.counts(run, cases[name])}
            for what, function in variations(cases[name]).items():
                counts[what] = device.counts(function)
                counts[f"{what}, again"] = device.counts(function)
            found[name] = {what: made._asdict() for what, made in counts.items()}
    return found


def drive_pointers(arch: int) -> dict[str, dict]:
    """What misaligned and oversized tensors, and rows past 32 bits, make of kernels that are there."""
    starts = {name: PAST_32_BITS + 1 for name in self_op.Sizes._fields if name.endswith("_start")}
    calls = {
        "self": (
            run_self,
            SELF["dropout"],
            {"misaligned": {"change": misaligned}, "starts": {"places": starts}},
        ),
        "cross": (run_cross, CROSS["grouped"], {"misaligned": {"change": misaligned}}),
    }
    found = {}
    for kind, (run, case, changes) in calls.items():
        changes["oversized"] = {"change": oversized}
        with gpu(arch) as device:
            plain = device.counts(run, case)
            kernels = {launch.kernel: launch for launch in device.recorder.launches}
            found[kind] = {"plain": plain.compiled}
            for name, change in changes.items():
                first = device.counts(lambda: run(case, **change))  # noqa: B023
                again = device.counts(lambda: run(case, **change))  # noqa: B023
                plain_again = device.counts(run, case)
                lost, wide = [], []
                for launch in device.recorder.launches:
                    made, before = launch.compilation, kernels[launch.kernel].compilation
                    lost += sorted(before.divisible - made.divisible)
                    wide += [key for key, kind_of in made.signature.items() if kind_of == "i64"]
                    wide += ["WIDE"] * bool(made.constants.get("WIDE"))
                found[kind][name] = {
                    "first": first._asdict(),
                    "again": again._asdict(),
                    "plain again": plain_again._asdict(),
                    "lost": sorted(set(lost)),
                    "wide": sorted(set(wide)),
                }
    return found


def drive_too_large() -> dict[str, dict]:
    """On a GPU with little shared memory: a configuration too large for it before one that fits; then two."""
    large = launching.Config.of(8, 4, BLOCK_M=128, BLOCK_N=128, TEXT_M=128, TEXT_N=128)
    small = launching.Config.of(4, 1, BLOCK_M=32, BLOCK_N=32, TEXT_M=32, TEXT_N=32)
    larger = replace(large, num_stages=5)
    cross_large, cross_small, cross_larger = (
        replace(config, blocks=config.blocks[:2]) for config in (large, small, larger)
    )
    self_case = SelfCase(lengths=((7, 130),), width=130, head_dim=128, heads=1, dtype=HALF)
    cross_case = CrossCase(head_dim=128, tokens=257, heads=1, dtype=HALF)

    def run_self_forward() -> None:
        layout = self_case.layouts()[0]
        q, k, v = self_case.tensors(torch.Generator().manual_seed(0))
        rows, sizes = self_op._flatten(layout, layout, AttentionMask(self_case.modes))
        torch.ops.blip2_kernels.self_attention(q, k, v, *rows, None, list(sizes), 0.1, 0.0, 0)

    def run_cross_forward() -> None:
        tensors = cross_case.tensors(torch.Generator().manual_seed(0))
        options = (None, None, None, None, 0.1, 0.0, 0, True)
        torch.ops.blip2_kernels.cross_attention(*tensors, *options)

    found = {}
    for name, table, run, too_large, fits in (
        ("self", self_launch.FORWARD, run_self_forward, (large, larger), small),
        ("cross", cross_launch.FORWARD, run_cross_forward, (cross_large, cross_larger), cross_small),
    ):
        with gpu(86) as device:
            with table.overridden(too_large[0], fits):
                first, again = device.counts(run), device.counts(run)
            rows = [launch.args["BLOCK_M"] for launch in device.recorder.launches]
            launching._too_large.clear()
            said = ""
            with table.overridden(*too_large):
                try:
                    run()
                except RuntimeError as error:
                    said = str(error)
            found[name] = {
                "first": first._asdict(),
                "again": again._asdict(),
                "rows": rows,
                "said": said,
                "configs": [str(config) for config in too_large],
            }
    return found


def drive_faults(arch: int) -> dict[str, list[Counts]]:
    """Launches that make a size part of what is compiled: as a number Triton specialises, as a constexpr."""
    from harness import toys

    config = launching.Config.of(2, 1)

    def specialised(length: int) -> None:
        args = (torch.zeros(256), torch.zeros(256), length, 0)
        launching.launch(toys.copy, (2,), args, {"BLOCK": 128}, config)

    def constant(length: int) -> None:
        args = (torch.zeros(256), torch.zeros(256), 100, 0)
        launching.launch(toys.copy, (2,), args, {"BLOCK": length}, config)

    found = {}
    for name, run, lengths in (
        ("specialised", specialised, (100, 112, 1)),
        ("constant", constant, (64, 128)),
    ):
        with gpu(arch) as device:
            found[name] = [device.counts(run, length)._asdict() for length in lengths]
            found[f"{name}, again"] = [device.counts(run, lengths[0])._asdict()]
    return found


# -------------------------------------------------------------------------------------------------- the tests

QUICK = [("self", ["two parts"]), ("cross", ["grouped", "one query"])]


def check_cases(found: dict[str, dict]) -> None:
    for name, counts in found.items():
        first = counts["first"]
        assert first["compiled"] and len(first["launched"]) >= 2, name
        # What is compiled is bound once. Forward and backward may group the samples by the same kernel.
        assert first["bound"] == len(first["compiled"]), name
        assert set(first["compiled"]) == set(first["launched"]), name
        for what, made in counts.items():
            if what == "first":
                continue
            assert made["compiled"] == [], f"{name}: recompiled for {what}: {made['compiled']}"
            assert made["launched"], f"{name}: {what} launched nothing"
        assert counts["again"]["launched"] == first["launched"], name


def check_bindings(found: dict[str, dict]) -> None:
    """A call like an earlier one must not go through Triton's own launch."""
    for name, counts in found.items():
        for what, made in counts.items():
            if what.endswith("again"):
                assert made["bound"] == 0, f"{name}: {what} went through Triton's binder"


@pytest.mark.parametrize(("kind", "names"), QUICK, ids=[kind for kind, _ in QUICK])
def test_nothing_is_compiled_again_for_another_batch(kind, names):
    found = call(drive_cases, 90, kind, names)
    check_cases(found)
    check_bindings(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_nothing_is_compiled_again_for_another_batch_in_any_specialisation(kind):
    assert len(SELF) + len(CROSS) + len(SPLIT) >= 30
    found = call(drive_cases, 90, kind, list({"self": SELF, "cross": CROSS}[kind]))
    check_cases(found)
    check_bindings(found)
    # The cases differ in what is compiled, so each is a specialisation of its own.
    if kind == "self":
        assert "backward_rows_kernel" in found["blocks"]["first"]["launched"]
        assert "backward_tile_kernel" in found["fp16"]["first"]["launched"]
    else:
        assert found["fp16"]["first"]["launched"] == ["forward_kernel", "backward_rows_kernel"]
        assert "backward_keys_kernel" in found["many queries"]["first"]["launched"]
        assert found["grouped"]["first"]["launched"].count("group_kernel") == 2
        assert "merge_kernel" not in found["chunks"]["first"]["launched"]


@pytest.fixture(scope="module")
def split() -> dict[str, dict]:
    return call(drive_cases, 90, "cross", list(SPLIT))


@pytest.mark.slow
def test_nothing_is_compiled_again_for_split_chunks(split):
    assert all("merge_kernel" in counts["first"]["launched"] for counts in split.values())
    check_cases(split)


@pytest.mark.slow
def test_split_chunks_are_launched_quickly(split):
    check_bindings(split)


@pytest.fixture(scope="module")
def pointers() -> dict[str, dict]:
    return call(drive_pointers, 90)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_misaligned_pointer_gets_a_kernel_of_its_own(pointers, kind):
    found = pointers[kind]["misaligned"]
    assert {"q_ptr", "k_ptr", "v_ptr"} <= set(found["lost"])
    # The grouping kernel sees none of these pointers.
    expected = [name for name in pointers[kind]["plain"] if name != "group_kernel"]
    assert found["first"]["compiled"] == expected
    for what in ("again", "plain again"):
        assert found[what]["compiled"] == [] and found[what]["bound"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [("self", "starts", "kv_start"), ("self", "oversized", "WIDE"), ("cross", "oversized", "WIDE")],
)
def test_what_passes_32_bits_gets_a_kernel_of_its_own(pointers, kind, change, expected):
    found = pointers[kind][change]
    assert found["first"]["compiled"] and expected in found["wide"]
    for what in ("again", "plain again"):
        assert found[what]["compiled"] == [] and found[what]["bound"] == 0


@pytest.mark.slow
def test_a_configuration_too_large_for_the_gpu_gives_way_then_is_named():
    for name, found in call(drive_too_large).items():
        first = found["first"]
        assert first["compiled"] == ["forward_kernel"] * 2 and first["launched"] == ["forward_kernel"], name
        # What did not fit once is not tried again.
        assert found["again"]["compiled"] == [] and found["again"]["bound"] == 0, name
        assert found["rows"] == [32, 32], name
        assert all(
            f"({config}): out of resource: shared memory" in found["said"] for config in found["configs"]
        )


def test_a_planted_size_among_what_is_compiled_is_seen():
    found = call(drive_faults, 90)
    assert [len(made["compiled"]) for made in found["specialised"]] == [1, 1, 1]
    assert [len(made["compiled"]) for made in found["constant"]] == [1, 1]
    for name in ("specialised", "constant"):
        report = {"first": found[name][0] | {"launched": ["copy"] * 2, "bound": 2, "compiled": ["copy"] * 2}}
        report |= {"again": report["first"] | {"compiled": []}, "other batch": found[name][1]}
        with pytest.raises(AssertionError, match="again went through Triton's binder"):
            check_bindings({name: report})
        with pytest.raises(AssertionError, match="recompiled for other batch"):
            check_cases({name: report})
        assert found[f"{name}, again"][0]["bound"] == 0


def test_configurations_that_do_not_fit_are_named_every_time(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(launching, "_too_large", {})
    configs = launching.Config.of(8, BLOCK_M=128), launching.Config.of(4, BLOCK_M=64)

    def run(config: launching.Config) -> None:
        raise OutOfResources(1000 * config["BLOCK_M"], 7, "shared memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"toy: expected .*BLOCK_M=128.*128000.*BLOCK_M=64.*64000"):
            launching.first_that_fits("toy", torch.device("cpu"), (), configs, run)
