"""How an op picks the backend that runs it."""

from collections.abc import Callable, Mapping

from ..checks import describe

Supports = Callable[[], str | None]


def choose_backend(backend: object, candidates: Mapping[str, Supports]) -> str:
    """The backend to run: the one that was named, or the first candidate that can serve.

    Args:
        backend: "auto" or a candidate's name.
        candidates: in order of preference, each with a question that answers None ("can serve") or the reason
            why not.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve, with the reason. An explicit choice
            never falls back silently.
    """
    if isinstance(backend, str) and backend == "auto":
        reasons = {}
        for name, supports in candidates.items():
            reasons[name] = supports()
            if reasons[name] is None:
                return name
        raise ValueError(f"backend: none can serve this call: {reasons}")
    if not isinstance(backend, str) or backend not in candidates:
        names = ", ".join(repr(name) for name in ("auto", *candidates))
        raise ValueError(f"backend: expected one of {names}, got {describe(backend)}")
    reason = candidates[backend]()
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve this call: {reason}")
    return backend
