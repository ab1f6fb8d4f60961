"""Progress of a long loop: a live bar on a terminal, plain lines anywhere else.

The bar needs `rich` (extra `train`). Without it, or where the output is a file or a pipe, one line is written
every few seconds, so that a log stays readable and a run never looks dead.
"""

import importlib.util
import sys
import time
from typing import Any, Self, TextIO

from blip2_kernels.checks import check_bool, check_finite, check_int, describe


def format_duration(seconds: float) -> str:
    """`75.2` becomes `"1m15s"`, `3.4` becomes `"3.4s"`, `7325` becomes `"2h02m"`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class ProgressBar:
    """Shows how far a loop of `total` steps is and what is left; use as a context manager.

    Args:
        description: what runs, e.g. `"stage 1"`.
        total: number of steps; `None` if unknown.
        enabled: `False` shows nothing (ranks other than 0).
        stream: where to write, default `sys.stderr`.
        seconds_between_lines: at most one plain line in so many seconds; the first and the last step always
            get one.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        if not isinstance(description, str):
            raise TypeError(f"description: expected a str, got {describe(description)}")
        if total is not None:
            check_int("total", total, 0)
        check_bool("enabled", enabled)
        check_finite("seconds_between_lines", seconds_between_lines, 0)
        self.description = description
        self.total = total
        self.enabled = enabled
        self.stream = stream if stream is not None else sys.stderr
        self.seconds_between_lines = seconds_between_lines
        self._bar: Any = None
        self._task: Any = None
        self._first_step = 0
        self._started = self._last_line = 0.0

    def start(self, completed: int = 0) -> Self:
        """Starts at step `completed` (a resumed run); the time left counts only what this run does."""
        self._first_step = completed
        self._started = time.perf_counter()
        self._last_line = float("-inf")
        is_terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        if self.enabled and is_terminal and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("·"),
                Remaining(),
                TextColumn("left"),
                console=Console(file=self.stream),
                refresh_per_second=4,
                speed_estimate_period=60.0,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, completed=completed, text="")
        return self

    def update(self, completed: int, text: str = "") -> None:
        """Says that `completed` steps are done; `text` holds the figures of the latest step."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, text=text)
            return
        now = time.perf_counter()
        if now - self._last_line >= self.seconds_between_lines or completed == self.total:
            self._last_line = now
            self._write_line(self._line(completed, text, now - self._started))

    def write(self, message: str) -> None:
        """Writes a line of its own, above the bar if there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._write_line(message)

    def close(self) -> None:
        """Takes the bar down; harmless when called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, completed: int, text: str, elapsed: float) -> str:
        of = "" if self.total is None else f"/{self.total}"
        pieces = [f"{self.description}: {completed}{of}"]
        if text:
            pieces.append(text)
        done = completed - self._first_step
        if done > 0:
            rate = elapsed / done
            pieces.append(f"{rate:.2f} s/step" if rate >= 0.1 else f"{rate * 1e3:.1f} ms/step")
            if self.total is not None:
                pieces.append(f"{format_duration(rate * (self.total - completed))} left")
        return " · ".join(pieces)

    def _write_line(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
