"""The result of a job, for every way in which ranks fail, and the framing of their output."""

from __future__ import annotations

import codecs
import itertools
import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.jupyter.run_cell import rank_cell
from horovod_lm.jupyter.run_cell.framed_horovodrun import frame_output
from horovod_lm.jupyter.run_cell.job_result import JobResult, RankError


def result_of(*events: dict, size: int = 2, code: int = 1) -> JobResult:
    result = JobResult(size)
    for event in (*events, {"event": "ended", "code": code, "stopped": False, "text": ""}):
        if "name" in event:
            result.take(event["rank"], {"error": event})
        else:
            result.add(event)
    return result


def error(rank: int, name: str, text: str = "", line: int = 3) -> dict:
    return {"rank": rank, "name": name, "text": text, "line": line, "traceback": [f"{name}\n"]}


def ended(rank: int, code: int) -> dict:
    return {"event": "rank_ended", "rank": rank, "code": code}


LOST = "HorovodInternalError"


def test_the_cause_does_not_depend_on_who_was_heard_first():
    events = [error(0, LOST), error(1, "ValueError", "x"), ended(0, 143), ended(1, 143)]
    said = {str(result_of(*order).error()) for order in itertools.permutations(events)}
    assert said == {"rank 1: ValueError: x (line 3 of the cell); rank 0 was ended with it"}


def test_a_rank_that_was_ended_while_it_left_early_is_not_taken_for_a_killed_one():
    said = result_of(error(0, LOST), ended(1, 143), ended(0, 143)).error()
    assert str(said).endswith("because rank 1 had already come to the end")


STALL = [
    "[2026-11-25 18:52:01.5: W /src/stall_inspector.cc:107] One or more tensors were submitted",
    "Missing ranks:", "1: [allreduce.late, allreduce.later]",
    'One or more rank (marked by "!") is stalled for longer than 4 seconds. Will shutdown.',
]  # fmt: skip


def error_after(*lines: str) -> str:
    printed = [{"event": "output", "rank": 0, "text": f"{line}\n"} for line in lines]
    return str(result_of(*printed, error(0, LOST)).error())


def test_ranks_that_wait_in_calls_of_their_own_are_all_named():
    said = error_after(*STALL[:2], "0: [allreduce.b]", "1: [allreduce.a]", STALL[-1])
    assert said.startswith(
        "the ranks waited for each other for 4 s: rank 0 did not come to 'b', rank 1 did not come"
        " to 'a'; every rank must make the same collective calls"
    )


def test_only_a_report_of_the_stall_check_names_missing_ranks():
    said = error_after("0: [0.5]", *STALL, "0: [0.5]")
    assert said.startswith("rank 1 did not come to 'late', where rank 0 waited for 4 s")


class Unusual(Exception):
    def __str__(self) -> str:
        raise ValueError

    def __reduce__(self) -> tuple:
        return int, ("x",)


def test_errors_and_values_that_python_cannot_show_or_load_are_said():
    file = OSError(b"caf\xe9".decode("utf-8", "surrogateescape"))
    shown = [rank_cell.describe(error)["text"] for error in (file, Unusual())]
    assert shown == [r"caf\udce9", "<exception str() failed>"]
    with pytest.raises(TypeError, match="^the last value, a lock, cannot be sent to the notebook"):
        rank_cell.pickled_value(threading.Lock())
    with pytest.raises(RankError, match=r"value of rank 1 cannot be loaded .*ValueError: invalid"):
        JobResult(2, values={1: rank_cell.pickled_value(Unusual())}).load_values()


@pytest.fixture(scope="module")
def forward():
    """What horovodrun runs for a rank's pipe, and the list that it reports lines to."""
    from horovod.runner.common.util import safe_shell_exec

    names = ("prefix_connection", "execute")
    original = {name: getattr(safe_shell_exec, name) for name in names}
    lines: list[str] = []
    frame_output(lambda event, rank, text: lines.append(text), 0.0)
    yield safe_shell_exec.prefix_connection, lines
    for name, function in original.items():
        setattr(safe_shell_exec, name, function)


PIECES = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"\n", b"\r\n", b"50%\r", b"[7]<stdout>:x"])
)


@pytest.mark.horovod
@given(st.lists(PIECES.filter(len), max_size=12))
def test_a_rank_s_bytes_are_cut_into_lines_and_nothing_is_lost(forward, pieces):
    run, lines = forward
    lines.clear()
    ours, source = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a piece for each read
    for piece in pieces:
        os.write(ours.fileno(), piece)
    ours.close()
    run(source, None, "stdout", 1, False)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sent = "".join(map(decoder.decode, pieces)) + decoder.decode(b"", final=True)
    ended = sent + "\n" * (not sent.endswith(("\n", "\r")) and sent != "")
    assert "".join(lines) == ended
    assert all(line.endswith(("\n", "\r")) for line in lines)
    assert not any(end in line[:-2] for line in lines for end in "\n\r")


@pytest.mark.horovod
def test_the_last_words_of_a_killed_rank_s_shell_are_left_out(forward):
    run, lines = forward
    lines.clear()
    read_end, write_end = os.pipe()
    os.write(write_end, b"Killed\ngoing on\nKilled\n")
    os.close(write_end)
    run(open(read_end, "rb", buffering=0), None, "stderr", 1, False)
    assert lines == ["Killed\n", "going on\n"]
