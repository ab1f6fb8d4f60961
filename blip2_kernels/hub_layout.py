"""A folder that the `kernels` package loads: `kernels.get_local_kernel(folder).fuse(model)`.

    python -m blip2_kernels.hub_layout FOLDER

It holds this package's Python and Triton, which any torch runs, once for each kind of machine that `kernels`
knows and we do; not the compiled extension, which is one machine's, and not `blip2_kernels.model`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

BACKENDS = ("cpu", "cuda", "rocm", "xpu")
METADATA = {
    # Modules are told apart by their names, the package's own among them: it has to be loaded under that.
    "id": "blip2_kernels",
    "name": "blip2-kernels",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
}


def write_layout(folder: Path) -> Path:
    """Write the layout, replacing one that is there.

    Args:
        folder: of the kernel's repository.

    Returns:
        Its `build` folder.

    Raises:
        ValueError: a folder that holds something else.
    """
    build = folder / "build"
    variants = {backend: build / f"torch-{backend}" for backend in BACKENDS}
    if folder.exists() and any(folder.iterdir()) and not (variants["cpu"] / "metadata.json").is_file():
        raise ValueError(f"folder: expected an empty one or an older layout, got {folder}")
    if build.exists():
        shutil.rmtree(build)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "model")
    for backend, variant in variants.items():
        shutil.copytree(Path(__file__).resolve().parent, variant, ignore=unwanted)
        metadata = METADATA | {"backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return build


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m blip2_kernels.hub_layout", description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        print(write_layout(parser.parse_args(arguments).folder))
    except (OSError, ValueError) as error:
        sys.exit(f"hub_layout: {error}")


if __name__ == "__main__":
    main()
