"""Bounces of mail systems that write no report, and texts of people that are no bounces."""

import pytest

from outbox.feedback.dsn import parse_bounce
from outbox.feedback.notice import Kind
from tests.support.bounce_samples import DSN, EXIM, PERSON, QMAIL, in_part, plain, verdict
from tests.support.bounce_samples import report as small

ALIAS = "team@example.com"


@pytest.mark.parametrize(
    "text, address",
    [
        (EXIM.replace("  bo@example.com\n", "  bo@example.com\n    (generated from team@example.com)\n"), ALIAS),
        (QMAIL, ALIAS),
    ],
    ids=["Exim", "qmail"],
)
def test_nor_is_it_in_a_text(text, address):
    assert verdict(plain(text), address) == Kind.SOFT
    assert verdict(plain(text)) == Kind.HARD


def test_a_transcript_that_names_another_address_says_nothing_of_the_recipients():
    transcript = b"--B\n\n... while talking to mx:\n550 5.1.1 <left@example.com>... User unknown\n--B\nContent-Type: "
    fields = b"Final-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.1.1\n"
    for name, kind in ((b"left", Kind.SOFT), (b"bo", Kind.HARD)):
        raw = in_part(DSN, fields).replace(b"--B\nContent-Type: ", transcript.replace(b"left", name), 1)
        assert verdict(raw) == kind


def test_a_report_without_the_servers_words_is_judged_by_the_transcript():
    head = b"--B\nContent-Type: text/plain\n\n   ----- Transcript of session follows -----\n"
    raw = small().replace(b"--B\n", head + b"<<< 550 5.7.1 Your IP address is on our blacklist\n--B\n", 1)
    assert verdict(raw) == Kind.SOFT
    assert verdict(raw.replace(b"5.7.1 Your IP address is on our blacklist", b"5.1.1 User unknown")) == Kind.HARD


@pytest.mark.parametrize(
    "text",
    [
        PERSON,
        PERSON.replace("In-Reply-To: {message_id}\nReferences: {message_id}\n", ""),
        PERSON.replace("In-Reply-To: {message_id}\nReferences: {message_id}\n", "").replace(
            "Return-Path: <bo@example.com>\n", ""
        ),
        PERSON.replace("<bo@example.com>:\n", "").replace("Return-Path: <bo@example.com>", "Return-Path: <>"),
        QMAIL.replace("\n\nHi", "\nIn-Reply-To: <7.abcd@example.com>\n\nHi"),
        QMAIL.replace("<bo@example.com>:\n", "bo@example.com\n"),
        QMAIL.replace("Hi. This is", "> Hi. This is").replace("<bo", "> <bo"),
        PERSON.replace("Hi. This", "Final-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.1.1\n\nThis"),
        QMAIL.replace("Hi. This is the qmail-send program", "Hello. I am away").replace(
            "Subject:", "Auto-Submitted: auto-replied\nX-Autoreply: yes\nSubject:"
        ),
    ],
)
def test_what_a_person_or_an_auto_reply_writes_is_no_bounce(text):
    assert parse_bounce(plain(text)) is None


def test_a_text_of_a_mail_system_is_known_by_its_return_path_or_its_sender():
    assert verdict(plain(QMAIL.replace("MAILER-DAEMON@", "mta@"))) == Kind.HARD
    assert verdict(plain(QMAIL.replace("Return-Path: <>", "Return-Path: <srs0@example.com>"))) == Kind.HARD
    assert verdict(plain(QMAIL.replace("MAILER-DAEMON@", "mta@").replace("Return-Path: <>\n", ""))) is None


def test_qmail_says_for_each_recipient_what_failed():
    text = QMAIL.replace("\n\n--- Below", "\n\n<al@example.com>:\nMailbox full. (#5.2.2)\n\n--- Below")
    assert verdict(plain(text)) == Kind.HARD
    assert parse_bounce(plain(text)).about("al@example.com").status == "5.2.2"
