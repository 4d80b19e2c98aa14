"""`%%horovodrun` on real ranks: what a cell shows, brings back, and says when a rank fails."""

from __future__ import annotations

import re
import time

import psutil
import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from horovod_lm.jupyter.run_cell.job_result import RankError
from horovod_lm.jupyter.run_cell.rank_cell import execute
from horovod_lm.utils.errors import ConfigError, DistributedError
from tests.conftest import ROOT
from tests.jupyter.conftest import children, held, needs_horovod

pytestmark = [pytest.mark.horovod, needs_horovod, pytest.mark.usefixtures("nothing_left")]

INIT = "import os, signal, sys, time\nimport horovod.torch as hvd, torch\nhvd.init()\n"
REDUCE = "hvd.allreduce(torch.ones(1), name='together')\n"
# Starting is no part of detecting, so the ranks say when all of them are there.
READY = INIT + "hvd.barrier()\nprint('READY', time.time())\n"
SECONDS_TO_DETECT = 10


@pytest.fixture(scope="module")
def shell():
    made = InteractiveShell.instance()
    made.run_line_magic("load_ext", "horovod_lm.jupyter")
    yield made
    InteractiveShell.clear_instance()


@pytest.fixture
def run(shell, capsys):
    """Run a cell; return what it showed. An error is raised as the cell raised it."""

    def run_cell(line: str, body: str = "") -> str:
        magic = f"%%horovodrun {line}\n{body}" if body else f"%horovodrun {line}"
        capsys.readouterr()
        result = shell.run_cell(magic)
        shown = capsys.readouterr().out
        if not result.success:
            error = result.error_in_exec or result.error_before_exec
            error.shown = shown
            raise error
        return shown

    return run_cell


def test_lines_values_and_warnings_come_after_their_rank_in_order(run):
    body = (
        "import os, sys\nrank = os.environ['HOROVOD_RANK']\nfor line in range(2):\n"
        "    print(rank, line)\nprint('warned', file=sys.stderr)\nprint('on')\nint(rank) * 7"
    )
    expected = "".join(
        f"[{rank}] {line}\n"
        for rank in range(3)
        for line in (f"{rank} 0", f"{rank} 1", "warned", "on", 7 * rank)
    )
    assert run("-np 3", body) == expected


@pytest.mark.parametrize(("source", "shown"), [("6 * 7", "42\n"), ("6 * 7;\n", ""), ("None", "")])
def test_a_last_value_is_shown_unless_a_semicolon_follows(source, shown, capsys):
    assert execute(source, {}, "%%horovodrun", wanted=False) is None
    assert capsys.readouterr().out == shown


def test_values_go_to_the_ranks_and_come_back_by_rank(run, shell):
    shell.user_ns["weights"] = torch.arange(3.0)
    shell.user_ns["double"] = lambda value: 2 * value  # a function of the notebook's own
    out = run(
        "-np 2 --push weights,double --out results",
        INIT + "class Result:\n    def __init__(self, *values):\n        self.values = values\n"
        "mine = double(weights) * (hvd.rank() + 1)\nprint('on the way')\n"
        "Result(hvd.rank(), hvd.allreduce(mine, name='sum', op=hvd.Sum), bytes(5_000_000))",
    )
    assert out == "[0] on the way\n[1] on the way\n"
    for number, result in enumerate(shell.user_ns["results"]):
        rank, total, large = result.values
        assert rank == number and len(large) == 5_000_000
        assert torch.equal(total, torch.tensor([0.0, 6.0, 12.0]))


def test_a_value_that_cannot_travel_is_said(run):
    with pytest.raises(RankError, match="rank 0: TypeError: the last value, a lock, cannot be"):
        run("-np 1 --out lock", "import threading\nthreading.Lock()")


def test_a_command_runs_with_the_notebook_s_python_and_variables(run, shell):
    shell.user_ns["word"] = "hello"
    out = run("-np 2 python -c 'print(\"{word}\")'")
    assert out == "[0] hello\n[1] hello\n"
    with pytest.raises(RankError, match="rank 1 ended with exit code 3; rank 0 was ended with it"):
        run("-np 2 python -c 'import os, time; time.sleep(9) if os.environ[\"HOROVOD_RANK\"] == \"0\" else os._exit(3)'")  # noqa: E501  # fmt: skip


