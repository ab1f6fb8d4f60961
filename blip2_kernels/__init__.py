"""Exact fused kernels for BLIP-2's Q-Former."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_HOMES = {
    "fuse": ".transformers",
    "fused": ".transformers",
    "patch": ".layers",
    "register_attention": ".attention_interface",
    "unfuse": ".transformers",
    "unpatch": ".layers",
}
"""Public names, and the modules they come from."""

__all__ = list(_HOMES)

_CHECKOUT = Path(__file__).resolve().parent.parent


class _ModelInCheckout:
    """Finds `blip2_kernels.model` in the folder model/ that lies beside this package in a checkout.

    Installed, model/ is a subfolder and is found by the ordinary means, asked first. But whoever has the
    checkout on sys.path (`python -m pytest`, a script in its root) imports this package from there, where no
    subfolder `model` exists. Adding the checkout to `__path__` would work too, and would also make its
    setup.py, tests and bench importable as parts of this package.
    """

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "blip2_kernels.model":
            return None
        folder = _CHECKOUT / "model"
        if not (_CHECKOUT / "setup.py").is_file() or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.append(_ModelInCheckout)


def __getattr__(name: str) -> Any:
    """Public names, imported when they are asked for: transformers takes seconds to import."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
