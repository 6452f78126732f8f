"""What a relay and its fleet are measured by, in the terms of Prometheus.

`Meter` looks on while the relay works and does no more than count; everything else is read when somebody asks
(`registry_of`), in the thread that answers. Names and units follow the conventions: seconds, and `_total` for what only
grows. What the database knows is the same whoever tells it, so a query takes `max` of those over the relays.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from outbox import __version__
from outbox.fleet import Fleet, FleetReader
from outbox.health import Health
from outbox.ledger import Claim
from outbox.relay import Relay
from outbox.verdict import Outcome

VERDICTS: Final = ("accepted", "deferred", "refused", "dead", "in_doubt", "withdrawn", "expired", "suppressed")
BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts by upper bounds. Written by one thread, and read by others without a lock: each number is whole."""

    def __init__(self, bounds: Sequence[float] = BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """It as Prometheus wants it: each bucket with those below it."""
        counts, total, buckets = list(self.counts), 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(name, documentation)
        family.add_metric([], buckets, self.sum)
        return family


class Meter:
    """Looks on (`observer.Observer`) and counts."""

    def __init__(self) -> None:
        self.reply_s = Histogram()
        self.settle_s = Histogram()
        self.tick_s = Histogram()
        self.sessions_lost = 0
        self._judged: list[float] = []
        self._ticking: list[float] = []

    def judged(self, claim: Claim, attempt: int, outcome: Outcome, now: float) -> None:
        """The reply to a dot has come, or will not."""
        del attempt, outcome
        self._judged.append(claim.claimed_at)
        if claim.handed_over_at:
            self.reply_s.observe(now - claim.handed_over_at)

    def ticking(self) -> None:
        """All that is judged so far is settled by this tick."""
        self._ticking, self._judged = self._judged, []

    def ticked(self, began_at: float, now: float) -> None:
        """It is."""
        self.tick_s.observe(now - began_at)
        for claimed_at in self._ticking:
            self.settle_s.observe(now - claimed_at)
        self._ticking = []

    def session_lost(self) -> None:
        """What that tick was to settle is not measured."""
        self.sessions_lost += 1
        self._ticking = []


class RelayCollector(Collector):
    """What this relay counts."""

    def __init__(self, relay: Relay, meter: Meter, health: Health) -> None:
        self.relay = relay
        self.meter = meter
        self.health = health

    def collect(self) -> Iterator[Metric]:
        """All of it, as of now."""
        relay, counts = self.relay, dict(self.relay.counts)
        version = GaugeMetricFamily("outbox_build_info", "The version of outbox-mail; always 1.", labels=["version"])
        version.add_metric([__version__], 1)
        yield version
        verdicts = CounterMetricFamily(
            "outbox_emails_settled", "Tries of emails by what they ended in, this relay's.", labels=["verdict"]
        )
        for verdict in VERDICTS:
            verdicts.add_metric([verdict], counts.get(verdict, 0))
        yield verdicts
        yield from (
            CounterMetricFamily(
                "outbox_verdicts_stale", "Verdicts that came too late to matter.", counts.get("stale settlements", 0)
            ),
            CounterMetricFamily(
                "outbox_claims_lost", "Claims that were another's at their mark.", counts.get("lost claims", 0)
            ),
            CounterMetricFamily("outbox_sessions_lost", "Sessions with Postgres lost.", self.meter.sessions_lost),
            GaugeMetricFamily("outbox_session_held", "Whether the relay holds its session.", relay.holds_session),
            GaugeMetricFamily("outbox_relay_ready", "Whether /readyz says yes.", not self.health.hindrances()),
            GaugeMetricFamily("outbox_emails_waiting", "Claims that wait for a connection.", len(relay.pool.ready)),
            self.meter.tick_s.family("outbox_tick_seconds", "How long a commit of the relay takes."),
            self.meter.reply_s.family(
                "outbox_smtp_reply_seconds", "From a final dot to its reply, or to its deadline."
            ),
            self.meter.settle_s.family("outbox_claim_to_settle_seconds", "From a claim to the commit of its verdict."),
        )
        paused = GaugeMetricFamily(
            "outbox_route_paused", "Whether this relay takes the mail server for broken.", labels=["route"]
        )
        paused.add_metric([relay.pool.route.name], relay.pool.breaker.is_open)
        yield paused
        connections = GaugeMetricFamily("outbox_smtp_connections", "Connections to the mail server.", labels=["state"])
        for state, number in relay.pool.counts().items():
            connections.add_metric([state], number)
        yield connections


class FleetCollector(Collector):
    """What the database knows."""

    def __init__(self, reader: FleetReader) -> None:
        self.reader = reader

    def collect(self) -> Iterator[Metric]:
        """All of it, as of a little while ago; nothing but `outbox_database_up` while it does not answer."""
        fleet = self.reader.look()
        yield GaugeMetricFamily("outbox_database_up", "Whether the database answers who measures.", not fleet.trouble)
        if fleet.trouble is None:
            yield from _of_fleet(fleet)
            yield from _of_editions(fleet)


def _of_fleet(fleet: Fleet) -> Iterator[Metric]:
    deliveries = GaugeMetricFamily(
        "outbox_deliveries", "Deliveries that are open, by state; counted to 100,000 each.", labels=["state"]
    )
    for state, number in fleet.deliveries.items():
        deliveries.add_metric([state], number)
    yield deliveries
    yield GaugeMetricFamily("outbox_oldest_due_seconds", "How long the oldest one has been due.", fleet.oldest_due_s)
    yield GaugeMetricFamily("outbox_relays", "Relays that live, of the whole fleet.", fleet.relays)
    yield GaugeMetricFamily(
        "outbox_routes_paused", "Mail servers that the fleet takes for broken.", fleet.routes_paused
    )
    yield GaugeMetricFamily(
        "outbox_editions_incomplete", "Editions of the last 40 days not yet complete.", fleet.editions_incomplete
    )


def _of_editions(fleet: Fleet) -> Iterator[Metric]:
    labels = ["report", "period"]
    expected = GaugeMetricFamily("outbox_edition_expected", "Recipients of a report's newest edition.", labels=labels)
    made = GaugeMetricFamily("outbox_edition_made", "Reports made of a report's newest edition.", labels=labels)
    complete = GaugeMetricFamily(
        "outbox_edition_complete", "Whether a report's newest edition is complete.", labels=labels
    )
    for edition in fleet.editions:
        named = [edition.report, edition.period]
        if edition.expected is not None:
            expected.add_metric(named, edition.expected)
        made.add_metric(named, edition.made)
        complete.add_metric(named, edition.is_complete)
    yield from (expected, made, complete)


def registry_of(relay: Relay, meter: Meter, health: Health, reader: FleetReader) -> CollectorRegistry:
    """Everything that `/metrics` shows: this relay, its process, and the fleet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RelayCollector(relay, meter, health))
    registry.register(FleetCollector(reader))
    ProcessCollector(registry=registry)
    return registry