def test_options_reach_horovod(run, tmp_path):
    body = INIT + REDUCE + "print(os.environ['OMP_NUM_THREADS'], torch.get_num_threads())"
    timeline = tmp_path / "timeline.json"
    assert run(f"-np 1 --threads 1 --timeline {timeline}", body).split() == ["[0]", "1", "1"]
    assert "together" in timeline.read_text()


def test_output_is_text_whatever_it_holds(run, tmp_path, monkeypatch):
    """Also where each Python prints at its start."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    body = (
        "import os, sys\n"
        "for _ in range(2):\n    print('1: [0.5]')\n"
        "print('a\\x1eb [7]<stdout>:hello')\nprint('Process 0 exit with status code 3.')\n"
        "sys.stdout.buffer.write(b'\\xff\\n')\nprint('no end', end='', flush=True)"
    )
    lines = ["welcome", "1: [0.5]", "1: [0.5]", "a\x1eb [7]<stdout>:hello",
             "Process 0 exit with status code 3.", "\ufffd", "no end"]  # fmt: skip
    expected = "".join(f"[{rank}] {line}\n" for rank in range(2) for line in lines)
    assert run("-np 2", body) == expected


@pytest.mark.parametrize(
    ("line", "body", "sentence"),
    [
        ("-np 0", "1", r"-np 0: there must be at least one rank"),
        ("--push nothing_there", "1", r"--push nothing_there: there is no such name"),
        ("-np 2 python x.py", "1", r"its line has python x.py: write %horovodrun, with one"),
        ("-np 2", "", r"needs a command.*write %%horovodrun, with two"),
        ("-np 2 --out x python x.py", "", r"--out and --push need a cell"),
    ],
)
def test_a_wrong_line_is_one_sentence_and_starts_nothing(run, line, body, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        run(line, body)
    assert caught.value._render_traceback_() == [f"ConfigError: {caught.value}"]
    assert children() == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("-np two", "argument -np/--num-proc: invalid int value: 'two'"),
        ("--nodes 2", "unrecognized arguments: --nodes"),
        ("--push 'a", "No closing quotation: --push 'a"),
    ],
)
def test_a_line_that_cannot_be_read_is_an_error_of_usage(run, line, sentence):
    with pytest.raises(UsageError, match=sentence):
        run(line, "1")


def test_a_folder_that_cannot_be_written_is_one_sentence(run, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    with pytest.raises(DistributedError, match=r"cannot be given to the ranks: .*Not a directory"):
        run("-np 2", "1")


def test_a_syntax_error_is_found_before_anything_starts(run):
    with pytest.raises(RankError, match=r"not Python: .*never closed \(line 3\); nothing was") as e:
        run("-np 2", "x = 1\ny = (x,\n")
    assert "    y = (x,\n" in e.value.trace


# ---- the failure table ---------------------------------------------------------------------------


def seconds_since_ready(shown: str) -> float:
    return time.time() - max(float(found) for found in re.findall(r"READY ([\d.]+)", shown))


KILLED = r"rank {0} was killed by SIGKILL, exit code 137 .*; rank {1} was ended with it"
FAILURES = {
    "exception everywhere": (
        "1 / 0",
        r"every rank: ZeroDivisionError: division by zero \(line 7 of the cell\)$",
    ),
    "shapes that differ": (
        "hvd.allreduce(torch.ones(2 + hvd.rank()), name='both')",
        r"every rank: HorovodInternalError: Mismatched ALLREDUCE tensor shapes.* \(line 7 of",
    ),
    "SIGKILL of rank 0": (
        "if hvd.rank() == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\n" + REDUCE,
        KILLED.format(0, 1),
    ),
    "SIGKILL of another": (
        "if hvd.rank() == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n" + REDUCE,
        KILLED.format(1, 0),
    ),
    "SIGSTOP": (
        "if hvd.rank() == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n" + REDUCE,
        r"rank 1 was stopped \(SIGSTOP\), not woken for 3 s, and killed; rank 0 was ended with it",
    ),
    "early end": (
        "if hvd.rank() == 1:\n    sys.exit()\n" + REDUCE,
        r"rank 0 lost the others at line 9 of the cell, because rank 1 had already come to the end",
    ),
    "exit code": (
        "if hvd.rank() == 1:\n    sys.exit(3)\n" + REDUCE,
        r"rank 1 ended with exit code 3; rank 0 was ended with it",
    ),
    "crash": (
        "if hvd.rank() == 1:\n    os.abort()\n" + REDUCE,
        r"rank 1 was killed by SIGABRT, exit code 134 \(compiled code gave up\); rank 0 was ended",
    ),
}


@pytest.mark.parametrize("event", FAILURES)
def test_a_failing_rank_is_named_in_time(run, event, note_fault):
    body, sentence = FAILURES[event]
    with pytest.raises(RankError, match=sentence) as caught:
        run("-np 2", READY + body)
    seconds = seconds_since_ready(caught.value.shown)
    note_fault(seconds, caught.value)
    assert seconds < SECONDS_TO_DETECT
    assert children() == []


def test_an_exception_has_the_rank_s_own_traceback_with_the_cell_s_lines(run, note_fault):
    body = READY + "def divide(a, b):\n    return a / b\nif hvd.rank() == 1:\n    divide(1, 0)\n"
    sentence = r"rank 1: ZeroDivisionError: division by zero \(line 8 of the cell\); rank 0 was"
    with pytest.raises(RankError, match=sentence) as caught:
        run("-np 2", body + REDUCE)
    seconds = seconds_since_ready(caught.value.shown)
    note_fault(seconds, caught.value)
    assert seconds < SECONDS_TO_DETECT
    # Python marks parts of a line in some versions: `divide(1, 0)` from 3.13 on.
    lines = [line for line in caught.value.trace.splitlines() if line.strip(" ~^")]
    assert lines[:5] == [
        "Traceback (most recent call last):",
        '  File "<cell>", line 10, in <module>',
        "    divide(1, 0)",
        '  File "<cell>", line 8, in divide',
        "    return a / b",
    ]
    assert caught.value.trace.count("Traceback") == 1 and "rank_cell" not in caught.value.trace
    assert caught.value.rank == 1


def test_a_rank_that_stays_away_is_named_by_the_stall_check(run, note_fault):
    body = READY + "if hvd.rank() == 1:\n    time.sleep(120)\n" + REDUCE
    sentence = r"rank 1 did not come to 'together', where rank 0 waited for 4 s: every rank must"
    with pytest.raises(RankError, match=sentence) as caught:
        run("-np 2 --stall 4", body)
    seconds = seconds_since_ready(caught.value.shown)
    note_fault(seconds, caught.value)
    assert seconds < 4 + SECONDS_TO_DETECT
    # Times, places in Horovod's source and the number of its reports would differ each time.
    report = caught.value.shown[caught.value.shown.index("[0] Horovod") :].splitlines()
    assert sum(line.startswith("[0]") for line in report) == 3
    assert report[0].startswith("[0] Horovod: One or more tensors were submitted")
    assert report[1:3] == ["[0] Missing ranks:", "[0] 1: [allreduce.together]"]


def test_rank_0_is_shown_while_it_runs_and_an_interrupt_ends_every_rank(kernel):
    kernel.start(f"%%horovodrun -np 2\n{READY}print('both were there')\ntime.sleep(120)")
    kernel.read(lambda: "[0] both were there" in kernel.text)
    assert "[1]" not in kernel.text
    started = time.monotonic()
    kernel.manager.interrupt_kernel()
    kernel.read(lambda: False)
    assert time.monotonic() - started < SECONDS_TO_DETECT
    assert "[1] both were there" in kernel.text  # nothing that was printed is lost
    assert kernel.error["ename"] == "RanksStopped"
    assert kernel.error["evalue"] == "stopped by you: every rank of the cell was ended"
    assert psutil.Process(kernel.pid).children(recursive=True) == []
    assert "[1] still here" in kernel.run("%%horovodrun -np 2\nprint('still here')")


@pytest.mark.slow
def test_cells_in_a_row_leave_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run("-np 2", "pass")  # what is made once and kept: imports
    before = held()
    for _ in range(2):
        run("-np 2", "pass")
    assert held() == before
    assert children() == [] and list(tmp_path.rglob("*")) == []
