"""Mail data at the last gate: what is refused, and what the rest looks like on the wire."""

import base64
import hashlib
import re

import dkim.canonicalization
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.smtp import content
from outbox.smtp.content import (
    ADDRESS_MAX,
    LINE_MAX,
    address_refusal,
    dot_stuffed,
    header_of,
    lone_line_ends,
    pieces,
    refusal,
)
from outbox.smtp.dkim import body_hash
from tests.support.smuggling import MESSAGES

texts = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"a", b" ", b"\t"]), max_size=14).map(b"".join)


def normalised(message):
    return re.sub(rb"\r\n|\r|\n", b"\r\n", message)


@given(texts)
def test_each_line_end_is_crlf_on_the_wire_and_so_it_is_in_pieces(message):
    assert b"".join(pieces(message)) == normalised(message)
    assert len(message) + lone_line_ends(message) == len(normalised(message))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@given(texts)
def test_a_piece_never_ends_between_a_cr_and_its_lf(size, message):
    before, content.PIECE_BYTES = content.PIECE_BYTES, size
    try:
        assert b"".join(pieces(message)) == normalised(message)
        ended = normalised(message) + (b"" if message.endswith((b"\r", b"\n")) else b"\r\n")
        stuffed = (b"\r\n" + ended).replace(b"\r\n.", b"\r\n..")[2:]
        assert b"".join(dot_stuffed(pieces(message))) == stuffed
    finally:
        content.PIECE_BYTES = before


@given(texts)
def test_the_header_ends_with_the_first_empty_line_whatever_the_line_ends_are(message):
    whole = normalised(message)
    head, end, _ = whole.partition(b"\r\n\r\n")
    assert header_of(message) == (b"\r\n" if whole.startswith(b"\r\n") else head + end)


@given(texts)
def test_the_hash_of_a_body_in_pieces_is_that_of_its_relaxed_form(message):
    whole = normalised(message)
    whole += b"" if not whole or whole.endswith(b"\r\n") else b"\r\n"
    relaxed = dkim.canonicalization.Relaxed.canonicalize_body(whole)
    expected = base64.b64encode(hashlib.sha256(relaxed).digest())
    assert body_hash(pieces(message)) == expected
    lines = normalised(message).splitlines(keepends=True)
    assert body_hash(lines) == expected, "whatever the pieces are"


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_no_sequence_that_smuggles_is_left_on_the_wire(message):
    if b"\0" in message:
        assert refusal(message) == content.NUL
        return
    wire = b"".join(dot_stuffed(pieces(message)))
    assert b"\r\n.\r\n" not in b"\r\n" + wire
    assert lone_line_ends(wire) == 0
    assert wire.endswith(b"\r\n")


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"\r", b""])
@pytest.mark.parametrize("before", [b"", b"Subject: x\r\n\r\n", b"y\n" * 3000, b"z" * LINE_MAX + b"\r\n"])
def test_a_line_may_have_998_octets_and_no_more(before, end):
    after = b"tail" if end else b""
    assert refusal(before + b"x" * LINE_MAX + end + after) is None
    assert refusal(before + b"x" * (LINE_MAX + 1) + end + after) == content.LONG_LINE
    assert refusal(before + b"x" * 100_000 + end + after) == content.LONG_LINE


@pytest.mark.parametrize("bad", ["\r", "\n", "\0", " ", "\t", ">", "<", "\x7f", "\x85", "\u2028", "\xa0"])
@pytest.mark.parametrize("where", ["{}a@example.com", "a{}@example.com", "a@example.com{}"])
def test_an_address_that_could_be_taken_for_more_is_refused(bad, where):
    address = where.format(bad)
    assert "sender has a control character" in address_refusal(address, "b@example.com")
    assert "recipient has a control character" in address_refusal("a@example.com", address)


def test_an_address_has_a_length_and_a_recipient():
    domain = "@example.com"
    longest = "x" * (ADDRESS_MAX - len(domain)) + domain
    assert address_refusal(longest, longest) is None
    assert address_refusal("", longest) is None, "the empty sender is that of bounces"
    assert "more than 320 octets" in address_refusal("y" + longest, longest)
    assert "more than 320 octets" in address_refusal("", "ü" * 200 + domain)
    assert "recipient is empty" in address_refusal(longest, "")


def test_a_gate_takes_no_more_time_than_a_message_is_long():
    """Runs of blanks, of line ends and of dots: what regular expressions take the square of the time for."""
    for text in (b" " * 997 + b"\r\n", b"\r\n", b"\n", b".\r\n", b" \r\n", b"\t" * 997 + b"x\r\n"):
        message = b"Subject: x\r\n\r\n" + text * (3_000_000 // len(text))
        assert refusal(message) is None
        body_hash(pieces(message))
        assert sum(map(len, dot_stuffed(pieces(message)))) >= len(message)
