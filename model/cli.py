"""`blip2-kernels`: the command line. The commands themselves are in `commands.py`, which needs typer and
rich.
"""

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and leaves with its exit code: 0, or 1 after one line that says what is wrong (2 for a
    wrong option, 130 after an interruption). `--debug` shows the traceback instead.

    Args:
        arguments: default `sys.argv[1:]`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if missing := [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]:
        print(
            f"blip2-kernels: the command line needs {' and '.join(missing)}: "
            "pip install 'blip2-kernels[train]'",
            file=sys.stderr,
        )
        sys.exit(1)
    from .commands import app

    try:
        app(words, prog_name="blip2-kernels")
    except KeyboardInterrupt:
        print("blip2-kernels: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"blip2-kernels: {text} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
