"""Import modules in processes of their own, in which chosen packages do not exist and no GPU is visible.

    python tests/fresh_imports.py triton,typer  blip2_kernels blip2_kernels.model

prints a JSON object: each module's error text, or null. The compiled extension is hidden along with the
packages, whether it was built or not. A process a module would import torch and
transformers dozens of times. Here they are imported once, without the packages that are to be missing, and
every module is then imported in a fork of that process, in which none of ours has been imported yet.
"""

import json
import os
import sys
import traceback
from importlib.machinery import PathFinder
from pathlib import Path

EXTENSION = "_C.abi3.so"


def hide(packages: set[str]) -> None:
    """Let the import system find none of these packages, as on a machine that does not have them."""
    original = PathFinder.find_spec

    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in packages else original(name, path, target)

    PathFinder.find_spec = find_spec
    exists = Path.exists
    Path.exists = lambda path, **options: path.name != EXTENSION and exists(path, **options)


def error_of_import(module: str) -> str | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        error = ""
        try:
            __import__(module)
            if extension := sys.modules.get("blip2_kernels.extension"):
                assert extension.LIBRARY.name == EXTENSION and "not built" in extension.reason()
        except BaseException:
            error = traceback.format_exc()
        os.write(writer, error.encode()[-4000:])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        error = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return error or (None if status == 0 else f"the process ended with status {status}")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whichever is installed
    hide(set(sys.argv[1].split(",")))
    import torch
    import transformers
    import transformers.modeling_utils

    for lazy in ("AutoModelForCausalLM", "Blip2QFormerConfig", "InstructBlipQFormerConfig", "Trainer"):
        getattr(transformers, lazy)
    assert not torch.cuda.is_available()
    already = [name for name in sys.modules if name.startswith("blip2_kernels")]
    assert not already, already
    print(json.dumps({module: error_of_import(module) for module in sys.argv[2:]}))
