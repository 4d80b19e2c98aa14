"""The ipyparallel engines that live ranks stand on: this host's own, or those of a client."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import ipyparallel
from IPython.core.profiledir import ProfileDir

from horovod_lm.jupyter import engine_side
from horovod_lm.jupyter.call import inherited
from horovod_lm.jupyter.outcome import how
from horovod_lm.jupyter.processes import Processes
from horovod_lm.utils.errors import DistributedError

SECONDS_TO_START = 60.0


class Engines:
    """Engines whose processes are started here, and end with the notebook.

    Args:
        size: how many.
        threads: CPU threads of each.
        address: this host's, as the engines reach it. Nothing listens anywhere else.

    Attributes:
        ids: ipyparallel's numbers, by rank.
        processes: theirs, named `rank 0`, `rank 1`, ...
    """

    def __init__(self, size: int, threads: int, address: str = "127.0.0.1") -> None:
        self.size, self.ids = size, list[int]()
        self._threads, self._starts = threads, 0
        self._tokens: dict[int, str] = {}
        self._client: ipyparallel.Client | None = None
        self._asked: dict[int, ipyparallel.AsyncResult] = {}
        self.processes = self._make_processes()
        # Both sides would make the folders of a profile at the same time.
        ProfileDir.create_profile_dir(str(self.processes.folder))
        self._start_all()
        profile = f"--profile-dir={self.processes.folder}"
        command = [
            sys.executable, "-m", "ipyparallel.controller", profile, "--usethreads", "--nodb",
            "--ping=1000", f"--ip={address}", "--log-level=ERROR",
        ]  # fmt: skip
        self.processes.start("controller", command, inherited())

    def revive(self) -> None:
        """Replace engines that are dead or frozen, and wait until all are there.

        Raises:
            DistributedError: one did not come.
        """
        for name in set(self.processes.frozen) & {name_of(rank) for rank in range(self.size)}:
            self.processes.kill(name)
            self._wait(lambda name=name: name in self.processes.codes, f"{name}'s end", [name])
        for rank in range(self.size):
            if name_of(rank) in self.processes.codes:
                self._start(rank)
        connection = self.processes.folder / "security" / "ipcontroller-client.json"
        if self._client is None:
            self._wait(lambda: engine_side.whole_json(connection) != "", "the controller")
            self._client = ipyparallel.Client(str(connection), timeout=SECONDS_TO_START)
        self._wait(self._all_came, "an engine")

    def send(self, rank: int, call: partial) -> ipyparallel.AsyncResult:
        """Ask one engine for a call, and return at once."""
        return self._client[self.ids[rank]].apply_async(call.func, *call.args)

    def host_names(self) -> list[str]:
        """Return the host of each engine."""
        return ["localhost"] * self.size

    def missing(self) -> list[int]:
        """Return the ranks whose engines have died."""
        return [rank for rank in range(self.size) if name_of(rank) in self.processes.codes]

    def interrupt(self) -> None:
        """Interrupt every engine."""
        for rank in range(self.size):
            self.processes.interrupt(name_of(rank))

    def close(self) -> None:
        """End every process, and return when they are gone."""
        if self._client is not None:
            self._client.close()
        self.processes.close()

    def _make_processes(self) -> Processes:
        return Processes(self._process_ends)

    def _start_all(self) -> None:
        for rank in range(self.size):
            self._start(rank)

    def _start(self, rank: int) -> None:
        command = engine_command(self.processes.folder, self._new_token(rank))
        self.processes.start(name_of(rank), command, self._env())

    def _new_token(self, rank: int) -> str:
        """Return what nobody but a rank's newest engine is called."""
        self._starts += 1
        self._tokens[rank] = f"{rank}.{self._starts}"
        return self._tokens[rank]

    def _env(self) -> dict[str, str]:
        paths = os.pathsep.join(path for path in sys.path if path)
        return {**inherited(), "OMP_NUM_THREADS": str(self._threads), "PYTHONPATH": paths}

    def _process_ends(self, name: str, code: int) -> None:
        """Hear of an end; that of an engine says nothing here of the others."""

    def _all_came(self) -> bool:
        """Ask newcomers who they are; return whether every rank has its newest engine."""
        for engine in set(self._client.ids) - set(self._asked):
            self._asked[engine] = self._client[engine].apply_async(engine_side.token)
        answered = {
            result.get(): engine
            for engine, result in self._asked.items()
            if result.ready() and result.successful()
        }
        wanted = [self._tokens[rank] for rank in range(self.size)]
        self.ids = [answered[token] for token in wanted if token in answered]
        return len(self.ids) == self.size

    def _wait(self, condition: Callable[[], bool], what: str, ends: Collection[str] = ()) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not condition():
            for name, code in list(self.processes.codes.items()):
                if name not in ends:
                    last = "".join(self.processes.log(name).strip().splitlines()[-1:])
                    raise DistributedError(f"{name} {how(code)} before it was ready: {last}")
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"{what} did not come within {SECONDS_TO_START:g} s: call cluster.stop() and"
                    " cluster.start() when the machine has less to do"
                )
            time.sleep(0.02)


