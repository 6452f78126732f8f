"""Tally of the recipients of a report, and the findings about them."""

from dataclasses import dataclass, field
from typing import Final

from outbox.doctor.finding import Finding, note, ok, problem
from outbox.generate.recipients import Recipient, SharedAddresses, checked, label_of

SAMPLE_MAX: Final = 5  # recipients whose report is made, and thrown away
NAMED_MAX: Final = 10


@dataclass(slots=True)
class RecipientTally:
    """Tally of the rows of a recipients query."""

    count: int = 0
    is_cut: bool = False
    sample: list[Recipient] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    refused_count: int = 0
    twice: int = 0
    keys: set[str] = field(default_factory=set)
    addresses: SharedAddresses = field(default_factory=SharedAddresses)
    waived: frozenset[str] = frozenset()
    """Keys of recipients to whom nothing is owed: they need no address."""

    def take(self, recipient: Recipient) -> None:
        """Count one row, as generate would take it."""
        self.count += 1
        if self.waived and label_of(recipient) in self.waived:
            return
        try:
            owed = checked(recipient)
        except ValueError as error:
            self.refused_count += 1
            if len(self.refused) < NAMED_MAX:
                self.refused.append(f"key {recipient.key or '(none)'}: {str(error).rstrip('.')}")
            return
        if owed.key in self.keys:
            self.twice += 1
            return
        self.keys.add(owed.key)
        self.addresses.note(owed)
        if len(self.sample) < SAMPLE_MAX:
            self.sample.append(owed)

    def judge(self, check: str) -> Finding:
        """Judge the number of recipients, and keys that come twice."""
        people = f"the first {self.count}" if self.is_cut else str(self.count)
        if not self.count:
            return ok(check, "nobody is owed a report, which the settings allow")
        if self.twice:
            return note(
                check,
                f"{people} rows, {self.twice} of them with a key that came before: the first row counts",
                "return each key once, with distinct on (key) or without the join that doubles rows",
            )
        return ok(check, f"{people} with a key of their own")

    def judge_addresses(self, check: str, *, is_collected: bool) -> Finding:
        """Judge the addresses. In a digest, recipients who share an address share the email, too."""
        if self.refused_count:
            more = f" and {self.refused_count - len(self.refused)} more" if self.refused_count > NAMED_MAX else ""
            return problem(
                check,
                f"{self.refused_count} of {self.count} get no report: {'; '.join(self.refused)}{more}",
                "correct them where the recipients query reads; the others get theirs",
            )
        if self.addresses.count and not is_collected:
            return note(
                check,
                f"{self.addresses.count} belong to more than one key and get an email for each, "
                f"such as {self.addresses.first}",
                "return one row per person if that is not meant",
            )
        return ok(check, "all can be written to")
