"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was checked.
        verdict: "ok", "warn" or "fail".
        message: what was found.
        fix: what to do; empty when the verdict is ok.
    """

    subject: str
    verdict: str
    message: str
    fix: str = ""
