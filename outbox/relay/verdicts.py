"""Verdicts on tries: each becomes an outcome, is counted and logged, and waits as a settlement for the next tick."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from logging import DEBUG
from typing import Any, Final

from outbox.database.connection import Connection
from outbox.log import Events
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.backoff import full_jitter_s
from outbox.relay.observer import Observer
from outbox.relay.server_state import ServerState
from outbox.relay.settlement import Settlement, contradicts, count_withdrawn_by_reply, states_of
from outbox.relay.verdict_history import VerdictHistory
from outbox.settings import Settings, WhenInDoubt
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Outcome, Refused, Verdict, Withdrawn, outcome_of

log = Events("outbox.relay")

UNDECIDED_S: Final = 0.3  # a deferral waits so long for the replies to others that are in flight
AGAIN_BASE_S: Final = 1.0  # pause before a withdrawn delivery is due again; doubles with every withdrawal
WITHDRAWALS_MAX: Final = 20  # the server works for others and drops this one so often: quarantined


class Verdicts:
    """Verdicts of one relay, from the try to the tick that writes them.

    A deferral waits for a moment: if most recipients get the same, it is the server's state and no try of the email. So
    does an email that met cut connections only: the database knows how often that was.
    """

    def __init__(
        self,
        settings: Settings,
        server: ServerState,
        history: VerdictHistory,
        *,
        counts: Counter[str],
        observers: Sequence[Observer],
        on_settlement: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.server = server
        self.history = history
        self.counts = counts
        self.observers = observers
        self.settlements: list[Settlement] = []
        """Outcomes that no commit has confirmed."""
        self.undecided: list[tuple[Try, Deferred, bool]] = []
        """Deferrals of which it is not known yet whether most others get the same."""
        self.dropped: list[tuple[Try, str]] = []
        """Tries that met only cut connections, with the reason; their emails may have to be quarantined."""
        self._on_settlement = on_settlement

    def waiting(self) -> list[OutgoingEmail]:
        """Return the emails whose verdict is not decided yet."""
        undecided = [tried.outgoing for tried, _, _ in self.undecided]
        return [*undecided, *(tried.outgoing for tried, _ in self.dropped)]

    def unsettled(self) -> set[int]:
        """Return the emails whose verdicts are not written yet."""
        return {one.email for one in self.settlements}

    def on_verdict(self, tried: Try, verdict: Verdict, *, may_wait: bool = False, of_the_route: bool = False) -> None:
        """Settle a try by its verdict; a deferral that `may_wait` is decided once others have their replies.

        `of_the_route`: the verdict came from a refusal that might have been about the route.
        """
        if isinstance(verdict, Deferred):
            is_clear = self.server.note_deferral(tried, verdict.reply)
            if not is_clear and may_wait:
                if not self.undecided:
                    asyncio.get_running_loop().call_later(UNDECIDED_S, self.decide)
                self.undecided.append((tried, verdict, of_the_route))
                return
        self._settle(tried, verdict, of_the_route=of_the_route)

    def on_cut(self, tried: Try, reason: str) -> None:
        """Withdraw a try that met only cut connections; `judge_dropped` decides if that was so often before."""
        if tried.outgoing.withdrawn + 1 >= WITHDRAWALS_MAX:
            self.dropped.append((tried, reason))
        else:
            self._settle(tried, Withdrawn(reason))

    def decide(self) -> None:
        """Settle the deferrals that waited for the replies to others."""
        undecided, self.undecided = self.undecided, []
        for tried, verdict, of_the_route in undecided:
            self._settle(tried, verdict, of_the_route=of_the_route)

    async def judge_dropped(self, connection: Connection) -> None:
        """Withdraw emails whose connections were cut; one that the server dropped too often is quarantined.

        An email that the server refused by its rate, or deferred with all, was withdrawn too, and that does not count.
        """
        dropped, self.dropped = self.dropped, []
        by_reply = await count_withdrawn_by_reply(connection, [tried.outgoing.email for tried, _ in dropped])
        for tried, reason in dropped:
            drops = tried.outgoing.withdrawn - by_reply.get(tried.outgoing.email, 0) + 1
            self._settle(tried, Withdrawn(reason), dropped=drops >= WITHDRAWALS_MAX)

    def take(self) -> list[Settlement]:
        """Return the settlements for a tick, and forget them."""
        settlements, self.settlements = self.settlements, []
        return settlements

    def put_back(self, settlements: Sequence[Settlement]) -> None:
        """Keep settlements for a later tick: their rows are locked, or their commit is not confirmed."""
        self.settlements[:0] = settlements

    def renumber(
        self, emails: Mapping[str, int], *, asserted: Collection[Settlement], reported: Collection[tuple[str, int]]
    ) -> None:
        """Adapt to another server, where these emails, by key, have other ids.

        Of the settlements that were `asserted` there those whose (key, attempt) was `reported` are written.
        """
        self.settlements = [
            one._replace(email=emails[one.key]) if one.key in emails else one
            for one in self.settlements
            if one not in asserted or (one.key, one.attempt) not in reported
        ]

    def forget_undecided(self) -> None:
        """Forget the tries that are not decided: their session is gone, and nothing of them is marked."""
        self.undecided.clear()
        self.dropped.clear()

    async def explain(self, missed: Sequence[Settlement], connection: Connection) -> None:
        """Log each settlement that changed nothing, unless it was already true."""
        states = await states_of(connection, [one.email for one in missed])
        for settlement in missed:
            state, attempt = states.get(settlement.email, (None, None))
            if contradicts(settlement, state, attempt):
                self.counts["stale settlements"] += 1
                log.error(
                    "verdict_stale",
                    "{key}, attempt {attempt}: the verdict {verdict!r} came too late, "
                    "the delivery is {state} at attempt {at_attempt}",
                    key=settlement.key,
                    email=settlement.email,
                    attempt=settlement.attempt,
                    relay=settlement.relay,
                    verdict=settlement.outcome.verdict,
                    state=state,
                    at_attempt=attempt,
                )

    def _settle(self, tried: Try, verdict: Verdict, *, dropped: bool = False, of_the_route: bool = False) -> None:
        """Put the outcome of a verdict into the next tick; count and log it.

        `dropped`: a working server has dropped this very message too often.
        """
        if isinstance(verdict, Deferred) and not self.server.judge_deferral(tried, verdict.reply).is_own:
            verdict = Withdrawn(verdict.reply)
        outcome = self._outcome(tried, verdict, dropped=dropped)
        now, number, email = time.monotonic(), tried.number, tried.outgoing
        self.history.note(tried, number, outcome, now)
        self.settlements.append(
            Settlement(email.relay, email.email, email.key, number, marked=tried.marked, outcome=outcome)
        )
        self.counts[outcome.verdict if outcome.state != DeliveryState.DEAD else "dead"] += 1
        for observer in self.observers:
            observer.judged(tried, number, outcome, now)
        self.server.note_reply(outcome.reply)
        if isinstance(verdict, Accepted):
            self.server.on_accepted(tried, now)
            if log.says(DEBUG):
                log.debug("email_accepted", "{key} was accepted: {reply}", **subject_of(tried), reply=verdict.reply)
        else:
            if isinstance(verdict, Deferred | Refused):
                self.server.on_judged(of_the_route=of_the_route)
            _log(tried, verdict, outcome)
        self._on_settlement()

    def _outcome(self, tried: Try, verdict: Verdict, *, dropped: bool) -> Outcome:
        if isinstance(verdict, Accepted):
            return outcome_of(verdict, tries=1, tries_max=1, backoff_s=0.0, again_s=0.0, doubt_s=None)
        settings, tries, withdrawn = self.settings, tried.counted, tried.outgoing.withdrawn
        retry, is_open = settings.retry, self.server.breaker.is_open
        return outcome_of(
            verdict,
            tries=tries,
            tries_max=retry.attempts_max,
            backoff_s=full_jitter_s(max(tries, 1), base_s=retry.base_s, max_s=retry.max_s),
            again_s=min(
                full_jitter_s(withdrawn + 1, base_s=AGAIN_BASE_S, max_s=retry.max_s),
                self.server.pause_max_s if is_open else retry.max_s,  # then the pause sets the pace
            ),
            doubt_s=None if settings.in_doubt is WhenInDoubt.HOLD else settings.doubt_grace_s,
            withdrawals=withdrawn,
            withdrawals_max=WITHDRAWALS_MAX if dropped and not is_open else None,
        )


def _log(tried: Try, verdict: Deferred | Refused | InDoubt | Withdrawn, outcome: Outcome) -> None:
    match verdict:
        case Deferred(reply) | Refused(reply):
            log.info(
                "email_refused" if outcome.state == DeliveryState.DEAD else "email_deferred",
                "{key}, try {try_number}: {reply} ({state})",
                **subject_of(tried),
                try_number=tried.counted,
                reply=reply,
                state=outcome.state,
            )
        case InDoubt(reply):
            log.warning("email_in_doubt", "{key} is in doubt: {reply}", **subject_of(tried), reply=reply)
        case Withdrawn(reply):
            log.info("email_withdrawn", "{key} was not sent: {reply}", **subject_of(tried), reply=reply)


def subject_of(tried: Try) -> dict[str, Any]:
    """Return the fields of a log line that name a try."""
    email = tried.outgoing
    return {"key": email.key, "email": email.email, "attempt": tried.number, "relay": email.relay}
