"""Builds csrc/ with the host's compiler so that its CUDA kernels run on the CPU (`cuda_on_host.h`).

library = build_operators(folder)           # for torch.ops.load_library: torch.ops.blip2_kernels_on_host
program = build_program(folder, "thread")   # runs random cases under a sanitizer; see cuda_cases.cpp
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NAMESPACE = "blip2_kernels_on_host"

COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = ("-std=c++20", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", f"-I{HARNESS}")


def run(*command: object) -> None:
    """Run a compiler.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}:\n{done.stderr[-4000:]}")


def compile_all(sources: list[Path], folder: Path, flags: tuple[str, ...]) -> list[Path]:
    """Compile each source, CUDA too, as C++; returns the object files."""
    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, COMPILER, "-x", "c++", *FLAGS, *flags, "-c", source, "-o", object_)
            for source, object_ in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    return objects


def build_operators(folder: Path, csrc: Path = CSRC) -> Path:
    """The library of the operators, in which CPU tensors go to the CUDA kernels."""
    torch_folder = Path(torch.__file__).parent
    kernels = sorted(csrc.glob("*_cuda.cu"))
    operators = [csrc / f"{path.stem.removesuffix('_cuda')}.cpp" for path in kernels]
    sources = [csrc / "library.cpp", *operators, *kernels, HARNESS / "last_blocks.cpp"]
    flags = ("-O2", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DBLIP2_KERNELS_CUDA_ON_HOST")
    flags += (f"-DBLIP2_KERNELS_NAMESPACE={NAMESPACE}", "-isystem", str(torch_folder / "include"))
    library = folder / "on_host.so"
    objects = compile_all(sources, folder, flags)
    run(COMPILER, "-shared", *objects, "-L", torch_folder / "lib", "-ltorch_cpu", "-lc10", "-o", library)
    return library


def build_program(folder: Path, sanitizer: str, csrc: Path = CSRC, optimised: bool = True) -> Path:
    """The program that runs random cases, with a thread a CUDA thread, under a sanitizer of the compiler.

    Not optimised, it is built in a quarter of the time, and is slower.
    """
    sources = [HARNESS / "cuda_cases.cpp", *sorted(csrc.glob("*.cu"))]
    flags = ("-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DCUDA_ON_HOST_THREADS")
    flags += ("-O1" if optimised else "-O0", f"-I{csrc}")
    objects = compile_all(sources, folder, flags)
    program = folder / "cases"
    run(COMPILER, f"-fsanitize={sanitizer}", *objects, "-pthread", "-o", program)
    return program


def build_attention_program(folder: Path, sanitizer: str, csrc: Path = CSRC) -> Path:
    """The program that runs random cases of packed_attention, in its build for the baseline."""
    sources = [HARNESS / "attention_cases.cpp", csrc / "packed_attention_cpu.cpp"]
    flags = ("-O1", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{csrc}")
    flags += ("-fopenmp-simd", "-DBLIP2_KERNELS_TARGET=BASELINE", f"-I{HARNESS / 'without_torch'}")
    objects = compile_all(sources, folder, flags)
    program = folder / "attention_cases"
    run(COMPILER, f"-fsanitize={sanitizer}", *objects, "-o", program)
    return program
