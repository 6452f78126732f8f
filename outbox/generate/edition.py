"""An edition: one report for one period, and the definition of its periods that the whole fleet shares."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import DateTime, bindparam, text

from outbox.errors import ConfigurationError
from outbox.reports.period import Covers, Period, in_words, period_at, period_of, spoken_time
from outbox.reports.timezones import canonical
from outbox.settings import EditionSettings, table_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Edition:
    """One report for one period, as the database knows it; `id` is 0 if it is not in the database yet."""

    id: int
    report: str
    period: Period

    @property
    def name(self) -> str:
        """Return the name for people: `progress 2026-W48`."""
        return f"{self.report} {self.period.key}"


DEFINE: Final = text("""
INSERT INTO outbox.definition (report, cadence, covers, timezone)
VALUES (:report, :cadence, :covers, :timezone) ON CONFLICT (report) DO NOTHING
""")

REDEFINE: Final = text("""
INSERT INTO outbox.definition (report, cadence, covers, timezone)
VALUES (:report, :cadence, :covers, :timezone)
ON CONFLICT (report) DO UPDATE
   SET cadence = excluded.cadence, covers = excluded.covers, timezone = excluded.timezone, defined_at = now()
""")

DEFINITION: Final = text("SELECT cadence, covers, timezone FROM outbox.definition WHERE report = :report")

# The row that is there already comes back from FIND, a statement of its own, which sees what the first one waited for.
OPEN: Final = text("""
INSERT INTO outbox.edition (report, period, starts_at, ends_at)
VALUES (:report, :period, :starts_at, :ends_at) ON CONFLICT (report, period) DO NOTHING
""")

# A row that was written by hand may have times that Python cannot represent; within these bounds any time zone works.
FIND: Final = text("""
SELECT id, least(greatest(starts_at, '0001-01-03 00:00+00'), '9999-12-29 00:00+00') AS starts_at,
       least(greatest(ends_at, '0001-01-03 00:00+00'), '9999-12-29 00:00+00') AS ends_at
  FROM outbox.edition WHERE report = :report AND period = :period
""")

# The result of a complete look. Of two looks that overlap, the one that began later counts, whichever ends first; one
# from the future is of a database whose clock was ahead. An edition that was complete is not while it has more
# recipients than before, one without a report, or a report that was made since.
EXPECT: Final = text("""
UPDATE outbox.edition
   SET expected = :expected, looked_at = :looked_at, may_be_empty = :may_be_empty,
       completed_at = CASE WHEN CAST(:expected AS bigint) > coalesce(expected, 0) OR CAST(:failed AS bigint) > 0
                                OR (CAST(:made AS bigint) > 0 AND completed_at < :looked_at) THEN NULL
                           ELSE completed_at END
 WHERE id = :id AND (looked_at IS NULL OR looked_at <= :looked_at OR looked_at > now())
""").bindparams(bindparam("looked_at", type_=DateTime(timezone=True)))

# An empty look that should not be empty. What an earlier look found stays.
EMPTY: Final = text("""
UPDATE outbox.edition SET expected = 0, may_be_empty = false
 WHERE id = :id AND coalesce(expected, 0) = 0 AND NOT EXISTS (SELECT FROM outbox.report r WHERE r.edition = :id)
""")

# A person's declaration that another system made the edition; null if there is none.
DECLARED: Final = text("""
SELECT done_elsewhere_at, done_elsewhere_by, done_elsewhere_why FROM outbox.edition WHERE id = :id
""")


def _definition(name: str, report: EditionSettings) -> dict[str, Any]:
    return {
        "report": name,
        "cadence": report.cadence.value,
        "covers": report.covers.value,
        "timezone": report.timezone,
    }


@dataclass(frozen=True, slots=True)
class Declared:
    """A person's declaration that another system made an edition, so that generate does not make it."""

    at: datetime
    who: str
    why: str

    @classmethod
    def of(cls, row: Any) -> "Declared | None":
        """Return the declaration in a row of DECLARED, or None if the edition has none."""
        at, who, why = row
        return None if at is None else cls(at, who or "a person", why or "")

    @property
    def sentence(self) -> str:
        """Return the person, the time and the reason, as the end of a sentence."""
        return f"declared as done elsewhere by {self.who} at {spoken_time(self.at)}{self.why and f' ({self.why})'}"


