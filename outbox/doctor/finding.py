"""Findings of `outbox doctor`: values, one line each. Knows no socket and no database."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """Grade of a finding. Only a problem needs a person."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "fault"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check (`smtp.tls`): how it is and, if it is not ok, the fix, as far as there is one."""

    check: str
    grade: Grade
    found: str
    fix: str = ""

    @property
    def sentence(self) -> str:
        """Return what was found, with its fix."""
        return f"{self.found}; {self.fix}." if self.fix else f"{self.found}."


def ok(check: str, found: str) -> Finding:
    """Return the finding of a check that passed."""
    return Finding(check, Grade.OK, found)


def note(check: str, found: str, fix: str = "") -> Finding:
    """Return a finding that is worth knowing and no problem."""
    return Finding(check, Grade.NOTE, found, fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """Return a finding that needs a person, with its fix."""
    return Finding(check, Grade.PROBLEM, found, fix)


def problem_of(check: str, error: Exception) -> Finding:
    """Return the problem that an error of outbox is about; its sentence ends in the fix, after a semicolon."""
    sentence = str(error).replace("\n", " ").removeprefix(f"{check}: ").rstrip(".")
    found, _, fix = sentence.rpartition("; ")
    return Finding(check, Grade.PROBLEM, found or fix, fix if found else "")


def not_checked(checks: Iterable[str], why: str) -> list[Finding]:
    """Return findings for checks that another finding makes impossible."""
    return [Finding(check, Grade.UNKNOWN, f"not checked: {why}") for check in checks]
