"""Writes report.md of the rows in a folder, and compares two runs.

python bench/report.py bench/results/<device>        report.md, and the pictures beside it
python bench/report.py --repeat-check OLD.json NEW.json   how many ratios of NEW lie in OLD's intervals
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import is_ours, read_rows, settled, time_of

Row = Mapping[str, Any]
RESULTS, REPORT = "results.json", "report.md"
FURTHEST, WITHIN = 0.10, 0.90
"""A repeated run is like the first if this share of ratios lies in its intervals and none is further off."""
AXES = ("batch", "images", "image tokens", "text tokens", "texts an image", "samples an image")
"""Sizes over which cost is looked at."""


def grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    made: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        made[row[key]].append(row)
    return dict(made)


# ---------------------------------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class Growth:
    """How the cost of a peer grows along one size.

    Attributes:
        label: the group and the sizes that stay.
        axis: the size.
        sizes, times, floors, flops: of each case, milliseconds and operations.
    """

    label: str
    axis: str
    peer: str
    sizes: tuple[float, ...]
    times: tuple[float, ...]
    floors: tuple[float, ...]
    flops: tuple[float, ...]

    def exponent(self, values: Sequence[float]) -> float | None:
        """p of size ** p, fitted by least squares of the logarithms; None where something is not known."""
        if not all(value and value > 0 for value in values):
            return None
        x, y = ([math.log(v) for v in some] for some in (self.sizes, values))
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return slope / sum((a - mean_x) ** 2 for a in x)


def growths(rows: Iterable[Row], axes: Sequence[str] = AXES) -> list[Growth]:
    """All peers along all sizes of which at least three were timed with the other sizes alike."""
    series: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if time_of(row) is None or row["share"] is not None or "compiled" in row["case"]:
            continue
        for axis in axes:
            if not isinstance(row["shape"].get(axis), int | float):
                continue
            derived = ("padded",) if axis == "text tokens" else ()
            rest = {k: v for k, v in row["shape"].items() if k not in (axis, *derived)}
            if axis == "text tokens" and row["shape"][axis] != row["shape"].get("padded", row["shape"][axis]):
                continue  # 12 tokens padded to 32 are neither
            label = ", ".join([row["group"], *(said_size(k, v) for k, v in rest.items() if said_size(k, v))])
            series[label, row["dtype"], axis, row["peer"]].append(row)
    made = []
    for (label, _, axis, peer), found in series.items():
        ordered = sorted({row["shape"][axis]: row for row in found}.items())
        if len(ordered) >= 3:
            sizes, its = zip(*ordered, strict=True)
            times = tuple(time_of(row)["median"] for row in its)
            floors, flops = (tuple(row[key] or 0.0 for row in its) for key in ("floor_ms", "flops"))
            made.append(Growth(label, axis, peer, sizes, times, floors, flops))
    return made


def said_size(name: str, value: object) -> str:
    """A size in a label: no more than a reader needs."""
    if name in ("mask", "direction"):
        return str(value)
    if name == "batch":
        return f"batch {value}"
    if value == 0 or name == "padded" or (name, value) == ("samples an image", 1):
        return ""
    return f"1 {name[:-1]}" if value == 1 and name.endswith("s") else f"{value} {name}"


# ---------------------------------------------------------------------------------------------------- report


def milliseconds(timing: Mapping[str, float] | None) -> str:
    return f"{timing['median']:.4g} [{timing['p20']:.4g}, {timing['p80']:.4g}]" if timing else ""


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head_of(rows: Sequence[Row]) -> list[str]:
    """Device and versions; said for each revision where rows are of several."""
    lines: list[str] = []
    seen = []
    of_a_run = ("date", "clocks_mhz", "roofline", "hand_over_us")
    for row in rows:
        facts = {k: v for k, v in row["about"].items() if k not in of_a_run}
        if not facts or facts in seen:
            continue
        seen.append(facts)
        roofline = row["about"]["roofline"]
        lines += [f"- {name}: {'none' if value is None else value}" for name, value in facts.items()]
        lines.append(f"- date: {row['about']['date']}")
        lines.append(f"- a copy moves {roofline['copy'] / 1e9:,.1f} GB/s, read and written")
        if "hand_over_us" in row["about"]:
            lines.append(
                f"- an operation of 65,536 numbers on all threads: {row['about']['hand_over_us']:.1f} us"
            )
        lines += [
            f"- a matrix product in {dtype}: {flops / 1e12:,.3g} TFLOP/s"
            for dtype, flops in roofline["matmul"].items()
        ]
        lines.append("")
    if len(seen) > 1:
        lines.append("These rows were taken under several of these; each says in the JSON under which.\n")
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """A group's rows as a Markdown table, without those that are absent."""
    shown = [row for row in rows if row["absent"] is None]
    cuda = any(row["device_time"] is not None for row in shown)
    head = [
        "case",
        "peer",
        *(["kernels, ms", "warm"] if cuda else []),
        "call, ms",
        *(["host"] if cuda else []),
    ]
    head += ["times ours", "of the roofline", "GFLOP", "peak MiB"]
    head += [*(["launches", "their sum, ms"] if cuda else []), "remark"]
    lines = [line(head), line(["---"] * len(head))]
    for row in shown:
        ratio, remarks = "", [row["failed"]] if row["failed"] else list(row["remarks"])
        if row["ratio"] and not is_ours(row):
            ratio = f"{row['ratio']['median']:.2f}"
            if "low" in row["ratio"]:
                ratio += f" [{row['ratio']['low']:.2f}, {row['ratio']['high']:.2f}]"
            if cuda and row["ratio"].get("of") == "call":
                ratio += " of calls"
        if row["eager"] and row["eager"].get("unsteady"):
            remarks.append(f"cores apart in {row['eager']['unsteady']} of {row['eager']['rounds']} rounds")
        each = (row["ratio"] or {}).get("each", ())
        if len(each) > 1 and not settled(row["ratio"]):
            remarks.append(f"{min(each):.2f} to {max(each):.2f} in {len(each)} readings")
        if row["share"] is not None:
            ratio = f"{100 * row['share']:.1f}% of the whole"
        device, warm, host = (row[kind] for kind in ("device_time", "warm", "host"))
        if isinstance(device, str):
            device, remarks = None, remarks or [f"in a graph: {device}"]
        share = "" if row["of_roofline"] is None else f"{100 * row['of_roofline']:.0f}%"
        flops = None if row["flops"] is None else row["flops"] / 1e9
        cells = [row["case"], row["peer"], *([milliseconds(device), milliseconds(warm)] if cuda else [])]
        cells += [milliseconds(row["eager"]), *([milliseconds(host)] if cuda else []), ratio, share]
        cells += [number(flops), number(row["peak_mib"])]
        cells += [number(row["launches"], "d"), number(row.get("kernel_ms"), ".4g")] if cuda else []
        lines.append(line([*cells, "; ".join(remarks).replace("|", "/")]))
    return lines


