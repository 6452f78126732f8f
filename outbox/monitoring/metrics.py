"""Metrics of a relay and its fleet for Prometheus.

`Meter` observes the relay and only counts; everything else is read at a scrape (`registry_of`), in the thread that
answers. Names and units follow the conventions: seconds, and `_total` for what only
grows. Facts from the database are the same on every relay, so a query takes their `max` over the relays.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from outbox import __version__
from outbox.monitoring.fleet import Fleet, FleetReader
from outbox.monitoring.health import Health
from outbox.relay.relay import Relay
from outbox.relay.supervisor import Relays
from outbox.smtp.outgoing import Try
from outbox.smtp.verdict import Outcome

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

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Append this histogram with cumulative buckets."""
        counts, total, buckets = list(self.counts), 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self.sum)


class Meter:
    """Observer (`relay.observer.Observer`) that counts."""

    def __init__(self) -> None:
        self.reply_s = Histogram()
        self.settle_s = Histogram()
        self.tick_s = Histogram()
        self.sessions_lost = 0
        self._judged: list[float] = []
        self._ticking: list[float] = []

    def judged(self, tried: Try, attempt: int, outcome: Outcome, now: float) -> None:
        """The reply to a dot has come, or will not."""
        del attempt, outcome
        self._judged.append(tried.outgoing.claimed_at)
        if tried.dot_sent_at:
            self.reply_s.observe(now - tried.dot_sent_at)

    def ticking(self) -> None:
        """Note that this tick settles all verdicts so far."""
        self._ticking, self._judged = self._judged, []

    def ticked(self, began_at: float, now: float) -> None:
        """Measure a tick that was committed, and the emails that it settled."""
        self.tick_s.observe(now - began_at)
        for claimed_at in self._ticking:
            self.settle_s.observe(now - claimed_at)
        self._ticking = []

    def session_lost(self) -> None:
        """Count a lost session; the emails of its last tick are not measured."""
        self.sessions_lost += 1
        self._ticking = []


