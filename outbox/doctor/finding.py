"""What `outbox doctor` finds: values, a line each. Knows no socket and no database."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How good or bad a finding is. Only a fault needs a person."""

    OK = "ok"
    NOTE = "note"
    FAULT = "fault"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at (`smtp.tls`), how it is, and for all that is not ok the mend, if there is one."""

    check: str
    grade: Grade
    found: str
    mend: str = ""

    @property
    def sentence(self) -> str:
        """What was found, with its mend."""
        return f"{self.found}; {self.mend}." if self.mend else f"{self.found}."


def ok(check: str, found: str) -> Finding:
    """All is well here."""
    return Finding(check, Grade.OK, found)


def note(check: str, found: str, mend: str = "") -> Finding:
    """Worth knowing, and no fault."""
    return Finding(check, Grade.NOTE, found, mend)


def fault(check: str, found: str, mend: str) -> Finding:
    """Wrong, and this is the mend."""
    return Finding(check, Grade.FAULT, found, mend)


def fault_of(check: str, error: Exception) -> Finding:
    """A fault out of an error of ours, whose sentence ends in its mend."""
    sentence = str(error).replace("\n", " ").removeprefix(f"{check}: ").rstrip(".")
    found, _, mend = sentence.rpartition("; ")
    return Finding(check, Grade.FAULT, found or mend, mend if found else "")


def not_checked(checks: Iterable[str], why: str) -> list[Finding]:
    """Lines that another one keeps from being looked at."""
    return [Finding(check, Grade.UNKNOWN, f"not checked: {why}") for check in checks]
