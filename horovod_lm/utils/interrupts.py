"""Ctrl-C as a request to stop: the run finishes the current step and saves a checkpoint."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """Inside `with StopRequest() as stop:`, Ctrl-C and SIGTERM set `stop.requested`.

    A second signal raises KeyboardInterrupt. Outside the main thread, Python does not allow signal
    handlers, and only the caller sets `requested`.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in self._SIGNALS:
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
