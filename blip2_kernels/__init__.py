"""Exact fused kernels for BLIP-2's Q-Former."""

from pathlib import Path

# In a checkout model/ lies beside this package instead of inside it. Whoever has the checkout on sys.path
# (`python -m pytest`, a script in its root) would otherwise hide an installed model.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "model" / "__init__.py").is_file():
    __path__.append(str(_root))
