"""An edition: one report for one period, and the definition of its periods that the whole fleet shares."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from outbox.errors import ConfigurationError
from outbox.period import Period, period_at, period_of
from outbox.settings import EditionSettings, table_of
from outbox.timezones import canonical

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Edition:
    """One report for one period, as the database knows it."""

    id: int
    report: str
    period: Period

    @property
    def name(self) -> str:
        """As people say it: `progress 2026-W48`."""
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

# An edition that was complete is not while more people are owed it than before.
EXPECT: Final = text("""
UPDATE outbox.edition
   SET expected = :expected,
       completed_at = CASE WHEN CAST(:expected AS bigint) > coalesce(expected, 0) THEN NULL ELSE completed_at END
 WHERE id = :id AND expected IS DISTINCT FROM :expected
""")


def _definition(name: str, report: EditionSettings) -> dict[str, Any]:
    return {
        "report": name,
        "cadence": report.cadence.value,
        "covers": report.covers.value,
        "timezone": report.timezone,
    }


async def open_edition(
    connection: "AsyncConnection", name: str, report: EditionSettings, period_key: str | None
) -> Edition:
    """The edition to generate now, or the one that `period_key` names; made if it is new.

    The period comes from the database's clock: servers whose clocks differ agree around midnight.

    Raises:
        ConfigurationError: the key is none, or this server's cadence, covers or timezone are not the fleet's.

    """
    async with connection.begin():
        await connection.execute(DEFINE, _definition(name, report))
        agreed = (await connection.execute(DEFINITION, {"report": name})).mappings().one()
        _refuse_other_definition(name, report, agreed)
        now = await connection.scalar(text("SELECT now()"))
        period = period_for(name, report, period_key, now)
        values = {"report": name, "period": period.key}
        await connection.execute(OPEN, {**values, "starts_at": period.starts_at, "ends_at": period.ends_at})
        row = (await connection.execute(FIND, values)).mappings().one()
    return Edition(row["id"], name, Period(period.key, row["starts_at"], row["ends_at"]))


async def find_edition(
    connection: "AsyncConnection", name: str, report: EditionSettings, period_key: str | None, *, asker: str = "PERIOD"
) -> tuple[int | None, Period]:
    """The edition that `open_edition` would give, and its id if it was ever opened; nothing is made.

    The transaction is the caller's; `asker` is what the user wrote the key after. An edition that is there is found
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
    """The period that a key names, or without one the period to make at `now`, as these settings alone say.

    Raises:
        ConfigurationError: the key is none; `asker` is what the user wrote it after.

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
