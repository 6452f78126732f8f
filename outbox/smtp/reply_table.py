"""Table of SMTP refusals: what a reply is about, by stage, code, enhanced code (RFC 3463) and words. Data.

The first row of `TABLE` that matches wins; `DEFAULTS` decide by stage and first digit alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from outbox.smtp.refusal import About, Stage


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `source` names the specification, or the server that says it.

    An empty column matches anything, the others are regular expressions: `stages`, `codes` and `enhanced` match as a
    whole, one of `words` anywhere in the text, which is in small letters, without its enhanced code, with "<>" for
    each address and links without their paths.
    """

    about: About
    source: str
    stages: str = ""
    codes: str = ""
    enhanced: str = ""
    words: tuple[str, ...] = ()

    def matches(self, stage: str, code: str, enhanced: str, text: str) -> bool:
        """Return True if each column matches."""
        return (
            self.may_be_said(stage, code)
            and (not self.enhanced or _compiled(self.enhanced).fullmatch(enhanced) is not None)
            and (not self.words or any(_compiled(words).search(text) is not None for words in self.words))
        )

    def may_be_said(self, stage: str, code: str) -> bool:
        """Return True if the row is about replies to that command with that code."""
        return (not self.stages or _compiled(self.stages).fullmatch(stage) is not None) and (
            not self.codes or _compiled(self.codes).fullmatch(code) is not None
        )


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_CONVERSATION: Final = "MAIL|RCPT|DATA|DOT|RSET"
_ENVELOPE: Final = "MAIL|RCPT|DATA|DOT"
_RCPT: Final = "RCPT|DATA|DOT"  # LMTP and some servers judge the recipient late
_MAILBOX: Final = r"(user|mailbox|mail box|recipient|account|inbox|addressee|rcpt|alias|local[ -]part)"
_COUNTED: Final = r"(messages?|mails?|e-?mails?|transactions?|recipients?|rcpts?)"
_PERIODIC: Final = r"(daily|hourly|monthly|sending|outgoing|outbound|submission|relay|plan|account)"
_UNKNOWN: Final = r"(unknown|no such|invalid|bad|non-?existent|unrout\w+|undeliverable|inactive|ambiguous|disabled)"
_NOT_OURS: Final = (
    r"^(?!.*\b(sender|sending|your|from|helo|ehlo|login|log|auth\w*|credentials|too|verif\w+)\b).*"  # not us
)
_GONE: Final = (
    r"(unknown|(does|do) ?n.t exist|unavailable|invalid|inactive|disabled|suspended|expired|closed|locked|busy"
    r"|undeliverable|moved|full)"
)
_NOT_TAKEN: Final = (
    r"(denied|rejected|refused|not (allowed|permitted|authori[sz]ed|accepted)|blocked|prohibited|forbidden)"
)

