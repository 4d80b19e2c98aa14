"""Ctrl-C as a request to stop: the run finishes the current step and saves a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any


class StopRequest:
    """Inside `with StopRequest() as stop:`, Ctrl-C, SIGTERM and SIGHUP set `stop.requested`.

    SIGHUP says that the terminal was closed. A signal that is ignored at the start, as `nohup` and
    a script's `&` do, remains ignored. A second signal raises KeyboardInterrupt. Outside the main
    thread, Python does not allow signal handlers, and only the caller sets `requested`.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        # Returns whether a checkpoint is being written; set by whoever writes them.
        self.saving: Callable[[], bool] = lambda: False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in self._SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._request)
        except ValueError:  # not in the main thread
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
