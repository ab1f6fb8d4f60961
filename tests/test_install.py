"""Installation as a user does it: `pip install .` and `-e .` in fresh environments, then the benchmarks."""

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from processes import clean_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = shutil.ignore_patterns(
    *(".git", ".venv", "build", "*.so", "*.egg-info", "runs", "__pycache__", ".*_cache"),
    *(".benchmarks", ".hypothesis"),
)


def run(*command: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


class Environment:
    """A fresh venv that sees the packages we depend on, but not this package, in the one the tests run in.

    torch alone takes minutes to install. A line in a .pth file puts the other site-packages on the path
    without running its own .pth files, so an editable install of this package there stays invisible. It comes
    after the venv's own, so what is installed here is what is found.
    """

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = Path(
            run(self.python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip()
        )
        (self.site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        # The console script as pip writes it: unlike `python -m pytest` it leaves the working directory out.
        script = self.bin / "pytest"
        script.write_text(
            f"#!{self.python}\nimport sys\nfrom pytest import console_main\nsys.exit(console_main())\n"
        )
        script.chmod(0o755)

    def pip_install(self, *arguments: object, cwd: Path) -> None:
        # --ignore-installed: pip must not take the environment behind the .pth file for its own.
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "-q")
        run(*pip, "--no-deps", "--ignore-installed", *arguments, cwd=cwd)


@pytest.fixture
def checkout(tmp_path) -> Path:
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=LEFT_BEHIND)


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "env")


def test_installed_package_serves_the_benchmarks_of_a_checkout(checkout, environment, tmp_path):
    """`pytest` finds the installed package, `python -m pytest` the checkout; both find the model."""
    where = "import blip2_kernels, blip2_kernels.model as m; print(blip2_kernels.__file__); print(m.__file__)"
    assert run(environment.python, "-c", where, cwd=tmp_path, check=False).returncode != 0, (
        "not installed yet"
    )
    environment.pip_install(".", cwd=checkout)
    for artefact in ("build", "blip2_kernels.egg-info"):
        shutil.rmtree(checkout / artefact, ignore_errors=True)

    installed = environment.site / "blip2_kernels"
    expected = [str(installed / "__init__.py"), str(installed / "model" / "__init__.py")]
    assert run(environment.python, "-c", where, cwd=tmp_path).stdout.splitlines() == expected
    assert not (environment.site / "model").exists(), "model/ must not become a top-level package"
    assert not (environment.site / "tests").exists() and not (environment.site / "bench").exists()
    for folder, package in (("blip2_kernels", installed), ("model", installed / "model")):
        for path in (checkout / folder).rglob("*.py"):
            copy = package / path.relative_to(checkout / folder)
            assert copy.is_file() and copy.read_bytes() == path.read_bytes(), f"not installed: {path}"
    assert (installed / "py.typed").is_file()

    assert "demo" in run(environment.bin / "blip2-kernels", "--help", cwd=tmp_path).stdout

    (checkout / "bench" / "bench_where.py").write_text(
        "import sys, blip2_kernels, blip2_kernels.model as m\n"
        "def bench_where():\n"
        "    print('WHERE', blip2_kernels.__file__, m.__file__, file=sys.__stderr__)\n"
    )
    chosen = ("--only=similarity-100x100", "-k", "where or (similarity and ours)")
    arguments = ("bench/", *chosen, "--benchmark-disable", "-s", "-p", "no:cacheprovider")
    for command, source in (
        ([environment.bin / "pytest"], expected),
        (
            [environment.python, "-m", "pytest"],
            [str(checkout / "blip2_kernels" / "__init__.py"), str(checkout / "model" / "__init__.py")],
        ),
    ):
        done = run(*command, *arguments, cwd=checkout)
        assert f"WHERE {' '.join(source)}" in done.stderr, f"{command}: {done.stderr}"
        assert " passed" in done.stdout and "failed" not in done.stdout and "skipped" not in done.stdout


@pytest.mark.compiles
@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler (c++, g++)")
def test_the_wheel_brings_its_operators(checkout, environment, tmp_path, pytestconfig):
    """It passes their tests in a fresh environment, and works with another torch, that of --other-python."""
    wheels = tmp_path / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ".")
    run(*pip, cwd=checkout)
    (wheel,) = wheels.iterdir()
    assert "-cp310-abi3-" in wheel.name
    environment.pip_install(wheel, cwd=tmp_path)
    tests = shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=LEFT_BEHIND)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # What every dtype, width and number of rows gives does not depend on where the library was installed.
    chosen = ("-k", "random_cases or opcheck or refuses or one_graph or threads")
    files = [tests / "ops" / f"test_{name}.py" for name in ("add_layer_norm", "bias_gelu", "embed_tokens")]
    rest = ("-q", "-p", "no:cacheprovider")
    done = run(environment.bin / "pytest", *files, *chosen, *rest, cwd=tmp_path)
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout

    other = pytestconfig.getoption("--other-python")
    if other is not None:
        site = tmp_path / "other"
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); from blip2_kernels import doctor, extension;"
            "print(extension.LIBRARY, extension.reason());"
            "print({f.reason for f in doctor.examine(['cpu']) if f.backend == 'csrc'})"
        )
        done = run(other, "-c", code, cwd=site)
        expected = [str(site / "blip2_kernels" / "_C.abi3.so"), "None", "{'works'}"]
        assert done.stdout.split() == expected, done.stdout


def test_editable_install_follows_the_checkout(checkout, environment, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_KERNELS_BUILD", "0")  # the operators are the wheel's test
    environment.pip_install("--no-build-isolation", "-e", ".", cwd=checkout)
    (checkout / "model" / "newcomer.py").write_text("ANSWER = 42\n")
    script = "import blip2_kernels.model.newcomer as n, blip2_kernels.ops; print(n.ANSWER, n.__file__)"
    done = run(environment.python, "-c", script, cwd=tmp_path)
    assert done.stdout.split() == ["42", str(checkout / "model" / "newcomer.py")]


def test_requirements_extras_and_pins_are_met_together(checkout):
    """pip resolves the package with its extras, under the pins, and finds nothing it would have to install.

    The environment is the one the tests run in; the index is off, so anything missing or in conflict fails.
    """
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().split("\n")
        if line.count("==") == 1
    )
    pinned = version("torch").split("+")[0] == pins["torch"]
    done = run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"),
        *(("-c", "constraints.txt") if pinned else ()),
        ".[dev]",
        cwd=checkout,
    )
    chosen = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert chosen == [f"Would install blip2-kernels-{version('blip2-kernels')}"], done.stdout
    requirements = " ".join(requires("blip2-kernels") or []).lower()
    for unwanted in ("torchvision", "timm", "torchaudio"):
        assert unwanted not in requirements, f"{unwanted} must stay optional"