class ClientsEngines:
    """Engines that somebody else has started, on one host or on several.

    Args:
        client: connected to them.
    """

    processes = None  # they are not ours to watch or to end

    def __init__(self, client: ipyparallel.Client) -> None:
        self._client = client
        self.ids = list(client.ids)
        self.size = len(self.ids)

    def revive(self) -> None:
        """Note which engines are there now: as many as at first.

        Raises:
            DistributedError: some are missing, or do not answer.
        """
        alive = list(self._client.ids)
        kept = [engine for engine in self.ids if engine in alive]
        new = [engine for engine in alive if engine not in self.ids]
        self.ids = [*kept, *new][: self.size]
        if len(self.ids) < self.size:
            raise DistributedError(
                f"{len(self.ids)} of {self.size} engines are there: start the missing ones where"
                " they were started, then call cluster.restart_ranks()"
            )
        # Horovod: one engine that does not come to its start takes the others down.
        self.host_names()

    def send(self, rank: int, call: partial) -> ipyparallel.AsyncResult:
        """Ask one engine for a call, and return at once."""
        return self._client[self.ids[rank]].apply_async(call.func, *call.args)

    def host_names(self) -> list[str]:
        """Return the host of each engine.

        Raises:
            DistributedError: one does not answer.
        """
        asked = [self._client[one].apply_async(engine_side.hostname) for one in self.ids]
        names: list[Any] = []
        for engine, answer in zip(self.ids, asked, strict=True):
            try:
                names.append(answer.get(10))
            except (TimeoutError, ipyparallel.TimeoutError, ipyparallel.RemoteError):
                raise DistributedError(
                    f"engine {engine} does not answer: end it, start another one in its place, and"
                    " call cluster.restart_ranks()"
                ) from None
        return names

    def missing(self) -> list[int]:
        """Return the ranks whose engines have left their controller."""
        there = set(self._client.ids)
        return [rank for rank, engine in enumerate(self.ids) if engine not in there]

    def interrupt(self) -> None:
        """Interrupt every engine."""
        self._client.send_signal(signal.SIGINT, targets=self.ids, block=False)

    def close(self) -> None:
        """End Horovod on the engines, and leave them to whom they belong."""
        for rank in set(range(len(self.ids))) - set(self.missing()):
            self.send(rank, partial(engine_side.end_rank))


def engine_command(folder: Path, token: str) -> list[str]:
    """Return the call of one engine.

    Args:
        folder: where it finds the controller's address.
        token: what it is called.
    """
    return [
        sys.executable, "-m", engine_side.__name__, token,
        f"--profile-dir={folder}", f"--IPEngine.wait_for_url_file={SECONDS_TO_START}",
        "--IPEngine.enable_nanny=False", "--IPEngine.timeout=30", "--log-level=ERROR",
    ]  # fmt: skip


def name_of(rank: int) -> str:
    """Return the name of a rank's process."""
    return f"rank {rank}"
