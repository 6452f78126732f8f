"""Which failures count against the recipient of an email, and which are about another address."""

import pytest

from outbox.feedback.bounce_class import HARD
from outbox.feedback.dsn import parse_bounce
from outbox.feedback.notice import Kind
from tests.support.bounce_samples import ARF, plain, postfix, verdict
from tests.support.bounce_samples import report as small


@pytest.mark.parametrize(
    "action, status, diagnostic, kind",
    [
        *(("failed", status, None, Kind.HARD) for status in sorted(HARD)),
        *(("failed", f"5.{status}", None, Kind.SOFT) for status in ("1.0", "1.7", "1.8", "2.2", "4.4", "7.1", "0.0")),
        ("failed", "4.4.7", None, Kind.SOFT),
        ("delayed", "5.1.1", None, Kind.SOFT),
        ("delayed", "4.4.1", None, Kind.SOFT),
        ("failed", "5.0.0", "smtp; 550 5.1.1 no such user", Kind.HARD),
        ("failed", "5.0.0", "smtp; 550 host 5.1.1.9 refuses", Kind.SOFT),
        ("failed", "5.7.1", "smtp; 550 5.1.1 no such user", Kind.SOFT),
        ("failed", "nonsense", "", Kind.SOFT),
    ],
)
def test_only_a_failure_for_good_that_is_about_the_mailbox_is_hard(action, status, diagnostic, kind):
    (notice,) = parse_bounce(
        postfix(action=action, status=status, diagnostic=diagnostic or "smtp; 550 no such user")
    ).notices
    assert notice.kind == kind


def test_of_several_notices_only_that_which_names_a_recipient_is_about_it():
    other = (
        b"\n\nFinal-Recipient: rfc822; al@example.com\nAction: failed\nStatus: 5.2.2\n\n--B\nContent-Description: Und"
    )
    found = parse_bounce(postfix().replace(b"\n\n--B\nContent-Description: Und", other))
    assert [notice.kind for notice in found.notices] == [Kind.HARD, Kind.SOFT]
    assert found.about("AL@example.com").status == "5.2.2"
    assert found.about("bo@example.com").kind == Kind.HARD
    assert (found.about("cy@example.com").kind, found.about("cy@example.com").counts) == (Kind.SOFT, False)


ALIAS = "team@example.com"


@pytest.mark.parametrize(
    "how",
    [
        {"final": "rfc822; left@example.com", "original": f"rfc822;{ALIAS}"},
        {"final": "rfc822; left@example.com"},
        {"final": "rfc822; reports@example.com"},
        {"final": "LOCAL; left", "original": f"rfc822;{ALIAS}"},
        {"final": f"rfc822; {ALIAS}", "more": "X-Actual-Recipient: rfc822; left@example.com\n"},
        {"final": f"rfc822; {ALIAS}", "more": "X-Actual-Recipient: X-Unix; |/usr/bin/vacation left\n"},
        {"final": f"rfc822; {ALIAS}", "diagnostic": "smtp; 550 5.1.1 <left@example.com>: User unknown"},
        {"final": f"rfc822; {ALIAS}", "diagnostic": "SMTP; 550 5.1.1 <left@example.com>... User unknown"},
        {"final": "rfc822; team@elsewhere.example"},
        {"final": "", "original": ""},
    ],
    ids=[
        "member",
        "alone",
        "our sender",
        "local user",
        "Sendmail",
        "program",
        "quoted",
        "quoted by Sendmail",
        "domain",
        "nobody",
    ],
)
def test_an_address_that_an_alias_leads_to_is_no_evidence_against_the_alias(how):
    found = parse_bounce(small(**how)).about(ALIAS)
    assert (found.kind, found.counts) == (Kind.SOFT, False)
    assert "5.1.1" in found.reason


