"""The ways in which outbox cannot go on. A class says what to do about it; a message is one sentence with the mend."""

from collections.abc import Sequence


class OutboxError(Exception):
    """Base of all errors that a user can meet; `exit_code` is what the command line answers with."""

    exit_code = 1


class ConfigurationError(OutboxError):
    """The settings cannot be used as they are; nothing was touched. `faults` holds one sentence each."""

    exit_code = 2

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class SchemaError(OutboxError):
    """The database's outbox schema is missing, older or newer than this code: `outbox init` or an upgrade mends it."""


class DatabaseUnavailableError(OutboxError):
    """Postgres does not answer or does not let us in; trying again later may help."""


class UnsafeDatabaseError(OutboxError):
    """Postgres, or what stands before it, cannot keep the promise (a pooler, a standby, fake locks): do not relay."""


class SourceError(OutboxError):
    """A report's source (its queries, templates or Python class) failed as a whole, not for one recipient."""


class TemplateUseError(ValueError):
    """A template uses a filter or phrase in a way that is not possible; the message says what to write instead.

    It belongs to one recipient's values, so the others go on; `template_errors.explain` adds file and line.
    """
