"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        verdict: "ok", "warn" or "fail".
        says: what was found.
        cure: how to mend it; empty when the verdict is ok.
    """

    subject: str
    verdict: str
    says: str
    cure: str = ""
