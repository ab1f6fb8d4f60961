"""Rows of results: what is known of a peer in a case, how processes are pooled, and the file of all."""

import json
import math
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 0
LOST = "lost the GPU"
"""How the reason begins why a case ended the use of the GPU."""
READINGS = 3
"""A ratio is of so many readings at least before it counts as settled. A reading is what one process, or one
of each peer, tells."""
STANDARD_ERROR = 0.015
"""A settled ratio's standard error at most, as a share of it."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file.

    Raises:
        ValueError: another file.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise ValueError(f"{path}: expected an object with rows, as `pytest bench --results` writes it")
    return found["rows"]


def time_of(row: Mapping[str, Any]) -> dict[str, float] | None:
    """What a row is judged by: the time of its kernels where there is one, else that of the call."""
    return row["device_time"] if isinstance(row["device_time"], dict) else row["eager"]


def is_ours(row: Mapping[str, Any]) -> bool:
    return row["peer"] in ("ours", "ours, whole")


def pooled(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A timing or a ratio with that of one more process: the median of all readings' medians (`each`), and
    what holds every process's interval."""
    each = [median for one in (known, more) for median in one.get("each", [one["median"]])]
    made = {"median": statistics.median(each)}
    made |= {key: min(known[key], more[key]) for key in ("p20", "low") if key in more}
    made |= {key: max(known[key], more[key]) for key in ("p80", "high") if key in more}
    if "rounds" in more:
        made["rounds"] = known["rounds"] + more["rounds"]
    if unsteady := known.get("unsteady", 0) + more.get("unsteady", 0):
        made["unsteady"] = unsteady
    made |= {key: more[key] for key in ("of",) if key in more}
    return {**made, "each": each}


def settled(ratio: Mapping[str, Any]) -> bool:
    """Whether a further reading would hardly move a ratio: by how its readings differ, the standard error of
    their median (that of a mean times the root of pi / 2) is small."""
    each = ratio.get("each", ())
    if len(each) < READINGS:
        return False
    error = math.sqrt(math.pi / 2 / len(each)) * statistics.stdev(each)
    return error <= STANDARD_ERROR * ratio["median"]


@dataclass
class Row:
    """What is known of a peer in a case. Times by kind as `measure.Timing.json`, in milliseconds.

    Attributes:
        device_time: of its kernels in a CUDA graph, cache-cold, or the reason why there is none.
        warm: the same, cache-warm.
        eager: of a call as it stands.
        host: until its launches are out.
        ratio: time over that of ours, by rounds: median, interval [low, high], and what it is a ratio `of`:
            "kernels" where both have a device time, else "call".
        share: of a part in the time of the whole.
        bytes, flops: that must be moved; that it computes, counted.
        floor_ms: what the device's measured copy and product leave as least time of the case.
        of_roofline: that over the time.
        kernel_ms, launches, kernels: sum, number and the longest of one call's kernels, by the profiler.
        agreement: error against truth, and what was allowed; None where nothing is compared.
        absent: why the peer is not here.
        failed: why it has no figure: it crashed, ran out of memory or is wrong.
        remarks: why a figure beside the times is missing.
        about: device, revision, versions, and the clocks right before the rounds.
    """

    group: str
    case: str
    peer: str
    dtype: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    seed: int = SEED
    device_time: dict[str, float] | str | None = None
    warm: dict[str, float] | None = None
    eager: dict[str, float] | None = None
    host: dict[str, float] | None = None
    ratio: dict[str, float] | None = None
    share: float | None = None
    bytes: float | None = None
    flops: float | None = None
    floor_ms: float | None = None
    of_roofline: float | None = None
    peak_mib: float | None = None
    launches: int | None = None
    kernel_ms: float | None = None
    kernels: list[tuple[str, float, int]] = field(default_factory=list)
    agreement: dict[str, float] | None = None
    absent: str | None = None
    failed: str | None = None
    remarks: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        return self.absent is None and self.failed is None

    @property
    def time(self) -> dict[str, float] | None:
        """What it is judged by: the time of its kernels where there is one, else that of the call."""
        return time_of(vars(self))

    @property
    def settled(self) -> bool:
        """Whether a further reading would hardly move its ratio (without one: whether enough were had), and
        none would replace what failed or was not steady."""
        eager = self.eager or {}
        if self.failed is not None or "unsteady" in eager:
            return False
        return settled(self.ratio) if self.ratio else len(eager.get("each", ())) >= READINGS

    def pool(self, again: "Row") -> None:
        """Take in the times of another process; those of a steady machine alone, where one has any."""
        self.failed = again.failed
        unsteady, again_unsteady = ("unsteady" in (row.eager or {}) for row in (self, again))
        for kind in ("device_time", "warm", "eager", "host", "ratio"):
            mine, its = getattr(self, kind), getattr(again, kind)
            if isinstance(mine, dict) and isinstance(its, dict):
                both = pooled(mine, its) if unsteady == again_unsteady else its if unsteady else mine
                setattr(self, kind, both)
        self.near_roofline()

    def near_roofline(self) -> None:
        """Hold the time against the least one, where both are known."""
        if self.floor_ms is not None and self.time:
            self.of_roofline = self.floor_ms / self.time["median"]


@dataclass
class Results:
    """Rows of all cases so far, kept in a file that is whole at any time.

    Attributes:
        path: of the JSON file; None keeps nothing.
        rows: of all cases.
    """

    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path | None) -> "Results":
        """Those that earlier runs left; a run replaces the rows that it makes again and no others.

        Raises:
            ValueError: the file holds something else.
        """
        return cls(path, read_rows(path) if path is not None and path.is_file() else [])

    def has(self, case: str, revision: str, peers: Collection[str]) -> bool:
        """Whether a case need not run again: its peers were run at this revision, one of them has figures and
        none of ours failed; or it has ended the process's use of the GPU."""
        rows = [r for r in self.rows if r["case"] == case and r["about"].get("revision") == revision]
        failed = any(row["failed"] and row["peer"].startswith("ours") for row in rows)
        lost = any((row["failed"] or "").startswith(LOST) for row in rows)
        whole = {row["peer"] for row in rows} >= set(peers) and any(row["eager"] for row in rows)
        return lost or (whole and not failed)

    def keep(self, rows: Sequence[Row]) -> None:
        """Take rows, each in place of an older one of its case and peer, and rewrite the file."""
        kept = {(row["case"], row["peer"]): row for row in self.rows}
        self.rows = list((kept | {(row.case, row.peer): vars(row) for row in rows}).values())
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            half = self.path.with_suffix(".part")
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            half.write_text(f'{{"rows": [\n{lines}\n]}}\n')
            os.replace(half, self.path)
