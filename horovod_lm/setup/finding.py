"""A finding of the doctor."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """One line of the report: the verdict is "ok", "warn" or "fail"; the fix of "ok" is empty."""

    subject: str
    verdict: str
    message: str
    fix: str = ""
