"""Pictures of a report, drawn with matplotlib from its rows alone.

Blue is always ours, black the roofline; the others keep their colour and marker through all pictures. The
colours are Okabe and Ito's, told apart by everybody.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from report import Growth, Row, grouped, growths
from rows import is_ours, time_of

OURS_COLOUR, FLOOR_COLOUR = "#0072B2", "#000000"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#A6761D", "#882255")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}
BARS_A_COLUMN = 45


def is_others(row: Row) -> bool:
    return not row["peer"].startswith("our")


class Look:
    """A colour and a marker for each peer, the same in every picture of the operators or of the models."""

    def __init__(self, rows: Sequence[Row]) -> None:
        rows = [row for row in rows if time_of(row)]
        others = dict.fromkeys(row["peer"] for row in rows if is_others(row))
        mine = dict.fromkeys(row["peer"] for row in rows if not is_others(row))
        self.of: dict[str, tuple[str, str]] = {}
        for name in mine:
            self.of[name] = OURS_COLOUR, "o"
        for i, name in enumerate(others):
            again = i // len(COLOURS)
            self.of[name] = COLOURS[i % len(COLOURS)], MARKERS[(i + 3 * again) % len(MARKERS)]


def plain_number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def logarithmic(axes: Axes, sizes: Sequence[float]) -> None:
    """Both axes logarithmic, the sizes themselves as ticks, times as plain numbers."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [plain_number(size) for size in sizes])
    bottom, top = axes.get_ylim()
    if top < 40 * bottom:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.yaxis.set_minor_formatter(NullFormatter())


def panel(axes: Axes, lines: Sequence[Growth], look: Look) -> None:
    """Time over one size, every peer a line, the roofline dashed."""
    for growth in sorted(lines, key=lambda g: g.peer.startswith("ours")):
        colour, marker = look.of[growth.peer]
        mine = growth.peer == "ours"
        axes.plot(
            growth.sizes, growth.times, color=colour, marker=marker, markersize=5 if mine else 4,
            linewidth=2.4 if mine else 1.3, zorder=3 if mine else 2, label=growth.peer,
        )  # fmt: skip
    longest = max(lines, key=lambda g: len(g.sizes))
    if all(longest.floors):
        axes.plot(longest.sizes, longest.floors, "--", color=FLOOR_COLOUR, linewidth=1.2, label="roofline")
    logarithmic(axes, longest.sizes)
    axes.set_xlabel(longest.axis)


def wrapped(label: str, width: int = 44) -> str:
    """A title in lines of so many characters, broken at commas."""
    lines = [""]
    for part in label.split(", "):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        if len(joined) > width and lines[-1]:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def growth_picture(rows: Sequence[Row], axes_names: Sequence[str], look: Look, path: Path) -> Path | None:
    """Panels of time over the given sizes; None where nothing was measured three times."""
    by_label: dict[tuple[str, str], list[Growth]] = {}
    for growth in growths(rows, axes_names):
        if growth.peer == "ours" or not growth.peer.startswith("our"):
            by_label.setdefault((growth.label, growth.axis), []).append(growth)
    by_label = {key: lines for key, lines in by_label.items() if any(g.peer == "ours" for g in lines)}
    if not by_label:
        return None
    columns = min(3, len(by_label))
    lines = -(-len(by_label) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.0 * columns, 3.1 * lines), squeeze=False)
    for axes in grid.flat[len(by_label) :]:
        axes.set_visible(False)
    for axes, ((label, _), its) in zip(grid.flat, by_label.items(), strict=False):
        panel(axes, its, look)
        axes.set_title(wrapped(label))
    for left in grid[:, 0]:
        left.set_ylabel("ms")
    handles: dict[str, object] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = sorted(handles, key=lambda name: (name != "ours", name == "roofline"))
    figure.tight_layout(h_pad=1.6)
    figure.legend(
        [handles[n] for n in order],
        order,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=min(6, len(order)),
    )
    return saved(figure, path)


