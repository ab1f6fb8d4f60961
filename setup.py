"""Maps the folder model/ to the package blip2_kernels.model and builds csrc/; metadata is in pyproject.toml.

What is built: the CPU part where there is a C++ compiler and the environment that is installed into has
torch, the CUDA part where there is nvcc too and that torch knows CUDA. Otherwise the package installs without
it, and says why in one line (pip shows it with -v).

    BLIP2_KERNELS_BUILD=0|cpu|cuda   build nothing, that much and no more, or fail
    CXX, NVCC                        the compilers; default c++, g++ or clang++, and CUDA_HOME's nvcc or any
    TORCH_CUDA_ARCH_LIST             such as "8.0;9.0+PTX"
    MAX_JOBS                         compilations at a time
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODEL_PACKAGES = ["blip2_kernels.model"] + [f"blip2_kernels.model.{name}" for name in find_packages("model")]

ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0+PTX"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: one build serves it and what is newer
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"),
    # Loops become vector instructions: sums may be taken in any order where a pragma says so.
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    # A row of channels is copied where it stands: to call memmove for each takes longer.
    "-fno-tree-loop-distribute-patterns",
    # Products fuse with sums wherever the processor can; where they must not, csrc/platform.h says so.
    "-ffp-contract=fast",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class NotBuilt(Exception):
    """Why there will be no extension, or no CUDA part."""


def find_torch() -> Path:
    """The folder of the torch that the package will run with.

    Under build isolation this process does not see it, but the interpreter it runs in does.
    """
    code = "import importlib.util as u; print((u.find_spec('torch').submodule_search_locations or [''])[0])"
    hidden_by_pip = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden_by_pip}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.sep)
    folder = Path(done.stdout.strip() or ".")
    if done.returncode or not (folder / "version.py").is_file():
        raise NotBuilt(f"{sys.executable} has no torch (where another tool isolates builds: turn that off)")
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    if version and (int(version[1]), int(version[2])) < (2, 11):
        raise NotBuilt(f"torch {version[1]}.{version[2]} is too old, 2.11 or newer is needed")
    return folder


def find_compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in candidates:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise NotBuilt(f"no C++ compiler ({', '.join(candidates)})")


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("NVCC"), *(str(Path(home, "bin", "nvcc")) for home in homes), "nvcc"]
    for name in filter(None, candidates):
        if shutil.which(name):
            return name
    raise NotBuilt("no nvcc (CUDA_HOME, PATH)")


def architecture_flags(nvcc: str) -> list[str]:
    """What nvcc is told to compile for.

    Raises:
        NotBuilt: TORCH_CUDA_ARCH_LIST names something else than compute capabilities.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    flags = []
    for entry in re.split(r"[;,\s]+", asked.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if not match:
            raise NotBuilt(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {entry!r}")
        number = match[1] + match[2]
        if asked == ARCHITECTURES and f"sm_{number}" not in known:
            continue  # an nvcc that is older than this GPU
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@dataclass(frozen=True)
class Toolchain:
    """What csrc is built with; without `nvcc` the CPU part only."""

    torch: Path
    cxx: str
    nvcc: str | None

    @classmethod
    def find(cls, wish: str) -> "Toolchain | None":
        """None where nothing is built, said in one line.

        Raises:
            SystemExit: what was asked for cannot be built.
        """
        if wish not in ("", "0", "cpu", "cuda"):
            raise SystemExit(f"BLIP2_KERNELS_BUILD: expected 0, cpu or cuda, got {wish!r}")
        if wish == "0":
            return None
        try:
            torch, cxx = find_torch(), find_compiler()
        except NotBuilt as reason:
            if wish:
                raise SystemExit(f"BLIP2_KERNELS_BUILD={wish}: {reason}") from None
            say(f"installing without the compiled extension: {reason}")
            return None
        if wish == "cpu":
            return cls(torch, cxx, None)
        try:
            if not wish and not list((torch / "lib").glob("*torch_cuda*")):
                raise NotBuilt("the environment's torch has no CUDA")
            return cls(torch, cxx, find_nvcc())
        except NotBuilt as reason:
            if wish:
                raise SystemExit(f"BLIP2_KERNELS_BUILD={wish}: {reason}") from None
            say(f"building the extension without CUDA: {reason}")
            return cls(torch, cxx, None)


def say(line: str) -> None:
    print(f"blip2-kernels: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Step:
    """One command of the build; a compilation leaves what it included in `output`.d."""

    command: list[str]
    inputs: list[Path]
    output: Path
    compiles: bool = True


def steps(tools: Toolchain, folder: Path, library: Path) -> list[Step]:
    """The commands that make the library of csrc/."""
    common = [STABLE_ABI, *(["-DBLIP2_KERNELS_CUDA"] if tools.nvcc else [])]
    found = []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        output = folder / f"{source.stem}.o"
        command = [*shlex.split(tools.cxx), *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        command += [*common, "-isystem", str(tools.torch / "include")]
        command += ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        found.append(Step(command, [source], output))
    link = shlex.split(tools.cxx)
    if tools.nvcc:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            output = folder / f"{source.stem}.o"
            command = [tools.nvcc, *NVCC_FLAGS, *common, *architecture_flags(tools.nvcc)]
            command += ["-ccbin", shlex.split(tools.cxx)[0]]
            command += ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
            found.append(Step(command, [source], output))
        # nvcc knows where its runtime lies, and links it statically: the library needs no other of CUDA.
        link = [tools.nvcc, "-ccbin", shlex.split(tools.cxx)[0]]
    objects = [step.output for step in found]
    # libtorch is kept though nothing of it is called: it leads to torch's CUDA part.
    keep = ["-Xlinker", "--no-as-needed"] if tools.nvcc else []
    libraries = ["-L", str(tools.torch / "lib"), *keep, "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [*link, "-shared", *map(str, objects), *libraries, "-o", str(library)]
    return [*found, Step(command, objects, library, compiles=False)]


def run(todo: Iterable[Step], folder: Path) -> None:
    """Run the steps: what is out of date and side by side with ninja, else one after the other."""
    ninja = shutil.which("ninja")
    if ninja is None:
        for step in todo:
            print(shlex.join(step.command), flush=True)
            subprocess.run(step.command, check=True)
        return

    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $line", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $line"]
    for step in todo:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append(f"  line = {shlex.join(step.command).replace('$', '$$')}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([ninja, "-C", str(folder), *jobs], check=True)


class BuildLibrary(build_ext):
    """Builds csrc/ into the library that `blip2_kernels/extension.py` loads; no Python headers are needed."""

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp, "csrc").resolve()
        for needed in (folder, library.parent):
            needed.mkdir(parents=True, exist_ok=True)
        try:
            run(steps(TOOLS, folder, library), folder)
        except (NotBuilt, OSError, subprocess.CalledProcessError) as error:
            if WISH:
                raise SystemExit(f"BLIP2_KERNELS_BUILD={WISH}: {error}") from None
            say(f"installing without the compiled extension: its build failed ({error})")


WISH = os.environ.get("BLIP2_KERNELS_BUILD", "")
TOOLS = Toolchain.find(WISH)
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())
EXTENSION = Extension("blip2_kernels._C", SOURCES, py_limited_api=True, optional=not WISH)

setup(
    packages=find_packages(include=["blip2_kernels", "blip2_kernels.*"]) + MODEL_PACKAGES,
    package_dir={"blip2_kernels.model": "model"},
    ext_modules=[EXTENSION] if TOOLS else [],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
