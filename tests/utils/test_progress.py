"""A line renewed on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import io
import os
import pty
import select

import pytest

from horovod_lm.utils import progress
from horovod_lm.utils.progress import ProgressLine, format_seconds


@pytest.fixture
def terminal():
    """A pseudo terminal: a stream to write to, and a function that reads what it shows."""
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w")

    def shown(end: str) -> str:
        """Return what came up to `end`: a terminal hands out its text in pieces."""
        text = ""
        while end not in text and select.select([ours], [], [], 10)[0]:
            text += os.read(ours, 100_000).decode()
        return text

    yield stream, shown
    stream.close()
    os.close(ours)


def talk(line: ProgressLine) -> None:
    line.say("first")
    for step in range(1, 5):
        line.update(f"step {step}", keep=step % 2 == 0)
    line.say("last")


def test_in_a_pipe_lines_stay_and_only_those_worth_keeping():
    stream = io.StringIO()
    talk(ProgressLine(stream=stream))
    assert stream.getvalue() == "first\nstep 2\nstep 4\nlast\n"


def test_on_a_terminal_the_line_is_renewed_and_cleared_before_what_stays(terminal, monkeypatch):
    clock = iter([10.0, 10.1, 10.2, 11.0])  # the third comes too soon after the second
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream, shown = terminal
    line = ProgressLine(stream=stream)
    line.say("first")
    line.update("step 1")
    line.update("step 2", keep=True)
    line.update("step 3")
    line.update("step 4")
    line.say("last")
    line.say("more")
    clear = "\r\x1b[K"
    wanted = f"first\r\n{clear}step 1{clear}step 2{clear}step 4{clear}last\r\nmore\r\n"
    assert shown(end="more\r\n") == wanted


def test_other_ranks_say_nothing():
    stream = io.StringIO()
    talk(ProgressLine(enabled=False, stream=stream))
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (-3, "0 s"), (7.4, "7 s"), (59.4, "59 s"), (59.6, "1:00"), (65, "1:05"),
     (3599, "59:59"), (3600, "1:00:00"), (7384, "2:03:04"), (360000, "100:00:00")],
)  # fmt: skip
def test_durations_as_a_person_writes_them(seconds, text):
    assert format_seconds(seconds) == text