def ratio_picture(rows: Sequence[Row], look: Look, path: Path, title: str) -> Path | None:
    """Bars: how many times as long as ours the others take, with the interval of each, in columns."""
    cases = grouped([row for row in rows if row["ratio"] and is_others(row)], "case")
    if not cases:
        return None
    columns = in_columns(cases)
    heights = [sum(map(len, column)) + 0.9 * len(column) for column in columns]
    shape = (1.5 + 6.5 * len(columns), 0.9 + 0.2 * max(heights))
    figure, grid = plt.subplots(1, len(columns), figsize=shape, squeeze=False)
    shown = [row["ratio"] for its in cases.values() for row in its]
    left = 0.9 * min(1.0, *(ratio.get("low", 1.0) for ratio in shown))
    right = 1.1 * max(2.0, *(ratio["median"] for ratio in shown))
    for axes, column in zip(grid.flat, columns, strict=True):
        ratio_bars(axes, column, look, max(heights))
        axes.set_xscale("log")
        numbers = [n for n in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if left <= n <= right]
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(numbers, [plain_number(n) for n in numbers])
        axes.set_xlim(left, right * (right / left) ** 0.35)
        axes.set_xlabel("times as long as ours (the blue line); logarithmic")
    grid.flat[0].set_title(title)
    figure.tight_layout(w_pad=1.5)
    return saved(figure, path)


def in_columns(cases: Mapping[str, Sequence[Row]]) -> list[list[Sequence[Row]]]:
    """The cases one behind the other, in as few columns as `BARS_A_COLUMN` allows, about equally long."""
    total = sum(map(len, cases.values()))
    count = -(-total // BARS_A_COLUMN)
    columns: list[list[Sequence[Row]]] = [[] for _ in range(count)]
    before = 0
    for its in cases.values():
        columns[before * count // total].append(its)
        before += len(its)
    return [column for column in columns if column]


def ratio_bars(axes: Axes, cases: Sequence[Sequence[Row]], look: Look, height: float) -> None:
    """A column of bars, one for each peer of each case, from the top."""
    place, ticks = 0.0, {}
    for its in cases:
        start = place
        for row in sorted(its, key=lambda r: r["ratio"]["median"]):
            ratio, colour = row["ratio"], look.of[row["peer"]][0]
            low, high = (ratio.get(end, ratio["median"]) for end in ("low", "high"))
            axes.barh(place, ratio["median"] - 1, left=1, height=0.82, color=colour)
            axes.plot([low, high], [place, place], color="#303030", linewidth=1.0)
            label = f"{ratio['median']:.2f}  {row['peer']}"
            place_of = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, (max(high, 1), place), fontsize=7.5, **place_of)
            place += 1
        ticks[its[0]["case"]] = (start + place - 1) / 2
        place += 0.9
    axes.axvline(1, color=OURS_COLOUR, linewidth=1.8, zorder=4)
    axes.set_yticks(list(ticks.values()), list(ticks))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height - 0.4, -0.9)
    axes.grid(axis="y", visible=False)