async def plan_edition(
    connection: "AsyncConnection",
    name: str,
    report: EditionSettings,
    period_key: str | None,
    *,
    early: bool = False,
    asker: str = "--period",
) -> Edition:
    """Return the edition to generate now, or the one that `period_key` names. Nothing is written.

    The period comes from the database's clock: servers whose clocks differ agree around midnight. `early` allows a
    period that has not ended; `asker` is the option or argument with the key.

    Raises:
        ConfigurationError: the key is not a period or its period has not ended, or this server's cadence, covers or
            timezone are not the fleet's.

    """
    async with connection.begin():
        agreed = (await connection.execute(DEFINITION, {"report": name})).mappings().one_or_none()
        if agreed is not None:
            _refuse_other_definition(name, report, agreed)
        now = await connection.scalar(text("SELECT now()"))
        period = period_for(name, report, period_key, now, asker=asker)
        if not early and (objection := too_early(report, period, now)) is not None:
            raise ConfigurationError(f"{asker}, for report {name}: {objection}")
        found = await _find(connection, name, period.key)
    return Edition(0, name, period) if found is None else Edition(found[0], name, found[1])


def too_early(report: EditionSettings, period: Period, now: datetime) -> str | None:
    """Return why an edition of this period should not be made yet, with the fix; None if its time has come.

    The running period is refused, too, unless the report covers the current one.
    """
    if period.ends_at <= now or (report.covers is Covers.CURRENT and period.starts_at <= now):
        return None
    state = "has not begun" if period.starts_at > now else "is not over"
    return (
        f"{period.key} {state} ({in_words(period, report.zone)}), and its edition is made only once; wait for its end, "
        "or add --early to make it from the data of this moment."
    )


async def open_edition(connection: "AsyncConnection", name: str, report: EditionSettings, period: Period) -> Edition:
    """Return the edition of this period, made if it is new.

    Raises:
        ConfigurationError: this server's cadence, covers or timezone are not the fleet's.

    """
    async with connection.begin():
        await connection.execute(DEFINE, _definition(name, report))
        agreed = (await connection.execute(DEFINITION, {"report": name})).mappings().one()
        _refuse_other_definition(name, report, agreed)
        values = {"report": name, "period": period.key}
        await connection.execute(OPEN, {**values, "starts_at": period.starts_at, "ends_at": period.ends_at})
        row = (await connection.execute(FIND, values)).mappings().one()
    return Edition(row["id"], name, Period(period.key, row["starts_at"], row["ends_at"]))


async def find_edition(
    connection: "AsyncConnection", name: str, report: EditionSettings, period_key: str | None, *, asker: str = "PERIOD"
) -> tuple[int | None, Period]:
    """Return the period that `open_edition` would give, and the edition's id if it was ever opened; nothing is made.

    The transaction is the caller's; `asker` is the option or argument with the key. An edition that is there is found
    under its own key whatever the report's cadence is by now.

    Raises:
        ConfigurationError: as `open_edition`.

    """
    agreed = (await connection.execute(DEFINITION, {"report": name})).mappings().one_or_none()
    if agreed is not None:
        _refuse_other_definition(name, report, agreed)
    if period_key is not None and (found := await _find(connection, name, period_key)):
        return found
    period = period_for(name, report, period_key, await connection.scalar(text("SELECT now()")), asker=asker)
    return await _find(connection, name, period.key) or (None, period)


async def _find(connection: "AsyncConnection", name: str, period_key: str) -> tuple[int, Period] | None:
    row = (await connection.execute(FIND, {"report": name, "period": period_key})).mappings().one_or_none()
    return None if row is None else (row["id"], Period(period_key, row["starts_at"], row["ends_at"]))


def period_for(
    name: str, report: EditionSettings, period_key: str | None, now: Any, *, asker: str = "--period"
) -> Period:
    """Return the period that a key names, or without one the period to make at `now`, by these settings alone.

    `asker` is the option or argument with the key.

    Raises:
        ConfigurationError: the key is not a period.

    """
    if period_key is None:
        return period_at(now, cadence=report.cadence, timezone=report.zone, covers=report.covers)
    try:
        return period_of(period_key, cadence=report.cadence, timezone=report.zone)
    except ValueError as error:
        raise ConfigurationError(f"{asker}, for report {name}: {error}") from error


def _refuse_other_definition(name: str, report: EditionSettings, agreed: Any) -> None:
    mine = _definition(name, report)
    other = [
        f"{key} = {agreed[key]!r} (here {mine[key]!r})"
        for key in ("cadence", "covers", "timezone")
        if agreed[key] != mine[key] and not (key == "timezone" and canonical(agreed[key]) == canonical(mine[key]))
    ]
    if other:
        raise ConfigurationError(
            f"{table_of(name)}: the fleet generates this report with {', '.join(other)}; correct it here, "
            f"or run `outbox init --redefine {name}` to change it for the fleet."
        )


async def redefine(connection: "AsyncConnection", name: str, report: EditionSettings) -> None:
    """Make this server's cadence, covers and timezone the fleet's, from the next edition on."""
    async with connection.begin():
        await connection.execute(REDEFINE, _definition(name, report))
