"""What a job's events come to: pure functions, every ending without a process."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.jupyter.outcome import Outcome, RanksStopped, how, ranks
from horovod_lm.jupyter.supervisor import Lines


def outcome(*events: dict, size: int = 2, code: int = 1, reason: str = "") -> Outcome:
    result = Outcome(size)
    for event in (*events, {"event": "ended", "code": code, "reason": reason, "left": []}):
        result.add(event)
    return result


def error(rank: int, name: str, text: str = "", line: int = 3) -> dict:
    return {
        "event": "mark", "kind": "error", "rank": rank, "name": name, "text": text, "line": line,
        "traceback": [f"{name}\n"],
    }  # fmt: skip


def ended(rank: int, code: int) -> dict:
    return {"event": "rank_ended", "rank": rank, "code": code}


LOST = "HorovodInternalError"


def test_a_good_end_is_none():
    assert outcome(code=0).error() is None


def test_the_cause_does_not_depend_on_who_was_heard_first():
    events = [error(0, LOST), error(1, "ValueError", "x"), ended(0, 143), ended(1, 143)]
    said = set()
    for seed in range(20):
        random.Random(seed).shuffle(events)
        said.add(str(outcome(*events).error()))
    assert said == {"rank 1: ValueError: x (line 3 of the cell); rank 0 was ended with it"}


def test_ranks_that_fail_alike_are_named_together():
    three = [error(rank, "KeyError", "'a'") for rank in (2, 0)]
    assert str(outcome(*three, size=4).error()).startswith("ranks 0 and 2: KeyError: 'a' (line 3")
    assert str(outcome(*three, size=4).error()).endswith("; ranks 1 and 3 were ended with it")


def test_a_rank_that_was_ended_while_it_left_early_is_not_taken_for_a_killed_one():
    said = outcome(error(0, LOST), ended(1, 143), ended(0, 143), reason="failed").error()
    assert str(said).endswith("because rank 1 had already come to the end")


def test_what_horovod_says_of_calls_that_do_not_fit_is_passed_on():
    shapes = "Mismatched ALLREDUCE tensor shapes: One rank sent [2], another rank sent [3]."
    said = outcome(error(0, LOST, shapes), error(1, LOST, shapes)).error()
    assert str(said) == f"every rank: {LOST}: {shapes} (line 3 of the cell)"


def test_a_stop_by_the_reader_is_no_failure_whatever_the_codes():
    assert isinstance(outcome(ended(0, 143), reason="stopped").error(), RanksStopped)


def test_horovodrun_s_own_words_are_passed_on():
    said = {"event": "said", "text": "horovodrun: no such host: faraway\n"}
    assert str(outcome(said).error()) == (
        "horovodrun could not run the cell: no such host: faraway"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with exit code 3"),
        (137, "was killed by SIGKILL, exit code 137 (by somebody, or by the system when memory ran out)"),  # noqa: E501
        (139, "was killed by SIGSEGV, exit code 139 (a crash in compiled code)"),
        (143, "was killed by SIGTERM, exit code 143"),
        (255, "ended with exit code 255"),
    ],
)  # fmt: skip
def test_exit_codes_in_words(code, words):
    assert how(code) == words


def test_lists_of_ranks():
    assert [ranks([1]), ranks([0, 1]), ranks([0, 2, 3])] == ["rank 1", "ranks 0 and 1", "ranks 0, 2 and 3"]  # noqa: E501  # fmt: skip


# ---- horovodrun's output, cut into lines ---------------------------------------------------------


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n\r["))


@given(st.lists(st.tuples(st.integers(0, 11), TEXT)), st.data())
def test_lines_are_the_same_however_they_arrive(lines, data):
    sent = "".join(f"[{rank}]<stdout>:{text}\n" for rank, text in lines).encode()
    reader, got, at = Lines(), [], 0
    while at < len(sent):
        step = data.draw(st.integers(1, 40))
        got += reader.feed(sent[at : at + step])
        at += step
    assert got + reader.feed(b"") == [(rank, text + "\n") for rank, text in lines]


def test_a_killed_rank_s_unfinished_line_is_its_own():
    reader = Lines()
    got = reader.feed(b"[1]<stdout>:half a li[0]<stdout>:whole\nProcess 1 exit with")
    assert got == [(1, "half a li\n"), (0, "whole\n")]
    assert reader.feed(b"") == [(None, "Process 1 exit with")]
    assert reader.feed(b"") == []


def test_progress_lines_end_with_a_carriage_return():
    assert Lines().feed(b"[0]<stderr>: 10%\r[0]<stderr>: 20%\r") == [(0, " 10%\r"), (0, " 20%\r")]
