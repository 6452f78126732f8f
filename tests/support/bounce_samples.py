"""Bounces as mail systems write them, about an email that was sent; what differs between them is what is tested."""

from email import message_from_bytes

from outbox.feedback.dsn import parse_bounce

ROWS = "SELECT *, outbox.bounce_token(id) AS token FROM outbox.email"


def header_of(message: bytes) -> str:
    return message.partition(b"\r\n\r\n")[0].decode()


def message_id_of(message: bytes) -> str:
    return message_from_bytes(message)["Message-ID"]


def postfix(
    *, token="", recipient="bo@example.com", returned="", action="failed", status="5.1.1", diagnostic=None, number=1
) -> bytes:
    """As Postfix's bounce(8) writes it; `returned` is the header of what was sent."""
    diagnostic = diagnostic or f"smtp; 550 {status} <{recipient}>: Recipient address rejected"
    envelope = f"Original-Envelope-Id: {token}\n" if token else ""
    return f"""\
Return-Path: <>
From: MAILER-DAEMON@mx.example.com (Mail Delivery System)
To: reports@example.com
Subject: Undelivered Mail Returned to Sender
Message-Id: <20261128.{number}@mx.example.com>
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="B"

This is a MIME-encapsulated message.

--B
Content-Description: Notification
Content-Type: text/plain; charset=us-ascii

This is the mail system at host mx.example.com.

<{recipient}>: host mx.example.com said: 550 {status}

--B
Content-Description: Delivery report
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example.com
{envelope}X-Postfix-Queue-ID: 4ABC

Final-Recipient: rfc822; {recipient}
Original-Recipient: rfc822;{recipient}
Action: {action}
Status: {status}
Remote-MTA: dns; mx.example.com
Diagnostic-Code: {diagnostic}

--B
Content-Description: Undelivered Message Headers
Content-Type: text/rfc822-headers

{returned}
--B--
""".encode()


def of_row(row, **how) -> bytes:
    """A bounce that proves to know the email, by its token; the row is one of ROWS."""
    return postfix(token=row["token"], recipient=row["recipient"], **how)


EXIM = """\
Return-Path: <>
X-Failed-Recipients: bo@example.com
Auto-Submitted: auto-replied
From: Mail Delivery System <Mailer-Daemon@mx.example.com>
To: reports@example.com
Subject: Mail delivery failed: returning message to sender
Message-Id: <E1abc@mx.example.com>

This message was created automatically by mail delivery software.

A message that you sent could not be delivered to one or more of its
recipients. This is a permanent error. The following address(es) failed:

  bo@example.com
    SMTP error from remote mail server after RCPT TO:<bo@example.com>:
    host mx.example.com [192.0.2.1]: 550 5.1.1 no such user here

------ This is a copy of the message, including all the headers. ------

Return-path: <reports@example.com>
{header}

Hello. 5.2.2
"""

QMAIL = """\
Return-Path: <>
From: MAILER-DAEMON@mx.example.com
To: reports@example.com
Subject: failure notice

Hi. This is the qmail-send program at mx.example.com.
I'm afraid I wasn't able to deliver your message to the following addresses.
This is a permanent error; I've given up. Sorry it didn't work out.

<bo@example.com>:
Sorry, no mailbox here by that name. (#5.1.1)

--- Below this line is a copy of the message.

Return-Path: <reports@example.com>
{header}

Hello
"""

EXCHANGE = """\
From: <postmaster@example.com>
To: <reports@example.com>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
\tboundary="_ex_"
Message-ID: <ex1@example.com>
In-Reply-To: {message_id}
Subject: Undeliverable: Progress

--_ex_
Content-Type: multipart/alternative; boundary="_alt_"

--_alt_
Content-Type: text/html; charset="nonsense"
Content-Transfer-Encoding: quoted-printable

<p>=C3=28 The email address you entered couldn't be found</p>
--_alt_--
--_ex_
Content-Type: message/delivery-status

Reporting-MTA: dns;AM0PR01.prod.exchangelabs.com
Received-From-MTA: dns;mail.example.com
Arrival-Date: Sat, 28 Nov 2026 10:00:00 +0000

Final-Recipient: rfc822;bo@example.com
Action: failed
Status: 5.1.10
Diagnostic-Code: smtp;550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient
 not found by SMTP address lookup

--_ex_
Content-Type: message/rfc822

{header}

Hello
--_ex_--
"""

ARF = """\
From: <feedback@isp.example>
To: <abuse@example.com>
Subject: complaint
Message-ID: <arf1@isp.example>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=feedback-report; boundary="part"

--part
Content-Type: text/plain

This is an email abuse report.
--part
Content-Type: message/feedback-report

Feedback-Type: {about}
User-Agent: SomeGenerator/1.0
Version: 1
Original-Rcpt-To: <bo@example.com>

--part
Content-Type: message/rfc822

{header}

Hello
--part--
"""


def report(
    *, token="", final="rfc822; bo@example.com", original="", action="failed", status="5.1.1", diagnostic="", more=""
) -> bytes:
    """The least that a report says: whose address failed, and why. The token is in the address that it came to."""
    fields = {"Final-Recipient": final, "Original-Recipient": original}
    fields |= {"Action": action, "Status": status, "Diagnostic-Code": diagnostic}
    group = "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
    return f"""\
Delivered-To: bounces+{token}@example.com
From: MAILER-DAEMON@mx.example.net
Message-ID: <a1.{abs(hash((token, group, more)))}@mx.example.net>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="B"

--B
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example.net

{group}{more}
--B--
""".encode()


# A reply of a person, quoted below what he or she writes, with the first words of qmail's format.
PERSON = """\
Return-Path: <bo@example.com>
From: Bo <bo@example.com>
To: reports@example.com
Subject: Re: Progress
Message-ID: <p1@example.com>
In-Reply-To: {message_id}
References: {message_id}

Hi. This is the third week in which section 5.1.1 of my report is empty.

<bo@example.com>:
5.1.1 is what I mean.
"""


HEADER = "From: Reports <reports@example.com>\nTo: bo@example.com\nMessage-ID:\n <7.abcd@example.com>\nSubject: x"
ID = "<7.abcd@example.com>"
DSN = "message/delivery-status"


def plain(template, **more):
    return template.format(header=HEADER, message_id=ID, **more).encode()


def in_part(kind, content, *, encoding="", outer="multipart/report; report-type=delivery-status"):
    head = f"Content-Transfer-Encoding: {encoding}\n" if encoding else ""
    return (
        f"From: MAILER-DAEMON@mx.example.net\nReturn-Path: <>\nMessage-ID: <b@c>\n"
        f'Content-Type: {outer}; boundary="B"\n\n'
        f"--B\nContent-Type: {kind}\n{head}\n".encode()
        + content
        + b"\n--B--\n"
    )


def verdict(raw, recipient="bo@example.com"):
    found = parse_bounce(raw)
    return found and found.about(recipient).kind
