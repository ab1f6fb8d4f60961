"""The compile report: registers, spills, tensor-core instructions and the rest, where they are and where not.

Most kernels are compiled once for all tests, in a process of its own, by functions at the top of the file.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton

from harness import compile_report, fake_driver
from harness.compile_report import Report, compile_kernel, report, resident_programs
from harness.fresh_process import call

PRODUCT = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}
PRODUCT_FP32 = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32"}
COPY = {"source_ptr": "*fp32", "target_ptr": "*fp32", "length": "i32", "shift": "i32"}
FILL = {"target_ptr": "*fp32", "first": "i32", "step": "i32", "value": "fp32"}
TARGETS = (80, 90, 100, "gfx942")


def compile_them_all() -> dict[str, dict]:
    """Reports by "kernel target"."""
    from harness import toys

    sizes = {"M": 64, "N": 64, "K": 64}
    jobs = {}
    for target in TARGETS:
        jobs[f"product {target}"] = toys.product, PRODUCT, sizes | {"PRECISION": "ieee"}, {"target": target}
        jobs[f"copy {target}"] = toys.copy, COPY, {"BLOCK": 256}, {"target": target}
    for target in (80, "gfx942"):
        jobs[f"atomic {target}"] = toys.fill, FILL, {"BLOCK": 256, "ATOMIC": True}, {"target": target}
    jobs["ieee 80"] = (
        toys.product,
        PRODUCT_FP32,
        dict.fromkeys("MNK", 32) | {"PRECISION": "ieee"},
        {"target": 80},
    )
    few = {"target": 80, "maxnreg": 32}
    jobs["spilling 80"] = toys.product, PRODUCT, sizes | {"PRECISION": "ieee"}, few
    looped = PRODUCT | {"blocks": "i32"}
    jobs["spilling in a loop 80"] = toys.sum_of_products, looped, sizes | {"PRECISION": "ieee"}, few
    for barrier in (False, True):
        types, constants = {"x_ptr": "*i32", "out_ptr": "*i32"}, {"BARRIER": barrier}
        jobs[f"barrier={barrier} 80"] = toys.read_back, types, constants, {"target": 80, "num_warps": 2}
    reports = {}
    for name, (kernel, signature, constants, options) in jobs.items():
        reports[name] = dataclasses.asdict(report(compile_kernel(kernel, signature, constants, **options)))
    return reports


def report_a_launch() -> list[dict]:
    """The same kernel, launched and compiled by hand."""
    from harness import toys

    a, b, out = (*torch.zeros(2, 64, 64).bfloat16(), torch.zeros(64, 64))
    constants = {"M": 64, "N": 64, "K": 64, "PRECISION": "ieee"}
    with fake_driver.drive(80) as recorder:
        toys.product[(1,)](a, b, out, **constants, num_warps=8, enable_fp_fusion=True)
    by_hand = compile_kernel(toys.product, PRODUCT, constants, target=80, num_warps=8)
    return [dataclasses.asdict(report(compiled)) for compiled in (*recorder.compilations, by_hand)]


def count_tf32_conversions() -> dict[str, int]:
    from harness import toys

    found = {}
    for precision in ("tf32", "tf32x3"):
        constants = dict.fromkeys("MNK", 32) | {"PRECISION": precision}
        compiled = compile_kernel(toys.product, PRODUCT_FP32, constants, target=80)
        found[precision] = compiled.asm["ptx"].count("cvt.rna.tf32")
    return found


def everything() -> list:
    return [compile_them_all(), report_a_launch(), count_tf32_conversions()]


@pytest.fixture(scope="module")
def compiled() -> list:
    return call(everything)


@pytest.fixture
def reports(compiled) -> dict[str, Report]:
    return {name: Report(**values) for name, values in compiled[0].items()}


@pytest.mark.parametrize(
    ("target", "kind"), [(80, "mma"), (90, "wgmma"), (100, "tcgen05"), ("gfx942", "mfma")]
)
def test_tensor_core_instructions_are_counted_by_kind(reports, target, kind):
    product, copy = reports[f"product {target}"], reports[f"copy {target}"]
    counts = {name: getattr(product, name) for name in ("mma", "wgmma", "tcgen05", "mfma")}
    assert counts.pop(kind) > 0 and set(counts.values()) == {0}
    assert copy.tensor_core == 0 < product.tensor_core
    assert product.target == (target if target == "gfx942" else f"sm_{target}")
    assert (product.tensor_memory > 0) == (target == 100)


def test_an_instruction_count_by_hand(reports):
    # m16n8k16: 4 x 8 x 4 instructions of a warp, divided among four warps.
    assert reports["product 80"].mma == 32
    assert reports["ieee 80"].tensor_core == 0


def test_spills_are_seen(reports):
    normal, spilling = reports["product 80"], reports["spilling 80"]
    assert spilling.registers == 32 < normal.registers
    assert spilling.spills and not normal.spills
    assert spilling.stack_bytes == 4 * spilling.spilled_registers > 0 == normal.stack_bytes
    assert spilling.local_loads > 0 < spilling.local_stores
    assert (normal.local_loads, normal.local_stores) == (0, 0)
    assert not any(made.spills for name, made in reports.items() if not name.startswith("spilling"))


def test_spills_in_a_loop_are_told_from_others(reports):
    assert reports["spilling in a loop 80"].local_in_loops > 0 == reports["spilling 80"].local_in_loops


def test_a_stack_between_loops_is_not_one_in_them():
    """As ptxas does it: put aside before an inner loop and fetched behind it, in an outer one."""
    lines = ["STL [R1], R2", "LDG.E R4, [R2.64]", "FFMA R4, R4, R4, R4", "@P0 BRA 0x10", "LDL.LU R2, [R1]"]
    lines += ["@!P1 BRA 0x0", "EXIT", "BRA 0x70"]

    def local_in_loops(code):
        text = "".join(f"        /*{16 * i:04x}*/    {said} ;   /* 0x0 */\n" for i, said in enumerate(code))
        return compile_report._local_in_loops(text)

    assert local_in_loops(lines) == 0
    assert local_in_loops([*lines[:2], "LDL R4, [R1]", *lines[3:]]) == 1
    assert local_in_loops([*lines[:3], *lines[4:]]) == 2  # without the inner loop they are in one
    # A loop that waits for a barrier hides nothing; a second way back to the same place makes no second loop.
    assert local_in_loops([lines[0], "SYNCS R2, [UR4]", "@P0 BRA 0x10", *lines[4:]]) == 2
    assert local_in_loops(["LDG.E R4, [R2.64]", "@P0 BRA 0x0", "STL [R1], R2", "@P1 BRA 0x0", "EXIT"]) == 1


@pytest.mark.parametrize("target", [80, "gfx942"])
def test_atomics_are_counted(reports, target):
    assert reports[f"atomic {target}"].atomics > 0 == reports[f"copy {target}"].atomics


def test_barriers_and_shared_memory_are_counted(reports):
    assert reports["barrier=True 80"].barriers > reports["barrier=False 80"].barriers
    assert reports["product 80"].shared_bytes == 2 * 64 * 64 * 2
    assert reports["copy 80"].shared_bytes == 0


def test_registers_of_amd(reports):
    made = reports["product gfx942"]
    assert made.registers > reports["copy gfx942"].registers > 0
    assert made.scalar_registers > 0 == reports["product 80"].scalar_registers


def test_a_launch_is_reported_as_it_was_compiled(reports, compiled):
    launched, by_hand = compiled[1]
    assert launched == by_hand
    assert launched["num_warps"] == 8 and launched["mma"] == reports["product 80"].mma // 2


def test_tf32_operands_are_cut_and_not_rounded(compiled):
    """What `harness.numerics` takes for granted: no instruction rounds them on the way to the tensor core."""
    found = compiled[2]
    assert found["tf32"] == 0 < found["tf32x3"]


def test_errors_say_what_is_missing(monkeypatch):
    target = triton.backends.compiler.GPUTarget("cuda", 86, 32)
    made = fake_driver.Compilation(
        "large", {}, {}, frozenset(), dataclasses.make_dataclass("M", ["target", "shared"])(target, 10**6)
    )
    with pytest.raises(ValueError, match="large: not loaded: it takes 1000000 bytes of shared memory"):
        report(made)
    monkeypatch.setenv("TRITON_CUOBJDUMP_PATH", "/nowhere")
    monkeypatch.setattr(vars(type(triton.knobs.nvidia))["cuobjdump"], "default_path", "/nowhere")
    made.asm["cubin"] = b""
    with pytest.raises(RuntimeError, match="Cannot find cuobjdump"):
        report(made)


def takes(registers: int = 32, num_warps: int = 4, shared: int = 0, tensor_memory: int = 0) -> Report:
    numbers = {field.name: 0 for field in dataclasses.fields(Report)} | {
        "kernel": "kernel",
        "target": "sm_90",
    }
    sizes = {
        "registers": registers,
        "num_warps": num_warps,
        "shared_bytes": shared,
        "tensor_memory": tensor_memory,
    }
    return Report(**numbers | sizes)


@pytest.mark.parametrize(
    ("report", "arch", "programs"),
    [
        # Registers: 64 x 32 of a partition's 16384 are 8 warps, 32 of a multiprocessor.
        (takes(registers=64), 80, 8),
        (takes(registers=65), 80, 7),  # 72 x 32 are taken: 7 warps, 28 of a multiprocessor
        (takes(registers=96, num_warps=1), 80, 20),  # 5 warps of each partition; 21 if they were one
        (takes(registers=255, num_warps=8), 90, 1),
        (takes(registers=255, num_warps=16), 90, 0),
        # Warps: 64 or 48 of a multiprocessor.
        (takes(num_warps=4), 90, 16),
        (takes(num_warps=4), 86, 12),
        # Programs.
        (takes(num_warps=1), 90, 32),
        (takes(num_warps=1), 86, 16),
        (takes(num_warps=1), 89, 24),
        # Shared memory: 1 KB more than a program asks for.
        (takes(shared=100 * 1024), 90, 2),
        (takes(shared=100 * 1024), 80, 1),
        (takes(shared=100 * 1024), 86, 0),
        (takes(shared=40 * 1024), 80, 4),
        (takes(shared=40 * 1024 + 1), 80, 3),
        # Tensor memory: 512 columns.
        (takes(tensor_memory=256), 100, 2),
    ],
)
def test_programs_that_fit_a_multiprocessor(report, arch, programs):
    assert resident_programs(report, arch) == programs


def test_programs_are_counted_for_the_architecture_compiled_for():
    assert resident_programs(takes(shared=100 * 1024)) == 2
    assert set(compile_report.MULTIPROCESSORS) == set(fake_driver.LIMITS)
    for target, arch in (("gfx942", None), ("sm_90", 75)):
        with pytest.raises(ValueError, match="arch: expected one of"):
            resident_programs(dataclasses.replace(takes(), target=target), arch)