class RelayCollector(Collector):
    """Counts of the relays of this process.

    If there are several, each has its route's name for a label; that of the usual route is empty, which Prometheus
    treats as absent.
    """

    def __init__(self, relays: Relays, meters: Mapping[str, Meter], health: Health) -> None:
        self.relays = relays
        self.meters = meters
        self.health = health
        self._labels = ["route"] if len(relays.each) > 1 else []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, as of now."""
        version = GaugeMetricFamily("outbox_build_info", "The version of outbox-mail; always 1.", labels=["version"])
        version.add_metric([__version__], 1)
        yield version
        yield self._verdicts()
        yield from self._numbers()
        yield from self._times()
        yield from self._ways()

    def _label(self, relay: Relay) -> list[str]:
        return [relay.serves] if self._labels else []

    def _verdicts(self) -> Metric:
        verdicts = CounterMetricFamily(
            "outbox_emails_settled",
            "Tries of emails by what they ended in, this relay's.",
            labels=["verdict", *self._labels],
        )
        for relay in self.relays.each:
            counts = dict(relay.counts)
            for verdict in VERDICTS:
                verdicts.add_metric([verdict, *self._label(relay)], counts.get(verdict, 0))
        return verdicts

    def _numbers(self) -> Iterator[Metric]:
        labels = self._labels
        stale = CounterMetricFamily("outbox_verdicts_stale", "Verdicts that came too late to matter.", labels=labels)
        lost = CounterMetricFamily("outbox_claims_lost", "Claims that were another's at their mark.", labels=labels)
        sessions = CounterMetricFamily("outbox_sessions_lost", "Sessions with Postgres lost.", labels=labels)
        ready = GaugeMetricFamily(
            "outbox_relay_ready", "Whether the relay is ready; /readyz says yes if each is.", labels=labels
        )
        held = GaugeMetricFamily("outbox_session_held", "Whether the relay holds its session.", labels=labels)
        waiting = GaugeMetricFamily("outbox_emails_waiting", "Claims that wait for a connection.", labels=labels)
        for relay in self.relays.each:
            label, counts = self._label(relay), dict(relay.counts)
            stale.add_metric(label, counts.get("stale settlements", 0))
            lost.add_metric(label, counts.get("lost claims", 0))
            sessions.add_metric(label, self.meters[relay.serves].sessions_lost)
            ready.add_metric(label, self.health.is_ready(relay.serves))
            held.add_metric(label, relay.sessions.holds_session)
            waiting.add_metric(label, len(relay.pool.ready))
        yield from (stale, lost, sessions, ready, held, waiting)

    def _times(self) -> Iterator[Metric]:
        labels = self._labels
        tick = HistogramMetricFamily("outbox_tick_seconds", "How long a commit of the relay takes.", labels=labels)
        reply = HistogramMetricFamily(
            "outbox_smtp_reply_seconds", "From a final dot to its reply, or to its deadline.", labels=labels
        )
        settle = HistogramMetricFamily(
            "outbox_claim_to_settle_seconds", "From a claim to the commit of its verdict.", labels=labels
        )
        for relay in self.relays.each:
            meter, label = self.meters[relay.serves], self._label(relay)
            meter.tick_s.add_to(tick, label)
            meter.reply_s.add_to(reply, label)
            meter.settle_s.add_to(settle, label)
        yield from (tick, reply, settle)

    def _ways(self) -> Iterator[Metric]:
        paused = GaugeMetricFamily(
            "outbox_route_paused", "Whether this relay takes the mail server for broken.", labels=["route"]
        )
        deferring = GaugeMetricFamily(
            "outbox_route_deferring", "Whether the mail server defers every email of this relay.", labels=["route"]
        )
        refused = CounterMetricFamily(
            "outbox_route_refusals", "Replies that refused the sender or this host.", labels=["route"]
        )
        connections = GaugeMetricFamily(
            "outbox_smtp_connections", "Connections to the mail server.", labels=["state", *self._labels]
        )
        throttled = CounterMetricFamily(
            "outbox_route_throttled", "Replies that limited the rate or the connections.", labels=["route"]
        )
        rate = GaugeMetricFamily(
            "outbox_route_rate_found",
            "Emails a second that the mail server takes from the fleet; absent without a limit.",
            labels=["route"],
        )
        granted = GaugeMetricFamily(
            "outbox_smtp_connections_granted",
            "Connections that the mail server grants this relay; absent without a limit.",
            labels=["route"],
        )
        for relay in self.relays.each:
            server = relay.server
            throttled.add_metric([server.name], server.throttles)
            if server.limiter.found_per_s is not None:
                rate.add_metric([server.name], server.limiter.found_per_s)
            if server.connection_limit.found is not None:
                granted.add_metric([server.name], server.connection_limit.found)
            paused.add_metric([server.name], server.breaker.is_open)
            deferring.add_metric([server.name], server.deferring() is not None)
            refused.add_metric([server.name], server.refusals)
            for state, number in relay.pool.facts.connection_counts().items():
                connections.add_metric([state, *self._label(relay)], number)
        yield from (paused, deferring, refused, throttled, rate, granted, connections)


class FleetCollector(Collector):
    """Facts from the database."""

    def __init__(self, reader: FleetReader) -> None:
        self.reader = reader

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, a little old; only `outbox_database_up` while the database does not answer."""
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
        "outbox_routes_unserved", "Routes that emails wait for and no living relay serves.", fleet.routes_unserved
    )
    attention = GaugeMetricFamily(
        "outbox_attention",
        "What needs a person, by kind: emails, recipients, routes and so on; counted to 10,000 each.",
        labels=["kind"],
    )
    for kind, number in fleet.attention.items():
        attention.add_metric([kind], number)
    yield attention
    yield GaugeMetricFamily(
        "outbox_emails_deferred", "Emails that wait after a try; counted among 10,000 of a route.", fleet.deferred
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


def registry_of(relays: Relays, meters: Mapping[str, Meter], health: Health, reader: FleetReader) -> CollectorRegistry:
    """Return all that `/metrics` shows: these relays with the meters of their routes, their process, and the fleet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RelayCollector(relays, meters, health))
    registry.register(FleetCollector(reader))
    ProcessCollector(registry=registry)
    return registry
