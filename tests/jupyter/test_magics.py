"""`%%horovodrun` on real ranks: what a cell shows, returns, and says when a rank fails."""

from __future__ import annotations

import re
import time

import psutil
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from horovod_lm.jupyter.run_cell.job_result import RankError
from horovod_lm.utils.errors import ConfigError, DistributedError
from tests.conftest import ROOT
from tests.jupyter.conftest import children

pytestmark = [pytest.mark.horovod, pytest.mark.usefixtures("nothing_left")]

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

    def run_cell(line: str, body: str) -> str:
        capsys.readouterr()
        result = shell.run_cell(f"%%horovodrun {line}\n{body}")
        shown = capsys.readouterr().out
        if not result.success:
            error = result.error_in_exec or result.error_before_exec
            error.shown = shown
            raise error
        return shown

    return run_cell


def test_lines_values_and_warnings_come_after_their_rank_whatever_they_hold(
    run, tmp_path, monkeypatch
):
    """Also where each Python prints at its start."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    body = (
        "import os, sys\nrank = os.environ['HOROVOD_RANK']\n"
        "for _ in range(2):\n    print(f'{rank}: [0.5]')\nprint('warned', file=sys.stderr)\n"
        "print('a\\x1eb [7]<stdout>:hello')\nprint('Process 0 exit with status code 3.')\n"
        "sys.stdout.buffer.write(b'\\xff\\n')\nprint('no end', end='', flush=True)"
    )
    expected = "".join(
        f"[{rank}] {line}\n"
        for rank in range(3)
        for line in (
            "welcome", f"{rank}: [0.5]", f"{rank}: [0.5]", "warned", "a\x1eb [7]<stdout>:hello",
            "Process 0 exit with status code 3.", "\ufffd", "no end",
        )
    )  # fmt: skip
    assert run("-np 3", body) == expected


def test_values_go_to_the_ranks_and_come_back(run, shell):
    shell.user_ns["double"] = lambda value: 2 * value  # a function of the notebook's own
    out = run(
        "-np 2 --push double --out results --threads 1",
        INIT + "class Result:\n    def __init__(self, *values):\n        self.values = values\n"
        "print(torch.get_num_threads())\nResult(double(hvd.rank()), bytes(5_000_000))",
    )
    assert out == "[0] 1\n[1] 1\n"
    assert [result.values for result in shell.user_ns["results"]] == [
        (0, bytes(5_000_000)), (2, bytes(5_000_000))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "line", "sentence"),
    [
        (ConfigError, "-np 0", r"-np 0: it must be at least 1"),
        (ConfigError, "-np 99999999999", r"99999999999 ranks are too many: with \d+ cores?, start"),
        (ConfigError, "--push nothing_there", r"--push nothing_there: there is no such name"),
        (UsageError, "--nodes 2", "unrecognized arguments: --nodes"),
        (UsageError, "--push 'a", "No closing quotation: --push 'a"),
        (DistributedError, "", r"cannot be given to the ranks: .*Not a directory"),
        (RankError, "", r"not Python: .*never closed \(line 3\); nothing was"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_starts_nothing(
    run, error, line, sentence, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    with pytest.raises(error, match=sentence) as caught:
        run(line, "x = 1\ny = (x,\n" if error is RankError else "1")
    assert children() == []
    if error is not UsageError:
        assert caught.value._render_traceback_()[-1] == f"{error.__name__}: {caught.value}"
    assert error is not RankError or "    y = (x,\n" in caught.value.trace


# ---- the failure table ---------------------------------------------------------------------------


@pytest.fixture
def fails(run, note_fault):
    """Run a cell that fails when all ranks are there; return its error, which comes in time."""

    def run_cell(body: str, sentence: str, options: str = "", limit: float = 0) -> RankError:
        with pytest.raises(RankError, match=sentence) as caught:
            run(f"-np 2 {options}", READY + body)
        ready = re.findall(r"READY ([\d.]+)", caught.value.shown)
        seconds = time.time() - max(map(float, ready))
        note_fault(seconds, caught.value)
        assert seconds < limit + SECONDS_TO_DETECT
        assert children() == []
        return caught.value

    return run_cell


FAILURES = {
    "exception everywhere": (
        "1 / 0",
        r"every rank: ZeroDivisionError: division by zero \(line 7 of the cell\)$",
    ),
    "shapes that differ": (
        "hvd.allreduce(torch.ones(2 + hvd.rank()), name='both')",
        r"every rank: HorovodInternalError: Mismatched ALLREDUCE tensor shapes.* \(line 7 of",
    ),
    "SIGKILL of another": (
        "if hvd.rank() == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n" + REDUCE,
        r"rank 1 was killed by SIGKILL, exit code 137 .*; rank 0 was ended with it",
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
}


@pytest.mark.parametrize("event", FAILURES)
def test_a_failing_rank_is_named_in_time(fails, event):
    fails(*FAILURES[event])


def test_an_exception_has_the_rank_s_own_traceback_with_the_cell_s_lines(fails):
    error = fails(
        "def divide(a, b):\n    return a / b\nif hvd.rank() == 1:\n    divide(1, 0)\n" + REDUCE,
        r"rank 1: ZeroDivisionError: division by zero \(line 8 of the cell\); rank 0 was",
    )
    # Python marks parts of a line in some versions: `divide(1, 0)` from 3.13 on.
    lines = [line for line in error.trace.splitlines() if line.strip(" ~^")]
    assert lines[:5] == [
        "Traceback (most recent call last):",
        '  File "<cell>", line 10, in <module>',
        "    divide(1, 0)",
        '  File "<cell>", line 8, in divide',
        "    return a / b",
    ]
    assert error.trace.count("Traceback") == 1 and "rank_cell" not in error.trace
    assert error.rank == 1


def test_a_rank_that_stays_away_is_named_by_the_stall_check(fails):
    error = fails(
        "if hvd.rank() == 1:\n    time.sleep(120)\n" + REDUCE,
        r"rank 1 did not come to 'together', where rank 0 waited for 2 s: every rank must",
        "--stall 2",
        limit=2,
    )
    # Times, places in Horovod's source and the number of its reports would differ each time.
    report = error.shown[error.shown.index("[0] Horovod") :].splitlines()
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