TABLE: Final = (
    # 1. Limits of the recipient's mailbox, which must not be taken for limits of ours.
    Row(
        About.RECIPIENT,
        "greylisting is by recipient: RFC 6647, postgrey, rspamd",
        stages=_RCPT,
        words=("gr[ea]y-?list",),
    ),
    Row(
        About.RECIPIENT,
        "Gmail 4.2.1 and Microsoft 365 5.2.121: the rate at which the recipient gets mail",
        stages=_RCPT,
        words=(
            rf"{_MAILBOX}( \S+){{0,6}} receiv\w+ (mail|messages|e-?mails?) (at a rate|too (quick|fast|often))",
            r"message receive limit|receiving (rate |message )?(limit|quota)|received (messages|mails|e-?mails)\b",
        ),
    ),
    Row(
        About.RECIPIENT,
        "Microsoft 365 5.7.12x, 5.7.13x: this sender may not write to this group or recipient",
        stages=_RCPT,
        enhanced=r"[45]\.7\.1[23]\d",
    ),
    Row(About.CLOSING, "RFC 3463 4.3.x: the server itself; said by `maildir`", codes="454", enhanced=r"4\.3\.\d+"),
    # 2. Connections and sessions that have reached a limit.
    Row(
        About.CONNECTIONS,
        "Postfix smtpd_client_connection_count_limit 421 4.7.0; Exim, sendmail 421 4.3.2; Haraka",
        words=(r"too many (\w+[ -]){0,3}(connections|sessions|clients|threads|channels)\b",),
    ),
    Row(
        About.CONNECTIONS,
        "Exchange 421 4.3.2; Microsoft 365 432; SES 421; Exim smtp_accept_max_per_host; postscreen",
        words=(
            r"(concurrent|concurrency|simultaneous|parallel|open) (\w+ ){0,2}(connection|session|limit)",
            r"(connection|thread) (count |number )?(limit|quota)",
            r"max(imum)?(_| )(number of )?(\w+ )?connections",
            r"all server ports are busy",
        ),
    ),
    Row(
        About.CONNECTIONS,
        "sendmail ConnectionRateThrottle: 421 4.3.2 Connection rate limit exceeded",
        words=(r"connection (rate|frequency)", r"connect\w* too (fast|often|frequently)"),
    ),
    Row(About.CONNECTIONS, "Microsoft 365: 432 4.3.2 Concurrent connections limit exceeded", codes="432"),
    Row(
        About.SESSION,
        "Exim smtp_accept_max_per_connection: 421 too many messages in this connection",
        stages=_CONVERSATION,
        words=(
            rf"{_COUNTED}( \S+){{0,3}} (per|in|for|on|over|during)( \w+)?( smtp)?[ -](connection|session)",
            rf"too many {_COUNTED} this (connection|session)",
            r"(session|connection) (\w+ )?(limit|quota|expired|has expired|lasted|too long)",
            r"(limit|end|maximum) (\w+ )?(for|of|on|in) (this|the) (smtp )?(connection|session)",
        ),
    ),
    Row(
        About.SESSION,
        "OpenSMTPD limit session-messages: 452 4.5.3 Too many messages sent",
        stages=_CONVERSATION,
        words=(r"too many messages sent\.?$|too many transactions",),
    ),
    Row(
        About.SESSION,
        "Postfix smtpd_hard_error_limit 421 4.7.0; Exim smtp_accept_max_nonmail 554; sendmail; Haraka; go-smtp",
        stages=_CONVERSATION,
        words=(
            r"too (many|much) (\S+ ){0,4}(errors|commands|rsets?|noops?|noise|junk|failures|mistakes|rejections)\b",
            rf"too many (\w+ ){{0,2}}(bad|invalid|unknown|failed|rejected|non-?existent) (\w+ )?{_MAILBOX}",
            r"(error|command)s? limit",
        ),
    ),
    Row(
        About.SESSION,
        "aiosmtpd command_call_limit: 421 4.7.0 MAIL sent too many times; servers that ask for a new connection",
        stages=_CONVERSATION,
        codes="4..",
        words=(r"sent too many times", r"\bre-?connect\b(?! (in|after|later))"),
    ),
    Row(
        About.SESSION,
        "RFC 3463 4.5.3; with one recipient a message it is the session's limit: OpenSMTPD, qmail-smtpd",
        stages=_CONVERSATION,
        codes="452|421",
        enhanced=r"|4\.5\.3",
        words=(rf"too many {_COUNTED}$", rf"too many {_COUNTED}(?! from)"),
    ),
    Row(About.SESSION, "RFC 3463 4.5.3 in other words", stages=_CONVERSATION, codes="452|421", enhanced=r"4\.5\.3"),
    Row(
        About.RECIPIENT,
        "an unknown user in so many words, whatever else is said: Outlook.com 550 5.5.0 mailbox unavailable; Exim",
        stages="RCPT",
        codes="55[0-46]",
        words=(
            rf"{_NOT_OURS}{_MAILBOX} (<> )?(is |was |has )?(been )?(unknown|unavailable|not found|inactive|disabled)\b",
            rf"{_NOT_OURS}{_MAILBOX} (<> )?(does ?n.t|does not|do not|not) exist",
            rf"{_NOT_OURS}no such (\w+ )?{_MAILBOX}|{_NOT_OURS}(unknown|invalid) (\w+ )?{_MAILBOX}",
            rf"{_NOT_OURS}no {_MAILBOX}( \S+){{0,2}} (here|found|by that name)",
        ),
    ),
    # 3. Our own syntax, a command out of sequence, or one that the server does not know.
    Row(
        About.RELAYING,
        "Postfix reject_unlisted_sender, said to RCPT: 550 5.1.0 Sender address rejected: User unknown",
        stages=_RCPT,
        codes="55[0-4]",
        enhanced=r"|5\.1\.[01]",
        words=(r"\bsender address (rejected|invalid|unknown)|\bsender verif",),
    ),
    Row(
        About.RECIPIENT,
        "RFC 3463 X.1.0 to X.1.6: the recipient's address; Postfix 501 5.1.3, sendmail 553 5.1.3",
        stages="RCPT",
        codes="50[01]|504|55[0-9]",
        enhanced=r"5\.1\.([0-6]|10)",
    ),
    Row(
        About.RECIPIENT,
        "Exim: 501 <x>: malformed address; Postfix 504 5.5.2 <x>: Recipient address rejected: need fully-qualified",
        stages="RCPT",
        codes="501|504|553",
        words=(
            r"(malformed|bad|invalid|illegal|missing) (\w+ )?(address|domain|local|recipient|mailbox)",
            r"domain missing|recipient address (rejected|must)",
        ),
    ),
    Row(About.MESSAGE, "RFC 5321 §4.5.3.1.6: a line of the content", stages="DOT", codes="500", words=("long",)),
    Row(About.ROUTE, "RFC 5321 §4.2.2: syntax, sequence, not implemented; Haraka 503", codes="50[0-3]"),
    Row(
        About.ROUTE,
        "Postfix reject_non_fqdn_helo_hostname: 504 5.5.2 <name>: Helo command rejected, said to RCPT",
        words=(r"\b(helo|ehlo|lhlo)\b", r"fully[ -]qualified (host|domain)"),
    ),
    Row(
        About.MESSAGE,
        "RFC 3463 X.6.x, 5.3.4, 5.2.3; RFC 6531 §3.5: the message's form or size",
        stages=_ENVELOPE,
        codes="5..",
        enhanced=r"5\.6\.\d+|5\.3\.4|5\.2\.3",
    ),
    Row(About.ROUTE, "RFC 5321 §4.2.2: a parameter that is not implemented or not recognized", codes="504|555"),
    Row(
        About.ROUTE,
        "RFC 3463 X.5.x: the protocol",
        stages=_CONVERSATION,
        codes="5..",
        enhanced=r"5\.5\.[0-24]",
    ),
    # 4. Logins and encryption.
    Row(About.ROUTE, "RFC 4954 §6: the login is refused, too weak, or not encrypted", codes="53[458]"),
    Row(About.RELAYING, "RFC 4954 §6: a login is required, perhaps for this recipient only", stages=_RCPT, codes="530"),
    Row(About.ROUTE, "RFC 4954 §6 and RFC 3207 §4: a login, or STARTTLS, is required first", codes="530"),
    Row(
        About.RELAYING,
        "the same under other codes: Courier, hMailServer, MailEnable, Exchange 5.7.57",
        stages=_ENVELOPE,
        words=(
            r"(authentication|auth|login|log-?in|starttls|tls|encryption) (is |was )?(required|needed|mandatory)",
            r"(must|need to|have to|please|should)( first)?( be)? (authenticate|log ?in|issue a starttls)",
            r"authenticate first|not (logged in|authenticated)|requires? (smtp )?auth|\bcredentials\b",
        ),
    ),
    # 5. Sending limits: of the account or the host, not of the recipient's mailbox.
    Row(
        About.ROUTE,
        "SES 454 Throttling failure: Daily message quota exceeded; a slower pace does not help before tomorrow",
        codes="4..",
        words=(r"(daily|monthly) (\w+ ){0,3}(limit|quota|maximum|allowance)", r"per (day|month)|24[ -]?h"),
    ),
    Row(
        About.ROUTE,
        "Gmail 550 5.4.5 Daily user sending limit exceeded; Zimbra, Plesk: user has exceeded its sending limit",
        codes="5..",
        words=(
            r"(sending|outgoing|outbound|submission|send|relay|sent)( \w+){0,3} (limit|quota|rate|allowance)",
            r"(limit|exceed\w*)( \S+){0,6} (messages|mails|e-?mails|recipients) (per|in|an?|each)\b",
        ),
    ),
    Row(About.RATE, "Haraka's plugin limit: 450 rcpt rate limit exceeded", codes="4..", words=(r"rate[ -]?limit",)),
    Row(
        About.RECIPIENT,
        "RFC 3463 X.2.2: the recipient's mailbox is full; Dovecot: Quota exceeded",
        stages=_RCPT,
        codes="4(?!54)..|5..",
        enhanced=r"|[45]\.[02]\.\d+",
        words=(
            rf"{_MAILBOX}( \S+){{0,4}} (is |has |was )?(full|over|exceeded)\b",
            r"(mailbox|disk|storage|inbox) (\w+ )?(full|quota|limit|exceeded)",
            r"over ?quota|^(\S+ )?quota exceeded|insufficient (mailbox|disk)",
        ),
    ),
    Row(
        About.RATE,
        "Microsoft 365 451 4.7.500 Server busy",
        stages=_ENVELOPE,
        codes="4..",
        words=(r"\bserver (is )?(too )?busy",),
    ),
    Row(
        About.RATE,
        "Postfix anvil 450 4.7.1 too much mail from; SES 454 Throttling failure; Gmail 421 4.7.28; Yahoo 421 4.7.0",
        codes="4..",
        words=(
            r"throttl|rate[ -]?limit|\brate\b|too (fast|quick|frequent)|slow(er| down)",
            r"too (much|many) (\w+ )?(mail|messages|recipients|e-?mails|requests|auth|new tls)",
            r"(per|an?|each) (second|minute|hour)\b|hourly",
            r"(limit|quota) (was |is |has been )?(exceeded|reached)|(exceeded|reached) (\w+ ){1,5}(limit|quota)",
            r"unusual(ly)? (rate|volume)|temporarily deferred",
        ),
    ),
    Row(
        About.ROUTE,
        "Gmail 550 5.4.5 Daily user sending limit exceeded; Microsoft 365 5.1.90; cPanel max emails per hour; OVH",
        codes="5..",
        words=(
            rf"{_PERIODIC} (\w+ ){{0,3}}(limit|quota|maximum|allowance|credits?)",
            r"(limit|quota|max\w*|exceed\w*|many)( \S+){0,5} (per|/|an?|each|this) ?(second|minute|hour|day|month)",
            r"(reached|exceeded|over) (\w+ ){1,5}(limit|quota|rate|credits)|limit (exceeded|reached)",
            r"rate[ -]?limit|throttl|(out of|enough|insufficient) credits?|too many (messages|mails|e-?mails)",
            r"limit for message recipients",
        ),
    ),
    Row(
        About.ROUTE,
        "Gmail 5.4.5; Microsoft 365 5.1.90 and 5.7.70x",
        stages=_CONVERSATION,
        codes="5..",
        enhanced=r"5\.4\.5|5\.1\.90|5\.7\.7\d\d",
    ),
    # 6. The sender's address; before it what is surely the content's.
    Row(
        About.MESSAGE,
        "ClamAV, amavis: what was found in the content, whatever else is said",
        stages="DATA|DOT",
        codes="5..",
        words=(
            r"\b(virus|malware|infected)\b|eicar|(executable|attachment|file)s? (\w+ ){0,3}(reject|not allowed|block)",
        ),
    ),
    Row(
        About.ROUTE,
        "RFC 3463 X.1.7, X.1.8: the sender's address; Exchange 5.7.60, 5.2.252 SendAsDenied",
        stages=_CONVERSATION,
        enhanced=r"[45]\.1\.[78]|[45]\.7\.60|5\.2\.252",
    ),
    Row(
        About.RELAYING,
        "Postfix 553 5.7.1 not owned by user; SES 554 Email address is not verified; Exim Sender verify failed",
        stages=_ENVELOPE,
        words=(
            r"sender (\w+ )?(\S+ ){0,3}?(rejected|refused|denied|failed|blocked|invalid|not|unverified)\b",
            r"sender (<> )?(is )?(unknown|not known)|not owned by|sendas ?denied",
            r"permissions? to send|authori[sz]ed to (send|use)",
            r"(send|sending) (\w+ )?(as|from|on behalf of) (this|that|the|another|<)",
            r"(not|isn't) (been )?verified|failed the check in region",
            r"sending (\w+ )?(is |has been )?(suspended|paused|disabled)|your account (is |has been )",
            r"(invalid|bad|unknown|unauthori[sz]ed|outbound) (envelope )?(sender|from|return)",
            r"(from|return-path)( \S+){0,3} (address|domain|identity|header)( \S+){0,3} (not|un)",
        ),
    ),
    # 7. Relaying, blocklists, and the sender's authenticity.
    Row(
        About.RELAYING,
        "Postfix 554 5.7.1 Relay access denied; Exim relay not permitted; Exchange 5.7.1, 5.7.54; qmail rcpthosts",
        stages=_ENVELOPE,
        words=(
            rf"\brelay(ing)?\b( \S+){{0,5}} ?{_NOT_TAKEN}",
            rf"{_NOT_TAKEN}( \w+){{0,3}} relay|(unable|not|no|n't|cannot) (to |an? )?(open )?relay|relay attempt",
            r"rcpthosts|not (a )?(local|hosted) domain",
        ),
    ),
    Row(
        About.RELAYING,
        "Postfix reject_rbl_client 554 5.7.1 blocked using zen.spamhaus.org; Microsoft 365 S3140; Gmail 5.7.25",
        stages=_ENVELOPE,
        words=(
            r"client host|(block|black|deny) ?list|\b\w*rbls?\b|dnsbl|spamhaus|spamcop|barracuda|reputation",
            r"reverse (dns|hostname|lookup)|\b(ptr|rdns)\b|cannot find your|not accepted from (this|your) ip",
            rf"\b(ip|host|server|network|client)\b( \S+){{0,6}} (is |was |been )?({_NOT_TAKEN}|banned|listed)",
        ),
    ),
    Row(
        About.RELAYING,
        "RFC 7372 5.7.20 to 5.7.26; Gmail 5.7.26; Yahoo 5.7.9; Exchange 5.7.5x; Microsoft 365 5.7.5xx, 5.7.6xx",
        stages=_ENVELOPE,
        enhanced=r"[45]\.7\.(2\d|[89]|5\d|6\d\d)|5\.7\.5\d\d",
    ),
    Row(
        About.RELAYING,
        "RFC 7208 §8.4, RFC 7489 §6.3: SPF, DKIM and DMARC under other codes",
        stages=_ENVELOPE,
        words=(r"\b(spf|dkim|dmarc|arc)\b", r"\bunauthenticated\b"),
    ),
    # 8. The recipient and the message.
    Row(About.MESSAGE, "RFC 1870 §6.1: the message's size", stages="MAIL", codes="552", enhanced=r"|5\.3\.4"),
    Row(
        About.MESSAGE,
        "RFC 1870 §6: the message's size, in words",
        stages="MAIL|DATA|DOT",
        words=(
            r"message (size|too|is too|exceeds|length)|too (big|large)|size (limit|exceeds)|exceeds? (\w+ ){0,4}size",
        ),
    ),
    Row(
        About.RECIPIENT,
        "RFC 3463 X.1.x, X.2.x: the recipient's address or mailbox",
        stages=_RCPT,
        enhanced=r"[45]\.[12]\.\d+",
    ),
    Row(
        About.RECIPIENT,
        "RFC 5321 §4.2.2 550, 551, 553: an unknown user in the words of Exim, qmail, Courier, Exchange, Haraka",
        stages=_RCPT,
        words=(
            rf"{_UNKNOWN} (\w+ ){{0,2}}({_MAILBOX}|address|domain|host|person)\b",
            rf"{_MAILBOX}( \S+){{0,6}} ({_GONE}|not (a )?(valid|known|local|active|here|available|found|exist))",
            rf"not a (valid|known|local) {_MAILBOX}|^<>:? (is )?(unknown|not found)",
            r"no (mailbox|user|account|one|such \w+)( \S+){0,4} (here|by that name)|no (mailbox|such)\b",
            r"does ?n.t (have|like|exist)|does not (exist|like)|null ?mx|not our customer",
        ),
    ),
    Row(
        About.MESSAGE,
        "the message's content: ClamAV, Postfix header_checks, Gmail 552 5.7.0; RFC 5321 §6.3 loops",
        stages="DATA|DOT",
        codes="5..",
        words=(r"virus|malware|infected|attachment|executable|bare (lf|cr)|<lf>|\bmime\b|header|content|hop|\bloop",),
    ),
    # 9. The server itself.
    Row(About.RATE, "Gmail 421 4.7.0 Try again later, closing connection; Yahoo", codes="421", enhanced=r"4\.7\.\d+"),
    Row(About.CLOSING, "RFC 5321 §3.8 421; SES 454, said to any command", codes="421|454"),
    Row(
        About.RATE,
        "RFC 3463 4.3.x, 4.4.x: the server or its network for now, before a recipient is named",
        stages="MAIL",
        codes="4..",
        enhanced=r"4\.[34]\.\d+",
    ),
    Row(
        About.RATE,
        "RFC 3463 4.7.x: a policy for now, before a recipient is named",
        stages="CONNECT|EHLO|MAIL",
        codes="4..",
        enhanced=r"4\.7\.\d+",
    ),
)

DEFAULTS: Final[Mapping[tuple[str, int], About]] = {
    (Stage.CONNECT, 4): About.CLOSING,
    (Stage.CONNECT, 5): About.ROUTE,
    (Stage.EHLO, 4): About.CLOSING,
    (Stage.EHLO, 5): About.ROUTE,
    (Stage.STARTTLS, 4): About.CLOSING,
    (Stage.STARTTLS, 5): About.ROUTE,
    (Stage.AUTH, 4): About.CLOSING,
    (Stage.AUTH, 5): About.ROUTE,
    # At MAIL no recipient is named. Where other messages went over this connection it may have reached a limit.
    (Stage.MAIL, 4): About.SESSION,
    (Stage.MAIL, 5): About.ROUTE,
    (Stage.RCPT, 4): About.RECIPIENT,
    (Stage.RCPT, 5): About.UNCLEAR,
    (Stage.DATA, 4): About.MESSAGE,
    (Stage.DATA, 5): About.UNCLEAR,
    (Stage.DOT, 4): About.MESSAGE,
    (Stage.DOT, 5): About.UNCLEAR,
    (Stage.RSET, 4): About.SESSION,
    (Stage.RSET, 5): About.SESSION,
}
