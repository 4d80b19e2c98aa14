"""A status line that is updated on a terminal; plain lines in a file or a pipe."""

from __future__ import annotations

import io
import os

import pytest

from horovod_lm.utils import progress
from horovod_lm.utils.progress import ProgressLine, format_seconds


def test_in_a_pipe_only_kept_lines_are_printed_and_other_ranks_print_nothing():
    for enabled, printed in ((True, "first\nstep 2\nstep 4\nlast\n"), (False, "")):
        stream = io.StringIO()
        line = ProgressLine(enabled, stream)
        line.say("first")
        for step in range(1, 5):
            line.update(f"step {step}", keep=step % 2 == 0)
        line.say("last")
        assert stream.getvalue() == printed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_is_updated_and_cleared_before_a_message(monkeypatch):
    clock = iter([10.0, 10.1, 10.2, 11.0])  # the third comes too soon after the second
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = Terminal()
    line = ProgressLine(stream=stream)
    line.say("first")
    line.update("step 1")
    line.update("step 2", keep=True)
    line.update("step 3")
    line.update("step 4")
    line.say("last")
    line.say("more")
    clear = "\r\x1b[K"
    wanted = f"first\n{clear}step 1{clear}step 2{clear}step 4{clear}last\nmore\n"
    assert stream.getvalue() == wanted


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_lost_output_is_said_once_and_is_no_error(capfd):
    with open("/dev/full", "w") as stream:
        line = ProgressLine(stream=stream)
        for _ in range(3):
            line.say("text")
    wanted = "warning: the output was lost (No space left on device): nothing more is printed\n"
    assert capfd.readouterr().err == wanted


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")],
)
def test_durations_as_a_person_writes_them(seconds, text):
    assert format_seconds(seconds) == text
