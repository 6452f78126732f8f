"""What a bounce weighs against an address: the milder of what is stated and what the server said."""

import pytest

from outbox.feedback.bounce_class import HARD, judge

GMAIL_UNKNOWN = (
    "550-5.1.1 The email account that you tried to reach does not exist. Please try 550-5.1.1 double-checking the "
    "recipient's email address. 550 5.1.1 https://support.google.com/mail/?p=NoSuchUser x - gsmtp"
)
GMAIL_RELAYED = (
    "Google tried to deliver your message, but it was rejected by the server for the recipient domain example.com by "
    "mx.example.com. [192.0.2.1]. The error that the other server returned was: 550 5.1.1 <bo@example.com> User unknown"
)
GMAIL_RATE = (
    "550-5.2.1 The user you are trying to contact is receiving mail at a rate that 550-5.2.1 prevents additional "
    "messages from being delivered. 550 5.2.1 https://support.google.com/mail/?p=ReceivingRatePerm x - gsmtp"
)
GONE = (
    ("5.1.1", ""),
    ("5.1.1", "550 5.1.1 <bo@example.com>: Recipient address rejected: User unknown in local recipient table"),
    ("5.1.1", "550 5.1.1 <bo@example.com>: Recipient address rejected: User unknown in relay recipient table"),
    ("5.1.1", "550 5.1.1 <b>: Recipient address rejected: undeliverable address: host mx[192.0.2.1] said: 550 unknown"),
    ("5.1.1", GMAIL_UNKNOWN),
    ("5.1.1", "550 Requested action not taken: mailbox unavailable"),
    ("5.1.1", "550 no such user"),
    ("5.1.1", "554 delivery error: dd This user doesn't have a example.com account (bo@example.com)"),
    ("5.1.1", "550 5.0.0 <bo@example.com>... User unknown"),
    ("5.1.1", "user unknown"),
    ("5.1.1", "550 Unrouteable address"),
    ("5.1.1", "550 <bo@example.com>: unknown"),
    ("5.1.1", "550 Empfänger unbekannt"),
    ("5.1.1", "550 utilisateur inconnu"),
    ("5.1.1", "550 <rate-limit@example.com>: no mailbox by that name, see https://example.com/spam/policy"),
    ("5.0.0", "550 5.1.1 no such user"),
    ("", "host mx.example.com [192.0.2.1]: 550 5.1.1 no such user here"),
    ("", GMAIL_RELAYED),
    ("", "Sorry, no mailbox here by that name. (#5.1.1)"),
    ("5.1.2", "550 5.1.2 <bo@example.com>... Host unknown (Name server: example.com: host not found)"),
    ("5.1.3", "553 5.1.3 <bo@example.com>... User address required"),
    ("5.1.6", "550 5.1.6 recipient no longer on server: bo@example.com"),
    ("5.1.10", "550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup"),
    ("5.2.1", "550 5.2.1 The email account that you tried to reach is disabled."),
    ("5.2.1", "550-5.2.1 The email account that you tried to reach is inactive."),
)  # fmt: skip

# What is said about our host, sender, content, reputation or rate, or may be over soon, whatever the stated status is.
OTHERWISE = (
    "550 5.7.1 IP address blacklisted by recipient",
    "553 https://www.spamhaus.org/query/ip/192.0.2.1",
    "550 5.1.1 Your host is on our blocklist",
    "550 5.1.1 <bo@example.com> - 203.0.113.2 has sent to too many recipients this hour",
    GMAIL_RATE,
    "552 5.2.2 Over quota",
    "552 mailbox full",
    "552 quota exceeded",
    "550 5.1.1 mailbox is full",
    "550 5.4.1 Recipient address rejected: Access denied",
    "550 5.1.351 Remote server returned unknown recipient or mailbox unavailable -> 550 User unknown",
    "550 5.1.8 Sender address rejected: Domain not found",
    "550 Sender verify failed",
    "550 5.1.1 Message rejected due to content restrictions",
    "554 5.1.1 Message refused: spam detected",
    "554 Message rejected",
    "571 delivery not allowed",
    "554 no",
    "552 no",
    "550 rejected because of SPF",
    "550 Relaying denied",
    "550 5.1.1 Greylisted, please come back in 300 seconds",
    "450 4.1.1 User unknown",
    "450 5.1.1 User unknown",
    "421 Service not available",
    "550 5.1.1 DNS lookup failed, try again later",
    "550 5.1.2 Host or domain name not found. Name service error",
    "550 5.3.5 mailer configuration error",
    "550 5.1.1 temporary failure",
    "550 5.1.1 service temporarily unavailable",
    "550 5.1.1 TLS required",
    "550 5.1.1 Ihre IP-Adresse ist gesperrt",
    "550 5.1.1 votre serveur est sur liste noire",
    "550 5.1.1 已被列入黑名单",
    "procmail: Couldn't create /var/spool/mail/bo",
    "connect to mx.example.com[192.0.2.1]:25: Connection timed out",
    "550 Administrative prohibition",
    "550 SC-001 Unfortunately, messages from 192.0.2.1 weren't sent",
    "550 Verification failed for <reports@example.com>; No such user; Sender verify failed",
    "550 5.1.1 Message rejected",
    "550 JunkMail rejected",
    "550 5.1.1 Access denied",
    "554 5.1.1 Service unavailable; Client host [192.0.2.1] blocked using b.barracudacentral.org",
    "550 5.1.1 user's mailbox is currently not accepting mail",
    "550 See https://postmaster.example.net/error?ip=192.0.2.1",
    "550 [192.0.2.1] has been refused",
    "550 unknown host 192.0.2.1",
    "550 Your message was considered UBE",
    "550 Backend: SA score 9.1",
    "550 Error 50-1",
    "521 5.2.1 We will not accept delivery of this message",
    "550 5.2.1 https://support.google.com/mail/?p=ReceivingRatePerm",
    "550 5.2.1 this account has reached its daily cap",
    "550 Mailbox over its allotment",
    "550 5.1.1 user is on vacation",
    "550 5.1.1 user unknown; LDAP server not available",
    "550 5.1.1 user unknown (virtual alias expansion error)",
    "X-Unix; 75",
)


