"""The progress of a long loop, on a terminal and in a log."""

import io

import pytest

from blip2_kernels.model.progress import ProgressBar, format_duration


def test_progress_writes_plain_lines_where_there_is_no_terminal(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 30.0, 60.0])
    monkeypatch.setattr("blip2_kernels.model.progress.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    with ProgressBar("stage 1", 30, stream=stream) as bar:
        bar.update(1, "loss 3.0")
        bar.update(2, "loss 2.9")  # too soon after the last line
        bar.update(15, "loss 2.0")
        bar.update(30, "loss 1.0")
    assert stream.getvalue().splitlines() == [
        "stage 1: 1/30 · loss 3.0 · 2.00 s/step · 58s left",
        "stage 1: 15/30 · loss 2.0 · 2.00 s/step · 30s left",
        "stage 1: 30/30 · loss 1.0 · 2.00 s/step · 0.0s left",
    ]


def test_progress_of_a_resumed_run_counts_only_its_own_steps(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("blip2_kernels.model.progress.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    ProgressBar("x", 100, stream=stream).start(completed=90).update(95)
    assert stream.getvalue() == "x: 95/100 · 2.00 s/step · 10s left\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_draws_a_bar_on_a_terminal_and_lines_without_rich(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    with ProgressBar("stage 1", 4, stream=screen) as bar:
        bar.update(3, "loss 2.5")
        bar.write("a line of its own")
    drawn = screen.getvalue()
    assert "stage 1" in drawn and "3/4" in drawn and "loss 2.5" in drawn and "a line of its own" in drawn
    assert "\x1b[" in drawn
    monkeypatch.setattr("blip2_kernels.model.progress.importlib.util.find_spec", lambda name: None)
    screen = Terminal()
    with ProgressBar("stage 1", 4, stream=screen) as bar:
        bar.update(4, "loss 2.5")
    assert screen.getvalue().startswith("stage 1: 4/4 · loss 2.5") and "\x1b[" not in screen.getvalue()
    silent = io.StringIO()
    with ProgressBar("stage 1", 4, enabled=False, stream=silent) as bar:
        bar.update(4)
        bar.write("x")
    assert silent.getvalue() == ""


def test_durations():
    assert [format_duration(s) for s in (3.4, 59.6, 75.2, 7325)] == ["3.4s", "1m00s", "1m15s", "2h02m"]