def memory_picture(rows: Sequence[Row], look: Look, path: Path) -> Path | None:
    """Bars of peak memory where it differs: models, by case."""
    chosen = ("stage-1 step", "re-ranking", "Q-Former inference", "stage-2 step")
    shown = [row for row in rows if row["peak_mib"] and row["group"] in chosen]
    by_case = grouped([row for row in shown if is_ours(row) or is_others(row)], "case")
    kept = {name: its for name, its in by_case.items() if len(its) > 1 and any(is_ours(r) for r in its)}
    if not kept:
        return None
    columns = min(3, len(kept))
    lines = -(-len(kept) // columns)
    most = max(map(len, kept.values()))
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.0 * columns, (0.8 + 0.26 * most) * lines), squeeze=False
    )
    for axes in grid.flat[len(kept) :]:
        axes.set_visible(False)
    for axes, (name, its) in zip(grid.flat, kept.items(), strict=False):
        ordered = sorted(its, key=lambda r: (not is_ours(r), r["peak_mib"]))
        largest = max(row["peak_mib"] for row in ordered)
        for i, row in enumerate(ordered):
            axes.barh(i, row["peak_mib"], height=0.74, color=look.of[row["peer"]][0])
            axes.text(
                row["peak_mib"] + 0.02 * largest,
                i,
                plain_number(round(row["peak_mib"], 1)),
                va="center",
                fontsize=7.5,
            )
        axes.set_yticks(range(len(ordered)), [row["peer"] for row in ordered], fontsize=7.5)
        axes.set_xlim(0, 1.22 * largest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(name)
    figure.supxlabel("peak memory of a call, MiB", fontsize=9)
    figure.tight_layout()
    return saved(figure, path)


def share_picture(rows: Sequence[Row], path: Path) -> Path | None:
    """Captioning end to end: two bars a case, plain and ours, stacked by part."""
    cases = grouped([row for row in rows if row["group"] == "captioning" and time_of(row)], "case")
    bars = []
    for name, its in cases.items():
        times = {row["peer"]: time_of(row)["median"] for row in its}
        for which in ("plain", "ours"):
            parts = [
                times.get("image encoder"),
                times.get(f"{which}, soft prompt"),
                times.get("language model"),
            ]
            if all(parts):
                bars.append((f"{name}\n{which}", parts))
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8.0, 1.3 + 0.5 * len(bars)))
    colours = {"image encoder": "#BBBBBB", "Q-Former": OURS_COLOUR, "language model": "#E69F00"}
    for i, (_, parts) in enumerate(bars):
        left, whole = 0.0, sum(parts)
        for (part, colour), spent in zip(colours.items(), parts, strict=True):
            axes.barh(i, spent, left=left, height=0.7, color=colour, label=part if i == 0 else None)
            if spent / max(sum(p) for _, p in bars) > 0.06:
                dark = part == "Q-Former"
                axes.text(
                    left + spent / 2, i, f"{100 * spent / whole:.0f}%", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip
            left += spent
        axes.text(left, i, f"  {left:,.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_xlim(0, 1.12 * max(sum(parts) for _, parts in bars))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms, parts timed by themselves")
    axes.set_title("Captioning end to end: what each part takes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.34 if len(bars) < 4 else -0.2), ncols=3)
    return saved(figure, path)


def saved(figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path


OPERATORS = ("self-attention", "cross-attention", "row operators", "latent attention", "similarity")
GROWTH = {
    "latency-over-batch": ("batch",),
    "cost-over-image-tokens": ("image tokens",),
    "cost-over-text-length": ("text tokens",),
    "cost-over-samples-an-image": ("samples an image", "texts an image"),
}
MODELS = ("Q-Former inference", "stage-1 step", "stage-2 step", "re-ranking", "captioning")


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every picture that the rows are enough for."""
    forward = [row for row in rows if row["shape"].get("direction") != "forward+backward"]
    operators = [row for row in forward if row["group"] in OPERATORS]
    models = [row for row in forward if row["group"] in MODELS]
    made: list[Path | None] = []
    with plt.rc_context(STYLE):
        for name, its, title in (
            ("models", models, "Models"),
            ("operators", operators, "Operators, forward"),
        ):
            look = Look(its)
            made.append(ratio_picture(its, look, folder / f"ratios-{name}.png", f"{title}: time over ours"))
            for axes, sizes in GROWTH.items():
                made.append(growth_picture(its, sizes, look, folder / f"{axes}-{name}.png"))
        made.append(memory_picture(models, Look(models), folder / "memory.png"))
        made.append(share_picture(models, folder / "captioning-shares.png"))
    return [path for path in made if path is not None]