@pytest.mark.parametrize(
    "final, recipient",
    [
        ("rfc822; BO@Example.COM", "bo@example.com"),
        ("rfc822;<bo@example.com>", "Bo@example.com"),
        ("bo@example.com", "bo@example.com"),
        ("rfc/822;bo@example.com", "bo@example.com"),
        ("<bo@example.com>", "bo@example.com"),
        ("RFC822 ; bo@example.com.", "bo@example.com"),
        ("rfc822; bo@example.com (Bo)", "bo@example.com"),
        ('rfc822; "bo"@example.com', "bo@example.com"),
        ("LOCAL; bo", "bo@example.com"),
        ("rfc822; bo+2Bweek@example.com", "bo+week@example.com"),
        ("rfc822; bo+week@example.com", "bo+week@example.com"),
        ("rfc822; bo+2Bweek@example.com", "bo+2Bweek@example.com"),
        ("utf-8; j\u00f6rg@example.com", "j\u00f6rg@example.com"),
        ("utf-8; jo\u0308rg@example.com", "j\u00f6rg@example.com"),
        ("utf-8; j\\x{F6}rg@example.com", "j\u00f6rg@example.com"),
        ("UTF-8;j\\x{f6}rg@example.com", "j\u00f6rg@example.com"),
        ("utf-8; j\u00f6rg@b\u00fccher.example", "j\u00f6rg@xn--bcher-kva.example"),
        ("utf-8; bo\\x{2B}week@example.com", "bo+week@example.com"),
    ],
)
def test_an_address_is_the_recipients_in_each_of_its_spellings(final, recipient):
    assert verdict(small(final=final), recipient) == Kind.HARD
    assert verdict(small(final="", original=final), recipient) == Kind.HARD


@pytest.mark.parametrize(
    "how",
    [
        {"diagnostic": "smtp; 550 5.1.1 <bo@internal.example.com>: User unknown"},  # its server has rewritten it
        {"diagnostic": "smtp; 550 5.1.1 User unknown; ask <postmaster@example.com>"},
        {"final": "", "diagnostic": "smtp; 550 5.1.1 <bo@example.com>: User unknown"},
        {"final": "rfc822;", "original": "rfc822; bo@example.com"},
        {"final": "RFC822; RFC822; bo@example.com"},
        {"final": "rfc822 (SMTP); bo@example.com;"},
        {"diagnostic": "smtp; 550 5.1.2 domain example.com does not exist", "status": "5.1.2"},
    ],
)
def test_the_recipients_own_address_may_be_named_in_another_way(how):
    assert verdict(small(**how)) == Kind.HARD


@pytest.mark.parametrize(
    "said",
    [
        "<bo@another.example>: User unknown",
        "left@example.com... User unknown",
        "User unknown <left@example.com>",
        "unknown user: left@example.com.",
        "the sender's domain mail.another.example does not exist",
        "no such domain: another.example",
    ],
)
def test_words_that_name_another_address_or_domain_say_nothing_of_the_recipients(said):
    assert verdict(small(diagnostic=f"smtp; 550 5.1.1 {said}")) == Kind.SOFT


@pytest.mark.parametrize(
    "final", ["rfc822; bo+week@example.com", "rfc822; bob@example.com", "rfc822; bo@mx.example.com", "LOCAL; bob"]
)
def test_an_address_that_is_only_similar_is_another(final):
    assert verdict(small(final=final)) == Kind.SOFT


@pytest.mark.parametrize("code", ["\\x{A}", "\\x{0D}", "\\x{2028}", "\\x{D800}", "\\x{110000}", "+0A", "+7F"])
def test_no_code_in_an_address_becomes_a_control_character(code):
    (notice,) = parse_bounce(small(final=f"utf-8; bo{code}@example.com")).notices
    assert notice.addresses == {f"bo{code.lower()}@example.com"}


def test_of_two_statements_about_one_recipient_the_milder_counts():
    group = "Final-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.2.2\n"
    assert verdict(small(more=f"\n{group}")) == Kind.SOFT
    assert verdict(small(more=group)) == Kind.SOFT


def test_a_complaint_of_a_person_to_whom_an_email_was_passed_on_is_not_the_recipients():
    raw = plain(ARF, about="abuse")
    assert verdict(raw) == Kind.COMPLAINED
    assert verdict(raw, "redacted@example.com") == Kind.COMPLAINED  # RFC 6590: the name may be hidden
    assert verdict(raw, "bo@elsewhere.example") == Kind.SOFT