@pytest.mark.parametrize("stated, said", GONE)
def test_an_address_that_both_say_does_not_exist_is_gone(stated, said):
    found = judge(stated, said)
    assert found.is_hard
    assert found.status in HARD


@pytest.mark.parametrize("stated", ["5.1.1", "5.1.3", "5.2.1"])
@pytest.mark.parametrize("said", OTHERWISE)
def test_words_that_are_about_us_or_over_soon_are_no_evidence_whatever_status_is_stated(stated, said):
    assert not judge(stated, said).is_hard


MILDER = ["5.1.0", "5.1.4", "5.1.7", "5.1.8", "5.1.9", "5.2.0", "5.2.2", "5.2.3", "5.3.0", "5.4.1", "5.4.4", "5.5.0"]


@pytest.mark.parametrize("status", [*MILDER, "5.6.0", "5.7.1", "5.7.26", "4.0.0", "4.1.1", "4.4.7"])
def test_of_two_statuses_that_disagree_the_milder_counts_and_is_told(status):
    for found in (judge("5.1.1", f"550 {status} no"), judge(status, "550 5.1.1 no such user")):
        assert not found.is_hard
        assert found.status == status


@pytest.mark.parametrize(
    "stated, said, counts",
    [
        ("5.4.1", "550 5.4.1 Recipient address rejected: Access denied. [x.prod.protection.outlook.com]", True),
        ("5.1.351", "550 5.1.351 Remote server returned unknown recipient or mailbox unavailable", True),
        ("5.2.2", "552 5.2.2 mailbox full", True),
        ("4.2.2", "452 4.2.2 mailbox full", True),
        ("5.5.0", "550 5.5.0 Requested action not taken: mailbox unavailable", True),
        ("5.0.0", "550 <bo@example.com>: User unknown", True),
        ("5.1.0", "550 Address rejected", True),
        (
            "5.4.4",
            "Host or domain name not found. Name service error for name=example.com type=A: Host not found",
            True,
        ),
        ("5.1.1", "550 5.7.1 blacklisted", False),
        ("5.7.1", "550 5.7.1 rejected", False),
        ("5.1.8", "550 5.1.8 Bad sender's domain", False),
        ("5.0.0", "554 Your message looks like spam", False),
        ("5.1.1", "550 Mail from 192.0.2.1 rejected, listed in zen", False),
        ("5.1.1", "550 We do not accept mail from your country", False),
        ("5.1.1", "550 no MX for sender domain", False),
        ("5.1.1", "550 Dynamic pool IP", False),
        ("5.2.1", "550 5.2.1 The user is receiving mail at a rate that prevents additional messages", False),
        ("5.2.3", "552 5.2.3 message too large", False),
        ("5.4.1", "554 5.4.1 Client host rejected: Access denied", False),
        ("4.4.7", "delivery time expired", False),
        ("4.4.1", "connect to mx.example.com: Connection timed out", False),
    ],
)
def test_what_counts_when_it_goes_on_is_about_the_address_and_never_about_us(stated, said, counts):
    found = judge(stated, said)
    assert not found.is_hard
    assert found.counts is counts


def test_a_report_without_words_is_judged_by_those_that_it_quotes():
    assert judge("5.1.1", "", quoted="550 5.1.1 User unknown").is_hard
    assert not judge("5.1.1", "", quoted="550 5.7.1 your IP address is blocked").is_hard