def absences(rows: Iterable[Row]) -> list[str]:
    """Who was not there, and why."""
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row["absent"] is not None:
            reasons[row["peer"], row["absent"]] += 1
    return [f"- {peer}: {why} ({count} cases)" for (peer, why), count in reasons.items()]


def growth_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        line(["what", "over", "sizes", "peer", "time", "its FLOPs", "least time here"]),
        line(["---"] * 7),
    ]
    for growth in growths(rows):
        fits = [number(growth.exponent(v), ".2f") for v in (growth.times, growth.flops, growth.floors)]
        sizes = ", ".join(f"{size:g}" for size in growth.sizes)
        lines.append(line([growth.label, growth.axis, sizes, growth.peer, *fits]))
    return lines if len(lines) > 2 else []


def report(
    rows: Sequence[Row], title: str, sections: Mapping[str, Sequence[str]], pictures: Sequence[str]
) -> str:
    """The text of report.md.

    Args:
        sections: further ones by heading, in front of the rows.
        pictures: file names beside the report.
    """
    lines = [f"# {title}", ""]
    if rows:
        lines += head_of(rows)
        lines += [
            "Times are medians with 20th and 80th percentile. Ratios are medians of rounds side by side,",
            "with their interval (20th to 80th percentile, at least 3% either way). The roofline is the",
            "least time that the measured copy and product allow for the case, whatever the algorithm. A",
            "peer whose result is wrong has no figures.",
        ]
        readings = [len(row["eager"].get("each", [1])) for row in rows if row["eager"]]
        if max(readings, default=1) > 1:
            several = " to ".join(f"{count}" for count in sorted({min(readings), max(readings)}))
            lines += [
                f"Each row was read {several} times, on a CPU mostly in new processes: a median is that of",
                "their medians. Where a ratio has not settled, how far they differ is said.",
            ]
    for name in pictures:
        lines += ["", f"![{name.removesuffix('.png').replace('-', ' ')}]({name})"]
    for heading, text in sections.items():
        lines += ["", f"## {heading}", "", *text]
    for group, its in grouped(rows, "group").items():
        if any(row["absent"] is None for row in its):
            lines += ["", f"## {group}", "", *table(its)]
    grown = growth_table(rows)
    if grown:
        lines += ["", "## How cost grows", ""]
        lines += [
            "Exponents p of size ** p, fitted: of the time, of the FLOPs that the peer computes, and of the"
        ]
        lines += [
            "least time that the roofline leaves. Overheads that do not grow make the first one smaller.",
            "",
        ]
        lines += grown
    left_out = absences(rows)
    if left_out:
        lines += ["", "## Not there", "", *left_out]
    return "\n".join(lines) + "\n"


