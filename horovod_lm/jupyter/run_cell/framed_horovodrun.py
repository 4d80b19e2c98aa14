"""horovodrun, except that it reports what each rank prints instead of printing it.

    python -m horovod_lm.jupyter.run_cell.framed_horovodrun -np 2 python train.py

horovodrun prints `[1]<stdout>:text`, which a rank can print as well, and its own lines in between.
Here each line of a rank is an event, written to the descriptor that HOROVOD_LM_EVENTS names; so is
the exit code of a rank that fails:

    {"event": "output", "rank": 1, "text": "a line\\n"}
    {"event": "rank_ended", "rank": 1, "code": 3}
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVENTS_VARIABLE = "HOROVOD_LM_EVENTS"
SECONDS_TO_AGREE = 1.0  # after a failure, for other ranks to fail with errors of their own
LONGEST_LINE = 2**16  # characters; a longer one is reported in pieces
SHELL_REPORTS = ("Killed\n", "Terminated\n")  # by the shell that started a killed rank
_END_OF_LINE = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")


def frame_output(report: Callable[..., None], seconds_to_agree: float) -> None:
    """Make horovodrun report the output of ranks, and the exit codes of those that fail.

    Args:
        report: takes an event's name and its values.
        seconds_to_agree: delay before horovodrun hears of a failure and ends the other ranks.
    """
    from horovod.runner.common.util import safe_shell_exec

    forward, execute = safe_shell_exec.prefix_connection, safe_shell_exec.execute

    def framed_forward(
        source: Any, stream: Any, prefix: str, rank: int | None, timestamp: bool
    ) -> None:
        if rank is None:  # a command of horovodrun's own
            forward(source, stream, prefix, rank, timestamp)
            return
        held = ""
        for line in _lines(source.fileno()):
            if held:
                report("output", rank=rank, text=held)
            held = line if prefix == "stderr" and line in SHELL_REPORTS else ""
            if not held:
                report("output", rank=rank, text=line)
        source.close()

    def framed_execute(*args: Any, index: int | None = None, **options: Any) -> int:
        code = execute(*args, index=index, **options)
        if index is not None and code:
            report("rank_ended", rank=index, code=code if code >= 0 else 128 - code)
            time.sleep(seconds_to_agree)
        return code

    safe_shell_exec.prefix_connection = framed_forward
    safe_shell_exec.execute = framed_execute


def _lines(pipe: int) -> Iterator[str]:
    """Yield the lines that come from a pipe; a missing newline at the end is added."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := os.read(pipe, LONGEST_LINE):
        *lines, rest = _END_OF_LINE.split(rest + decoder.decode(chunk))
        yield from lines
        if len(rest) > LONGEST_LINE:
            yield rest
            rest = ""
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest + "\n"


def main() -> int | None:
    """Run horovodrun's command line."""
    events = int(os.environ.pop(EVENTS_VARIABLE))
    lock = threading.Lock()

    def report(event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        with lock:
            try:
                while line:
                    line = line[os.write(events, line) :]
            except OSError:  # the notebook is gone, and horovodrun will be ended
                pass

    elastic = "--host-discovery-script" in sys.argv
    frame_output(report, 0.0 if elastic else SECONDS_TO_AGREE)
    from horovod.runner.launch import run_commandline

    sys.argv[0] = "horovodrun"
    return run_commandline()


if __name__ == "__main__":
    # Each rank is started by a process that imports this module again, so it imports no Horovod.
    sys.exit(main())
