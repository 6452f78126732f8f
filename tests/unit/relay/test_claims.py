"""Rows of claimed deliveries as claims: those that can be sent, and those that must be quarantined."""

import pytest

from outbox.relay.claims import INCOMPLETE, SMALL_BYTES, claimed_of
from outbox.relay.quarantine import SUSPECT_AFTER

ROW = {
    "email": 7, "attempt": 1, "withdrawn": 0, "orphaned": 0, "key": "mail7", "sender": "a@example.com",
    "recipient": "b@example.com", "message_id": "<7@x>", "message": b"hello", "traceparent": None, "priority": 0,
    "bytes": 60, "listed": None,
}  # fmt: skip


def only(**changed):
    return claimed_of([ROW | changed], None, 1, 100_000)


def test_a_claim_has_the_values_of_its_row():
    (claim,) = only(priority=1, attempt=3, withdrawn=2, traceparent="00-x").claims
    assert (claim.relay, claim.email, claim.key, claim.message) == (1, 7, "mail7", b"hello")
    assert (claim.attempt, claim.withdrawn, claim.traceparent) == (3, 2, "00-x")
    assert (claim.urgent, claim.suspect, claim.is_fetched, claim.size) == (True, False, True, 60)


@pytest.mark.parametrize("orphaned, is_suspect", [(SUSPECT_AFTER - 1, False), (SUSPECT_AFTER, True)])
def test_a_delivery_that_some_relays_died_with_is_a_suspect(orphaned, is_suspect):
    assert only(orphaned=orphaned).claims[0].suspect is is_suspect


@pytest.mark.parametrize("size, is_fetched", [(SMALL_BYTES, True), (SMALL_BYTES + 1, False)])
def test_a_large_message_is_still_to_be_fetched(size, is_fetched):
    assert only(bytes=size, message=b"hello" if is_fetched else None).claims[0].is_fetched is is_fetched


def test_what_is_larger_than_the_limit_or_incomplete_is_unfit_and_on_no_list():
    too_large, broken = only(bytes=100_001, listed=True), only(bytes=None, recipient=None, listed=True)
    assert "100001 bytes" in too_large.unfit[7]
    assert broken.unfit == {7: INCOMPLETE}
    assert (too_large.claims, too_large.listed, broken.claims, broken.listed) == ([], frozenset(), [], frozenset())


def test_an_address_on_the_suppression_list_is_named():
    assert only(listed=True).listed == {7}
    assert only(listed=False).listed == frozenset()


def test_each_claim_has_the_token_of_its_own_email():
    rows = [ROW, ROW | {"email": 8}, ROW | {"email": 9}]
    one, other = "7k1t0123456789abcdef", "8k1t0123456789abcdef"
    assert [claim.token for claim in claimed_of(rows, f"{other} {one}", 1, 100_000).claims] == [one, other, ""]