def write(folder: Path, sections: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Write pictures and report.md of whatever a folder has."""
    results = folder / RESULTS
    rows = read_rows(results) if results.is_file() else []
    made: list[str] = []
    if rows:
        try:
            import pictures

            made = [path.name for path in pictures.draw_all(rows, folder)]
        except ImportError as error:
            print(f"no pictures: {error}", file=sys.stderr)
    (folder / REPORT).write_text(report(rows, folder.name, sections or {}, made))
    return folder / REPORT


# ---------------------------------------------------------------------------------------------- repeated runs


@dataclass(frozen=True)
class Repeat:
    """How a second run compares with a first.

    Attributes:
        compared: ratios that both have.
        within: of them in the first run's interval.
        furthest: the largest relative difference of two medians, and whose it is.
    """

    compared: int
    within: int
    furthest: float
    whose: str

    @property
    def holds(self) -> bool:
        return self.compared > 0 and self.within >= WITHIN * self.compared and self.furthest <= FURTHEST

    def __str__(self) -> str:
        return (
            f"{self.within} of {self.compared} ratios lie in the first run's intervals ("
            f"{100 * self.within / max(1, self.compared):.1f}%, expected {100 * WITHIN:.0f}%); the furthest "
            f"is {100 * self.furthest:.1f}% off ({self.whose or 'none'}, at most {100 * FURTHEST:.0f}%)"
        )


def compare(old: Iterable[Row], new: Iterable[Row]) -> Repeat:
    """A second run's ratios beside the first's."""
    first = {(row["case"], row["peer"]): row["ratio"] for row in old if row["ratio"] and not is_ours(row)}
    first = {key: ratio for key, ratio in first.items() if "low" in ratio}
    compared = within = 0
    furthest, whose = 0.0, ""
    for row in new:
        before = first.get((row["case"], row["peer"]))
        if before is None or row["ratio"] is None:
            continue
        now = row["ratio"]["median"]
        compared += 1
        within += before["low"] <= now <= before["high"]
        off = abs(now / before["median"] - 1)
        if off > furthest:
            furthest, whose = off, f"{row['case']}: {row['peer']}"
    return Repeat(compared, within, furthest, whose)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="with results.json; default: this device's")
    parser.add_argument("--repeat-check", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two runs")
    arguments = parser.parse_args()
    try:
        if arguments.repeat_check:
            repeat = compare(*map(read_rows, arguments.repeat_check))
            print(repeat)
            return 0 if repeat.holds else 1
        folder = arguments.folder
        if folder is None:
            import torch
            from about import device_folder

            device = "cuda" if torch.cuda.is_available() else "cpu"
            folder = Path(__file__).parent / "results" / device_folder(device)
        if not (folder / RESULTS).is_file():
            parser.error(f"{folder}: expected {RESULTS} in it, as `pytest bench --results` writes it")
        print(f"report: {write(folder)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
