"""Decisions of a person: shown first, with all that they would touch; then done as the commands do it, and recorded.

The functions, and so the laws and the trail, are those of `outbox retry`, `cancel`, `resolve`, `waive`, `pause` and
`resume`.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from outbox.database.connection import Connection
from outbox.database.pause_list import Pause, label, read_pauses
from outbox.errors import DatabaseUnavailableError, OutboxError
from outbox.mail.delivery_state import DeliveryState
from outbox.operations.email_filter import name as name_all
from outbox.operations.pause import begin_pause, end_pause, is_known
from outbox.operations.resolve import Decision, resolve
from outbox.operations.resolve import explain as explain_decision
from outbox.operations.retry_cancel import explain as explain_act
from outbox.operations.retry_cancel import operate
from outbox.operations.waive import Owed, unreached_of, waive
from outbox.web.board.auth import User
from outbox.web.board.context import BoardContext
from outbox.web.board.decision_scope import (
    ACTS,
    COMMANDS,
    DECISIONS,
    NAMED_MAX,
    Email,
    fitting,
    named,
    picked,
    seen_of,
    selection_of,
    target_of,
)
from outbox.web.responses import bigint

WHY_MAX: Final = 500
NOT_WHOLE: Final = "The form is not whole; look again and decide again."
AT_MAX: Final = 32503680000  # the year 3000; a form of ours says no later moment
DONE: Final = {
    "retry": "retried", "cancel": "cancelled", "sent": "said to have arrived", "resend": "sent again",
    "discard": "let be", "waive": "owed nothing", "pause": "paused", "resume": "resumed",
}  # fmt: skip
FILTERS: Final = ("report", "period", "to", "state")


@dataclass(slots=True)
class Outcome:
    """Result of a decision: how many were changed, the first of them by name, and a sentence for each that was left."""

    done: int = 0
    keys: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class Deciding:
    """POST /confirm and POST /decide."""

    def __init__(self, board: BoardContext) -> None:
        self.board = board

    async def confirm(self, request: Request, user: User, fields: dict[str, str]) -> Response:
        """Show what would be done; change nothing."""
        return await self._confirm(request, user, fields)

    async def _confirm(self, request: Request, user: User, fields: dict[str, str], fault: str = "") -> Response:
        act = fields.get("act", "")
        try:
            async with self.board.store.connection() as connection:
                shown = await self._shown(connection, act, fields)
        except DatabaseUnavailableError:
            raise
        except OutboxError as error:
            return self._said(request, user, act, Outcome(others=[str(error)]), status=400)
        return self.board.page(
            request, "board/confirm.html.j2", user, section="", title="Sure?", act=act, fault=fault,
            why=fields.get("why", ""), why_max=WHY_MAX, **shown,
        )  # fmt: skip

    async def _shown(self, connection: Connection, act: str, fields: dict[str, str]) -> dict[str, Any]:
        """Return the facts that a confirmation shows, and those that its form carries to the click."""
        if act in ("pause", "resume"):
            return await self._shown_hold(connection, act, fields.get("pause", ""))
        if act == "waive":
            return await _shown_waivers(connection, fields)
        if act not in COMMANDS:
            raise OutboxError("Nothing was chosen to be done.")
        ids = picked(fields) or list(seen_of(fields))
        if ids:
            emails = await named(connection, ids)
            carried = {"seen": ",".join(one.seen for one in emails)}
            return {"kind": "named", "named": emails, "count": len(emails), "target": "", "carried": carried}
        chosen = selection_of(act, fields)
        found_all = await fitting(connection, act, chosen)
        carried = {key: fields[key] for key in FILTERS if fields.get(key)}
        carried |= {"up_to": str(found_all.up_to), "at": repr(found_all.at), "count": str(len(found_all.emails))}
        return {"kind": "all", "named": found_all.named, "count": len(found_all.emails), "target": found_all.target,
                "carried": carried}  # fmt: skip

    async def _shown_hold(self, connection: Connection, act: str, report: str) -> dict[str, Any]:
        await self._require_known(connection, report)
        found = await _pause_of(connection, report)
        if act == "resume" and found is None:
            raise OutboxError(f"{label(report)} is not paused.")
        since, waiting = ("", 0) if found is None else (found.since.isoformat(), found.waiting)
        carried = {"pause": report, "since": since}
        return {"kind": "pause", "pause": found, "target": label(report), "count": waiting, "named": [],
                "carried": carried}  # fmt: skip

    async def _require_known(self, connection: Connection, report: str) -> None:
        if report and report not in self.board.settings.editions and not await is_known(connection, report):
            raise OutboxError(f"{report} is no report that the fleet knows.")

    async def decide(self, request: Request, user: User, fields: dict[str, str]) -> Response:
        """Do it to what has not changed since it was shown, and name what was left."""
        act, why = fields.get("act", ""), " ".join(fields.get("why", "").split())[:WHY_MAX]
        if not why:
            return await self._confirm(request, user, fields, fault="Say why; it is kept with the decision.")
        who = self.board.who(request, user)
        try:
            async with self.board.store.connection() as connection:
                outcome = await self._do(connection, act, fields, who, why)
        except DatabaseUnavailableError:
            raise
        except OutboxError as error:
            outcome = Outcome(others=[str(error)])
        return self._said(request, user, act, outcome)

    def _said(self, request: Request, user: User, act: str, outcome: Outcome, status: int = 200) -> Response:
        response = self.board.page(
            request, "board/decided.html.j2", user, section="", title="Done" if outcome.done else "Nothing done",
            act=act, outcome=outcome, past=DONE.get(act, ""), named_max=NAMED_MAX,
        )  # fmt: skip
        response.status_code = status
        return response

    async def _do(self, connection: Connection, act: str, fields: dict[str, str], who: str, why: str) -> Outcome:
        if act in ("pause", "resume"):
            return await self._hold(connection, act, fields, who, why)
        if act == "waive":
            return await _waive(connection, fields, who, why)
        if act not in COMMANDS:
            raise OutboxError("Nothing was chosen to be done.")
        seen = seen_of(fields)
        if seen:
            return await _do_named(connection, act, seen, who, why)
        return await _do_all(connection, act, fields, who, why)

    async def _hold(self, connection: Connection, act: str, fields: dict[str, str], who: str, why: str) -> Outcome:
        report = fields.get("pause", "")
        found = await _pause_of(connection, report)
        since = "" if found is None else found.since.isoformat()
        if since != fields.get("since", ""):
            return Outcome(others=[f"{label(report)}: somebody else paused or resumed it meanwhile; nothing was done."])
        if act == "pause":
            await self._require_known(connection, report)
            done = await begin_pause(connection, report, who=who, why=why)
        else:
            waiting = 0 if found is None else found.waiting
            done = await end_pause(connection, report, who=who, why=why, waiting=waiting)
        left = [] if done else [f"{label(report)} {'was paused already' if act == 'pause' else 'is not paused'}."]
        return Outcome(int(done), [label(report)] if done else [], left)


async def _owed(connection: Connection, fields: dict[str, str]) -> list[Owed]:
    """Return the recipient that a form names, or all of an edition who have no report.

    Raises:
        OutboxError: there is none.
    """
    report, period = fields.get("report", ""), fields.get("period", "")
    if "recipient" in fields:
        one = Owed.parse(f"{report}/{period}/{fields['recipient']}")
        found = [] if one is None else [one]
    else:
        found = await unreached_of(connection, report, period)
    if not found:
        raise OutboxError("No recipient of this edition is without a report and undecided.")
    return found


async def _shown_waivers(connection: Connection, fields: dict[str, str]) -> dict[str, Any]:
    found = await _owed(connection, fields)
    carried = {name: fields[name] for name in ("report", "period", "recipient") if name in fields}
    return {
        "kind": "waive",
        "named": found[:NAMED_MAX],
        "count": len(found),
        "target": f"{found[0].report} {found[0].period}",
        "carried": carried | {"count": str(len(found))},
    }


async def _waive(connection: Connection, fields: dict[str, str], who: str, why: str) -> Outcome:
    found, count = await _owed(connection, fields), bigint(fields.get("count", ""))
    if count is None:
        raise OutboxError(NOT_WHOLE)
    if len(found) > count:
        raise OutboxError(f"{len(found):,} recipients have no report now, and {count:,} had none; look again.")
    done, left = await waive(connection, found, who=who, why=why)
    return Outcome(len(done), [one.key for one in done[:NAMED_MAX]], list(left.values()))


async def _pause_of(connection: Connection, report: str) -> Pause | None:
    return next((one for one in await read_pauses(connection) if one.report == report), None)


async def _do_named(connection: Connection, act: str, seen: dict[int, str], who: str, why: str) -> Outcome:
    """To emails that were named, and are as they were."""
    found = await named(connection, list(seen))
    same = [one for one in found if one.seen == seen[one.id]]
    others = [
        f"{one.key} has changed since it was shown: it is {one.state.replace('_', ' ')} now, and was left."
        for one in found
        if one.seen != seen[one.id]
    ]
    if not same:
        return Outcome(others=others or ["There are no such emails any more."])
    if act in ACTS:
        target = target_of([one.key for one in same])
        done = set(await operate(connection, ACTS[act], [one.id for one in same], who=who, why=why, target=target))
        others += await explain_act(connection, ACTS[act], [one.key for one in same if one.id not in done])
        return Outcome(len(done), [one.key for one in same if one.id in done][:NAMED_MAX], others)
    return await _resolve(connection, DECISIONS[act], same, others, who, why)


async def _resolve(
    connection: Connection, decision: Decision, same: list[Email], others: list[str], who: str, why: str
) -> Outcome:
    keys = [one.key for one in same]
    states = sorted({one.state for one in same} & {DeliveryState.IN_DOUBT, DeliveryState.DEAD})
    decided = set(await resolve(connection, keys, decision, why=why, who=who, states=states))
    left = await explain_decision(connection, [key for key in keys if key not in decided], decision)
    return Outcome(len(decided), [key for key in keys if key in decided][:NAMED_MAX], [*others, *left.values()])


async def _do_all(connection: Connection, act: str, fields: dict[str, str], who: str, why: str) -> Outcome:
    """To all that fit and did so when they were shown."""
    chosen = selection_of(act, fields)
    try:
        up_to, at, count = int(fields["up_to"]), float(fields["at"]), int(fields["count"])
    except (KeyError, ValueError):
        raise OutboxError(NOT_WHOLE) from None
    if not 0 <= at < AT_MAX:
        raise OutboxError(NOT_WHOLE)
    found = await fitting(connection, act, chosen, up_to=up_to, at=at)
    if len(found.emails) > count:
        raise OutboxError(f"{len(found.emails):,} emails fit now, and {count:,} did; look again and decide again.")
    if act in ACTS:
        done = await operate(connection, ACTS[act], found.emails, who=who, why=why, target=chosen.target)
        keys = [row.key for row in found.named]
        done_count = len(done)
    else:
        every = [row.key for row in await name_all(connection, found.emails)]
        decided = set(await resolve(connection, every, DECISIONS[act], why=why, who=who, target=chosen.target,
                                    states=list(chosen.states)))  # fmt: skip
        keys, done_count = [key for key in every if key in decided], len(decided)
    left = count - done_count
    have = "1 email has" if left == 1 else f"{left:,} emails have"
    others = [f"{have} changed since they were shown, and were left."] if left else []
    return Outcome(done_count, keys[:NAMED_MAX], others)
