"""Input from a mail server: replies, and the extensions that it offers."""

import re
from dataclasses import asdict
from inspect import signature

from hypothesis import strategies as st

from outbox.smtp.extensions import Offers, body_parameters, original_recipient
from outbox.smtp.replies import LINE_BYTES_MAX, REPLY_BYTES_MAX, GarbageError, ReplyReader
from tests.fuzz.harness import fuzzed, pieces, words

_REPLY = pieces(
    b"250", b"250 ", b"250-", b"250-SIZE 10240000\r\n", b"421 4.7.0 later\r\n", b"\r\n", b"\n", b"\r", b"\0",
    b"\x1b[2J",
    b" ", b"5.1.1 ", "é\u2028".encode(), b"\xff", b"1", b"999 ", b"250\t", b"354 go\r\n", b"x" * 100,
)  # fmt: skip


def _read(*chunks):
    """The replies in what a server sent, and whether garbage ended them."""
    reader, replies = ReplyReader(), []
    try:
        for chunk in chunks:
            for reply in reader.feed(chunk):
                replies.append(reply)  # noqa: PERF402 - what came before the garbage is kept
    except GarbageError:
        return replies, True
    return replies, False


@fuzzed("replies", _REPLY, bytes)
def replies_are_bounded_and_the_same_however_the_network_cuts_them(wire):
    replies, is_garbage = _read(wire)
    for reply in replies:
        assert 200 <= reply.code <= 599
        assert len(reply.text) <= REPLY_BYTES_MAX + LINE_BYTES_MAX
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", reply.text)
    # A server that cuts at line ends, and one that cuts anywhere, say the same.
    size = max(len(wire) // 40, 1)
    cut = [wire[at : at + size] for at in range(0, len(wire), size)]
    assert _read(*cut) == (replies, is_garbage)
    assert _read(*wire.splitlines(keepends=True)) == (replies, is_garbage)


_OFFERS = st.fixed_dictionaries({
    "extensions": st.dictionaries(
        st.sampled_from(["size", "8bitmime", "smtputf8", "pipelining", "dsn", "auth", "starttls"]),
        words("0", "1", "9", "-", " ", "1e9", "٣", "²", "PLAIN", "\t", seeds=("10240000",), size_max=LINE_BYTES_MAX),
    ),
    "message": words("Subject: x", "\r\n", "\n", "é", "\udcff", "From: a@b", seeds=("Subject: é\r\n\r\nbody\r\n",)),
    "address": words("a", "@", "b.example", "é", "+", "=", " ", "\r\n", "\0", "\\", "\u2028", "🙂", size_max=400),
})  # fmt: skip


@fuzzed("offers", _OFFERS, dict)
def what_is_said_because_of_an_offer_is_one_of_few_words(example):
    offers = Offers.of(example["extensions"])
    assert isinstance(offers.size_max, int)
    assert offers.size_max >= 0
    assert all(isinstance(value, bool) for name, value in asdict(offers).items() if name != "size_max")
    message = example["message"].encode("utf-8", "surrogateescape" if _is_escaped(example["message"]) else "replace")
    try:
        said = _parameters(offers, message, example["address"])
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert said in ("", " BODY=8BITMIME", " BODY=8BITMIME SMTPUTF8")
        assert offers.eight_bit or not said
        assert offers.utf8 or "SMTPUTF8" not in said
    orcpt = original_recipient(example["address"])
    # RFC 3461 §4.2, RFC 6533 §3: nothing of it can end the command or begin another parameter.
    assert re.fullmatch(r"(rfc822|utf-8);[!-~]*", orcpt)
    assert "=" not in orcpt


def _parameters(offers, message, address):
    if "is_ascii" not in signature(body_parameters).parameters:
        return body_parameters(offers, message, addresses=address)
    header = message.partition(b"\r\n\r\n")[0]
    return body_parameters(offers, header, is_ascii=message.isascii(), addresses=address)


def _is_escaped(text):
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
