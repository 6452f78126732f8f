import datetime as dt

import pytest

from outbox.doctor.finding import Grade
from outbox.doctor.smtp_judgements import judge_certificate, judge_envelope, judge_size


@pytest.mark.parametrize(
    "offered, largest, grade",
    [
        (None, 10**9, Grade.OK),
        ("", 10**9, Grade.OK),
        ("0", 10**9, Grade.OK),
        ("1000", 1000, Grade.OK),
        ("1000", 1001, Grade.PROBLEM),
        ("1000", 0, Grade.PROBLEM),
        ("35882577", 0, Grade.OK),
    ],
)
def test_size_is_held_against_the_largest_message_or_a_usual_one(offered, largest, grade):
    assert judge_size(offered, largest).grade is grade


def test_a_certificate_is_named_and_one_that_ends_soon_is_a_note():
    ends_at = dt.datetime(2027, 1, 31, tzinfo=dt.UTC)
    certificate = {"subjectAltName": (("DNS", "mail.example.com"),), "notAfter": "Jan 31 00:00:00 2027 GMT"}
    for days, grade in ((13, Grade.NOTE), (15, Grade.OK)):
        found = judge_certificate(certificate, "TLSv1.3", (ends_at - dt.timedelta(days=days)).timestamp())
        assert found.grade is grade
        assert "mail.example.com" in found.found


@pytest.mark.parametrize(
    "command, code, login, grade, fix",
    [
        ("MAIL FROM:<a@b>", 250, False, None, ""),
        ("RCPT TO:<a@b>", 251, False, None, ""),
        ("RCPT TO:<a@b>", 451, False, Grade.NOTE, ""),
        ("RCPT TO:<a@b>", 550, True, Grade.PROBLEM, "relay for this host"),
        ("MAIL FROM:<a@b>", 530, False, Grade.PROBLEM, "give smtp_url the login"),
        ("MAIL FROM:<a@b>", 553, True, Grade.PROBLEM, "which senders this login may use"),
    ],
)
def test_a_reply_to_the_envelope_has_its_own_fix(command, code, login, grade, fix):
    found = judge_envelope(command, code, "said", login=login)
    assert (found and found.grade) == grade
    assert found is None or fix in found.fix


@pytest.mark.parametrize(
    "command, text, fix",
    [
        ("MAIL FROM:<a@b>", "5.4.5 Daily user sending limit exceeded", "wait until the limit ends"),
        ("RCPT TO:<a@b>", "5.7.1 Client host [192.0.2.1] blocked using zen.spamhaus.org", "allow this host"),
    ],
)
def test_a_refusal_that_another_sender_would_also_get_is_not_blamed_on_the_sender(command, text, fix):
    found = judge_envelope(command, 550, text, login=False)
    assert fix in found.fix
    assert "correct" not in found.fix
