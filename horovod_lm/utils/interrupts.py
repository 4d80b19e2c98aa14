"""Ctrl-C as a request: the step in progress is finished, everything is saved, then the run ends."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """Inside `with StopRequest() as stop:`, Ctrl-C and SIGTERM set `stop.requested`.

    A second one raises KeyboardInterrupt at once. Outside the main thread signals stay with whoever
    owns them, and `requested` stays False unless it is set by hand.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in self._SIGNALS:
                self._before[number] = signal.signal(number, self._request)
        except ValueError:  # only the main thread may choose what a signal does
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
