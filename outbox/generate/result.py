"""Result of one run of generate for one edition."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from outbox.generate.batch_writer import Written
from outbox.generate.edition import Declared, Edition
from outbox.generate.recipients import Window


@dataclass(slots=True)
class Result:
    """Counts of one run for one edition. `failed` has the reasons by recipient key.

    `made` counts reports that this run made, `found` those that were there when it looked for the first time, and
    `present` all that are there now. `waiting` are reports that wait for the next digest when one is closed.
    `suppressed` are recipients whose address is on the suppression list: they have a report, and no email is sent to
    them. `waived` are recipients to whom nothing is owed for this edition, as a person has decided: no report is made
    for them. With `declared` another system made the edition, so that nothing is made here.
    """

    edition: Edition
    expected: int = 0
    made: int = 0
    found: int = 0
    present: int = 0
    waiting: int = 0
    suppressed: int = 0
    waived: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    declared: Declared | None = None
    _is_resumed: bool = False
    """An earlier pass of the run has counted `found`, and then lost its session."""
    _present_before: int = 0
    """Of the windows before this one."""
    _is_new_window: bool = False

    def resumed(self, edition: Edition) -> "Result":
        """Return the result of another pass of the run, whose session was lost; it goes on from the counts here."""
        has_found = self._is_resumed or self.expected > 0
        return Result(edition, made=self.made, found=self.found if has_found else 0, _is_resumed=has_found)

    @property
    def elsewhere(self) -> int:
        """Number of recipients whose report is there and was not made by this run."""
        return max(self.present - self.made, 0)

    @property
    def already(self) -> int:
        """Number of reports that earlier runs, or other servers, had made when this run looked for the first time."""
        return min(self.found, self.elsewhere)

    def open(self, edition: Edition, declared: Declared | None) -> None:
        """Replace the planned edition with the one in the database."""
        if declared is None:
            self.edition = edition
        self.declared = declared

    def begin_window(self, window: Window) -> None:
        """Count the recipients of a window."""
        self.expected += len(window.wanted) + len(window.failed) + len(window.waived)
        self.failed |= window.failed
        self.waived |= window.waived
        self._present_before, self._is_new_window = self.present, True

    def note_look(self, wanted: Collection[str], missing: Collection[str]) -> int:
        """Count the reports of the window's recipients that are there; return how many of these have failed here."""
        failed = sum(key in self.failed for key in wanted)
        present = len(wanted) - failed - len(missing)
        self.present = self._present_before + present
        if self._is_new_window and not self._is_resumed:  # what was made since the run began is not what it found
            self.found += present
        self._is_new_window = False
        return failed

    def note_written(self, written: Written) -> None:
        """Count reports that were made here, and add the reasons why others were not."""
        self.made += written.made
        self.failed |= written.failed

    def note_withdrawn(self, count: int) -> None:
        """Subtract recipients to whom nothing is owed any more."""
        self.expected -= count

    def note_failed(self, reasons: Mapping[str, str]) -> None:
        """Add recipients without a report."""
        self.failed |= reasons

    def note_made_elsewhere(self, keys: Collection[str]) -> None:
        """Count recipients who failed here and have a report now as present."""
        for key in keys:
            del self.failed[key]
        self.present += len(keys)

    def note_end(self, *, suppressed: int, waiting: int) -> None:
        """Set the counts that are known at the end."""
        self.suppressed, self.waiting = suppressed, waiting


Progress = Callable[[Result], None]
