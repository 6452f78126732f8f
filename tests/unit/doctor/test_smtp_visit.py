from outbox.doctor.finding import note, ok
from outbox.doctor.smtp_visit import CHECKS, Visit
from outbox.settings import Settings
from outbox.settings.urls import SmtpAddress


def visit():
    address = SmtpAddress.parse("smtp://app:s3cret@mail.example.com")
    return Visit(Settings(), address, sender="a@example.com", recipient="b@example.com", largest_bytes=0)


def test_a_later_finding_about_the_server_replaces_the_former_and_comes_first():
    one = visit()
    one.add(ok("smtp.server", "answers"))
    one.add(note("smtp.tls", "not verified"))
    one.add(note("smtp.server", "breaks off"))
    assert [finding.found for finding in one.findings] == ["breaks off", "not verified"]


def test_checks_that_were_not_made_say_why():
    one = visit()
    one.add(ok("smtp.server", "answers"), ok("smtp.tls", "fine"))
    found = one.leave("it hung up")
    assert [finding.check for finding in found] == ["smtp.server", *CHECKS]
    assert {finding.found for finding in found[2:]} == {"not checked: it hung up"}


def test_a_reply_is_shown_on_one_line_without_the_login():
    shown = visit().without_login("no\r\n s3cret here.")
    assert "s3cret" not in shown
    assert "\n" not in shown
