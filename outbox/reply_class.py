"""Classification of SMTP replies: which part of the conversation a refusal is about. Pure.

The first digit says whether a later try may succeed. It does not say whose fault the refusal is: 550 is said to an
unknown user, to a sender over its daily limit and to a host on a blocklist. Only a refusal of the recipient or of the
message may be charged to the email. `TABLE` decides by stage, code, enhanced code (RFC 3463) and words; the first row
that matches wins, and `DEFAULTS` decide by stage and first digit alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from functools import cache
from typing import Final

from outbox.verdict import REPLY_CHARACTERS_MAX, Deferred, Refused


class Stage(StrEnum):
    """Command that a reply answers; CONNECT is the greeting, DOT the end of the content."""

    CONNECT = "CONNECT"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    DOT = "DOT"
    RSET = "RSET"


class About(Enum):
    """Subject of a refusal, which decides what it costs and whom."""

    RECIPIENT = auto()
    """This recipient: a try of the email, or a dead letter."""
    MESSAGE = auto()
    """This message: a try of the email, or a dead letter."""
    UNCLEAR = auto()
    """This recipient or message, unless several different ones get the same reply in a row: then the route."""
    RELAYING = auto()
    """The route, unless the server accepts other mail from the same sender at that time: then this recipient. Not said
    of MAIL, where no recipient is named yet."""
    ROUTE = auto()
    """The sender, this host, the login or our own syntax: the mail stays pending, and a person must act."""
    SESSION = auto()
    """This connection, which has reached a limit: another connection takes the email at once."""
    RATE = auto()
    """The pace: nothing is wrong with the email; it is sent later."""
    CONNECTIONS = auto()
    """The number of connections: fewer of them take the mail."""
    CLOSING = auto()
    """The server, which closes the connection or has temporary trouble of its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. An empty column matches anything, the others are regular expressions.

    `stages`, `codes` and `enhanced` match as a whole, `words` anywhere in the text, which is in small letters.
    `source` names the specification, or the server that says it.
    """

    about: About
    source: str
    stages: str = ""
    codes: str = ""
    enhanced: str = ""
    words: str = ""

    def matches(self, stage: str, code: str, enhanced: str, text: str) -> bool:
        """Return True if each column matches."""
        return (
            (not self.stages or _compiled(self.stages).fullmatch(stage) is not None)
            and (not self.codes or _compiled(self.codes).fullmatch(code) is not None)
            and (not self.enhanced or _compiled(self.enhanced).fullmatch(enhanced) is not None)
            and (not self.words or _compiled(self.words).search(text) is not None)
        )


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}\b")
_REFUSED: Final = "[45].."
_CONVERSATION: Final = "MAIL|RCPT|DATA|DOT|RSET"
_ENVELOPE: Final = "MAIL|RCPT|DATA|DOT"
_RCPT: Final = "RCPT|DATA|DOT"  # LMTP and some servers judge the recipient late

# What an envelope's refusal calls the recipient and the sender.
_MAILBOX: Final = r"(user|mailbox|mail ?box|recipient|account|inbox|addressee|rcpt|alias|local part|local-part)"
_NOT_TAKEN: Final = (
    r"(denied|rejected|refused|not (allowed|permitted|authori[sz]ed|accepted)|blocked|prohibited|forbidden)"
)

TABLE: Final = (
    # 1. Limits of the recipient's mailbox, which must not be taken for limits of ours.
    Row(
        About.RECIPIENT,
        stages=_RCPT,
        words="gr[ea]y-?list",
        source="greylisting is by recipient: postgrey, rspamd, RFC 6647",
    ),
    Row(
        About.RECIPIENT,
        stages=_RCPT,
        words=(
            r"(user|recipient|mailbox)( \S+){0,6} (is receiving|receives?) mail at a rate"
            "|per hour message receive limit"
        ),
        source="Gmail 4.2.1, Microsoft 365 5.2.121: the recipient's rate",
    ),
    Row(
        About.RECIPIENT,
        stages=_RCPT,
        codes=_REFUSED,
        enhanced=r"[45]\.7\.1[23]\d",
        source="Microsoft 365 5.7.124 to 5.7.136: the sender may not write to this group or recipient",
    ),
    # 2. Connections and sessions that have reached a limit.
    Row(
        About.CONNECTIONS,
        codes=_REFUSED,
        words=(
            r"too many (\w+[ -]){0,3}(connections|sessions|clients|threads|channels|tls sessions)(?! (errors"
            "|commands))"
        ),
        source="Postfix smtpd_client_connection_count_limit 421 4.7.0; Exim, sendmail 421 4.3.2; Haraka; RFC 4468",
    ),
    Row(
        About.CONNECTIONS,
        codes=_REFUSED,
        words=(
            r"(concurren\w+|simultaneous|parallel|open) (\w+ )?(connection|session)s?|connections? (from"
            r"|per) \S+ (host|ip)|(concurrent|simultaneous) \w+ limit|concurrency limit|(connection"
            r"|thread) (count |number )?(limit|quota)|maximum (number of )?(\w+ )?connections|max(_"
            "|imum )?connections|all server ports are busy"
        ),
        source="Exchange 421 4.3.2; Microsoft 365 432 4.3.2; SES 421; Exim smtp_accept_max_per_host; postscreen",
    ),
    Row(
        About.CONNECTIONS,
        codes=_REFUSED,
        words=r"connection (rate|frequency)|connect\w* too (fast|often|frequently)",
        source="sendmail ConnectionRateThrottle: 421 4.3.2 Connection rate limit exceeded",
    ),
    Row(About.CONNECTIONS, codes="432", source="Microsoft 365: 432 4.3.2 concurrent connections limit exceeded"),
    Row(
        About.SESSION,
        stages=_CONVERSATION,
        codes=_REFUSED,
        words=(
            "too many (messages|mails|e-?mails|transactions|recipients|rcpts)( sent)?( in| on| for| per| over"
            r"| during)( \w+)?( smtp)? (connection|session)"
        ),
        source="Exim smtp_accept_max_per_connection: 421 too many messages in this connection",
    ),
    Row(
        About.SESSION,
        stages=_CONVERSATION,
        codes=_REFUSED,
        words=(
            r"(messages?|mails?|e-?mails?|transactions?|recipients?)( limit| maximum| count)?( \w+)?( per| for"
            r"| in| on)( \w+)?[ -](smtp )?(connection|session)|(session|connection) (message )?(limit|quota)"
            "|(connection|session) (has )?(expired|too long|lasted)|reached (the )?(end of|limit for) (this"
            "|the) (conn|sess)"
        ),
        source="the same in other words",
    ),
    Row(
        About.SESSION,
        stages=_CONVERSATION,
        codes=_REFUSED,
        words=r"too many messages sent\.?$",
        source="OpenSMTPD limit session-messages: 452 4.5.3 Too many messages sent",
    ),
    Row(
        About.SESSION,
        stages=_CONVERSATION,
        codes=_REFUSED,
        words=(
            r"too (many|much) (\w+[ -]){0,4}(errors|commands|rsets?|noops?|noise|junk|failures|mistakes"
            "|rejections)"
        ),
        source="Postfix smtpd_hard_error_limit 421 4.7.0; Exim smtp_accept_max_nonmail 554; sendmail; go-smtp",
    ),
    Row(
        About.SESSION,
        stages=_CONVERSATION,
        codes=_REFUSED,
        words=(
            rf"too many (\w+[ -]){{0,2}}(bad|invalid|unknown|failed|rejected|nonexistent|unsuccessful"
            rf"|wrong) (\w+ )?{_MAILBOX}|(error|command)s? limit"
        ),
        source="sendmail BadRcptThrottle, Exchange tarpit, Haraka: too many unknown recipients in this session",
    ),
    Row(
        About.SESSION,
        stages=_CONVERSATION,
        codes="452|421",
        enhanced=r"|4\.5\.3",
        words="^$|too many (messages|recipients|mails)",
        source="RFC 3463 4.5.3 for one recipient per message: a limit of the session (OpenSMTPD, Postfix, qmail-smtpd)",
    ),
    # 3. Our own syntax, out of sequence, or a command that the server does not know.
    Row(
        About.RECIPIENT,
        stages="RCPT",
        codes="50[01]|504|55[0-9]",
        enhanced=r"[45]\.1\.[0-6]|[45]\.1\.10",
        source="RFC 3463 X.1.0 to X.1.6: the recipient's address; Postfix 501 5.1.3, sendmail 553 5.1.3",
    ),
    Row(
        About.RECIPIENT,
        stages="RCPT",
        codes="501|553",
        words=r"(malformed|bad|invalid|illegal|missing) (\w+ )?(address|domain|local)",
        source="Exim 501 <x>: malformed address",
    ),
    Row(
        About.MESSAGE,
        stages="DOT",
        codes="500",
        words="line (is )?too long|long line",
        source="a line of the content (RFC 5321 §4.5.3.1.6)",
    ),
    Row(About.ROUTE, codes="50[0-3]", source="RFC 5321 §4.2.2: syntax, sequence, not implemented; Haraka 503"),
    Row(
        About.ROUTE,
        codes=_REFUSED,
        words=r"\b(helo|ehlo|lhlo)\b|fully-qualified hostname",
        source="Postfix reject_non_fqdn_helo_hostname: 504 5.5.2 <name>: Helo command rejected (to RCPT); Exim",
    ),
    Row(
        About.MESSAGE,
        stages=_ENVELOPE,
        codes="5..",
        enhanced=r"5\.6\.\d+|5\.3\.4|5\.2\.3",
        source="RFC 3463 X.6.x, 5.3.4; RFC 6531 §3.5 5.6.7: the message's form or size",
    ),
    Row(About.ROUTE, codes="504|555", source="RFC 5321 §4.2.2: a parameter that is not implemented or not recognized"),
    Row(
        About.ROUTE,
        stages=_CONVERSATION,
        codes="5..",
        enhanced=r"5\.5\.[0-24]",
        source="RFC 3463 X.5.x: the protocol, not the mail",
    ),
    # 4. Logins and encryption.
    Row(About.ROUTE, codes="535|534|538", source="RFC 4954 §6: the login is refused, too weak or not encrypted"),
    Row(
        About.RELAYING,
        stages=_RCPT,
        codes="530",
        source="RFC 4954 §6: a login is required, perhaps for this recipient only",
    ),
    Row(About.ROUTE, codes="530", source="RFC 4954 §6, RFC 3207 §4: a login, or STARTTLS, is required first"),
    Row(
        About.RELAYING,
        stages=_ENVELOPE,
        codes=_REFUSED,
        words=(
            "(authentication|smtp auth|auth|login|log-?in) (is |was )?(required|needed|mandatory)|(must"
            "|need to|have to|please|should)( first)?( be)? (authenticate|log ?in|issue a starttls)"
            "|authenticate first|not (logged in|authenticated)|requires? (smtp )?auth|(starttls|tls"
            "|encryption) (is )?(required|needed)"
        ),
        source="the same under other codes: Courier, hMailServer, MailEnable, Exchange 5.7.57 Client not authenticated",
    ),
    # 5. Sending limits: of the account or the host, not of the recipient's mailbox.
    Row(
        About.RECIPIENT,
        stages=_RCPT,
        codes=_REFUSED,
        enhanced=r"|[45]\.[02-7]\.\d+",
        words=(
            rf"{_MAILBOX}( \S+){{0,4}} (is |has )?(full|over|exceeded)|(mailbox|disk|storage"
            r"|inbox) (\w+ )?(full|quota|limit)|over ?quota|insufficient (mailbox|disk) (space|storage)"
            r"|^(\S+ )?quota exceeded|user (has )?(no|exceeded)"
        ),
        source="RFC 3463 X.2.2: the recipient's mailbox is full; Dovecot Quota exceeded (mailbox for user is full)",
    ),
    Row(
        About.RATE,
        codes="4..",
        words=(
            r"throttl|rate[ -]?limit|\brate\b|too (much|many) (mail|messages|recipients|e-?mails|requests"
            r"|auth)|too (fast|quickly|frequent)|slow(er| down)|\b(per|an?) (second|minute|hour|day)\b|(hourly"
            r"|daily|sending) (\w+ )?(limit|quota)|limit exceeded|quota exceeded|unusual(ly)? (rate|volume)"
            "|temporarily deferred|try again slower"
        ),
        source="Postfix anvil 450 4.7.1 too much mail from; SES 454 Throttling failure; Gmail 421 4.7.28; Yahoo",
    ),
    Row(
        About.ROUTE,
        codes="5..",
        words=(
            r"(daily|hourly|monthly|sending|outgoing|outbound|submission|relay|plan|account) (\w+ ){0,3}(limit"
            r"|quota|maximum|allowance|credits?)|(limit|quota|max\w*|exceed\w*|many|much)( \S+){0,5} (per|/"
            r"|an?|each|this) ?(second|minute|hour|day|month)|(reached|exceeded|over)( \w+){1,5} (limit|quota"
            "|rate|credits)|rate[ -]?limit|throttl|out of credits?|too many (messages|mails|e-?mails)"
            "|limit (exceeded|reached)|not enough credits?|message recipients"
        ),
        source="Gmail 550 5.4.5 Daily user sending limit; Microsoft 365 5.1.90; cPanel max emails per hour; OVH",
    ),
    Row(
        About.ROUTE,
        stages=_CONVERSATION,
        codes="5..",
        enhanced=r"5\.4\.5|5\.1\.90|5\.7\.7\d\d",
        source="Gmail 5.4.5; Microsoft 365 5.1.90, 5.7.70x",
    ),
    # 6. The sender's address.
    Row(
        About.ROUTE,
        stages=_CONVERSATION,
        codes=_REFUSED,
        enhanced=r"[45]\.1\.[78]|[45]\.7\.60|5\.2\.252",
        source="RFC 3463 X.1.7, X.1.8: the sender's address; Exchange 5.7.60, 5.2.252 SendAsDenied",
    ),
    Row(
        About.RELAYING,
        stages=_ENVELOPE,
        codes=_REFUSED,
        words=(
            r"sender (address|domain|verif\w+|id|identity|mailbox)? ?(\S+ ){0,3}(rejected|refused|denied"
            "|failed|blocked|invalid|not)|not owned by|bad outbound sender|sendas ?denied|(send"
            r"|sending) (\w+ )?(as|from|on behalf of) (this|that|the|another|<)|permissions? to send|(not"
            "|isn't) (been )?verified|failed the check in region|(invalid|bad|unknown"
            r"|unauthori[sz]ed) (envelope )?(sender|from|return)|(from|sender|return-path)( \S+){0,3} (address"
            r"|domain|identity|header)( \S+){0,3} (not|un)|authori[sz]ed to (send|use)|does not exist.*sender"
        ),
        source="Postfix 553 5.7.1 not owned by user; SES 554 not verified; Exim Sender verify failed",
    ),
    # 7. Relaying, blocklists, and the sender's authenticity.
    Row(
        About.RELAYING,
        stages=_ENVELOPE,
        codes=_REFUSED,
        words=(
            rf"relay(ing)?\b(?! (server|host))( \S+){{0,5}} ?{_NOT_TAKEN}|unable to relay"
            rf"|{_NOT_TAKEN}( \w+)* relay|(not|no|n't|cannot) (an? )?(open )?relay|rcpthosts|relay attempt"
            r"|not (a )?(local|hosted) domain|(not|don't|won't) (\w+ )?relay"
        ),
        source="Postfix 554 5.7.1 Relay access denied; Exim relay not permitted; Exchange 5.7.1, 5.7.54; qmail",
    ),
    Row(
        About.RELAYING,
        stages=_ENVELOPE,
        codes=_REFUSED,
        words=(
            r"client host|block ?list|black ?list|deny ?list|\b\w*rbls?\b|\bdnsbl|spamhaus|spamcop|barracuda"
            r"|reputation|reverse (dns|hostname|lookup)|\b(ptr|rdns)\b|(ip|host|server|network"
            rf"|client)( \S+){{0,6}} (is |was |been )?({_NOT_TAKEN}|banned|listed)|not accepted from (this"
            "|your) ip|cannot find your"
        ),
        source="Postfix reject_rbl_client 554 5.7.1 blocked using zen.spamhaus.org; Microsoft 365 S3140; Gmail 5.7.25",
    ),
    Row(
        About.RELAYING,
        stages=_ENVELOPE,
        codes=_REFUSED,
        words=r"\b(spf|dkim|dmarc|arc)\b|unauthenticated|is not authenticated",
        source="RFC 7372 X.7.20 to X.7.26; Gmail 550 5.7.26 unauthenticated mail; Yahoo 554 5.7.9",
    ),
    Row(
        About.RELAYING,
        stages=_ENVELOPE,
        codes=_REFUSED,
        enhanced=r"[45]\.7\.(2[0-9]|[89]|5[0-9]|6\d\d)",
        source="RFC 7372; Exchange 5.7.5x, 5.7.6xx",
    ),
    # 8. The recipient and the message.
    Row(
        About.MESSAGE,
        stages="MAIL|DATA|DOT",
        codes=_REFUSED,
        words=(
            "message (size|too|is too|exceeds|length)|(too (big|large))|size (limit|exceeds)"
            r"|exceeds? (\w+ )*size"
        ),
        source="RFC 1870 §6: the message's size",
    ),
    Row(
        About.RECIPIENT,
        stages=_RCPT,
        codes=_REFUSED,
        enhanced=r"[45]\.[12]\.\d+",
        source="RFC 3463 X.1.x, X.2.x: the recipient's address or mailbox",
    ),
    Row(
        About.RECIPIENT,
        stages=_RCPT,
        codes=_REFUSED,
        words=(
            r"(unknown|no such|invalid|bad|non-?existent|unrout\w+|undeliverable|inactive"
            rf"|ambiguous) (\w+ ){{0,2}}({_MAILBOX}|address|domain|host|person)"
            rf"|{_MAILBOX}( \S+){{0,6}} (unknown|not found|does ?n.t exist|does not exist|not exist|unavailable"
            "|not available|invalid|inactive|disabled|suspended|expired|closed|locked|busy|undeliverable"
            "|moved|full|not (a )?(valid|known|local|active|here))|no (mailbox|user|account|one"
            rf"|such \w+)( \S+){{0,4}} (here|by that name)|does ?n.t (have|like|exist)|does not (exist|like)"
            "|null ?mx|not our customer|mailbox unavailable|unknown user"
        ),
        source="RFC 5321 §4.2.2 550, 551, 553; Exim, qmail, Courier, Exchange, Haraka: user unknown in their words",
    ),
    Row(
        About.MESSAGE,
        stages="DATA|DOT",
        codes="5..",
        words=(
            "virus|malware|infected|attachment|executable|bare (lf|cr)|<lf>|mime|header|hop ?count"
            "|too many hops|loop|content"
        ),
        source="the message's content: ClamAV, Postfix header_checks, Gmail 552 5.7.0, RFC 5321 §6.3 loops",
    ),
    # 9. The server itself.
    Row(
        About.ROUTE,
        stages="MAIL",
        codes="5..",
        source="no recipient is named yet: the sender, this host or the account",
    ),
    Row(
        About.ROUTE,
        stages="CONNECT|EHLO",
        codes="5..",
        source="RFC 5321 §3.1 554 No SMTP service: this host is refused",
    ),
    Row(
        About.RATE,
        codes="421",
        enhanced=r"4\.7\.\d+",
        source="Gmail 421 4.7.0 Try again later, closing connection; Yahoo TSS04",
    ),
    Row(About.CLOSING, codes="421|454", source="RFC 5321 §3.8; SES 454: said to any command"),
    Row(
        About.RATE,
        stages="MAIL|DATA",
        codes="4..",
        enhanced=r"4\.[34]\.\d+",
        source="RFC 3463 4.3.x, 4.4.x: the server or its network for now",
    ),
    Row(
        About.RATE,
        stages="CONNECT|EHLO|MAIL",
        codes="45.",
        enhanced=r"4\.7\.\d+",
        source="RFC 3463 4.7.x before a recipient is named: policy for now",
    ),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 4xx or 5xx reply that ended an email's transaction, and what it is about."""

    about: About
    stage: str
    code: int
    text: str
    redirected_to: str | None = None

    @property
    def reply(self) -> str:
        """The reply as the attempt's trail keeps it."""
        said = f"{self.code} {self.text}"[:REPLY_CHARACTERS_MAX]
        if self.stage != Stage.DOT:
            said = f"{said} (to {self.stage})"
        return f"redirected to {self.redirected_to}: {said}" if self.redirected_to else said

    @property
    def verdict(self) -> Deferred | Refused:
        """The verdict on the email if the refusal is about its recipient or message."""
        return Refused(self.reply) if self.code >= 500 else Deferred(self.reply)  # noqa: PLR2004 - RFC 5321 §4.2.1


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


def classify(stage: str, code: int, text: str) -> About:
    """Return what a 4xx or 5xx reply is about. `text` is the reply without its code; its enhanced code is optional."""
    words = " ".join(text.lower().split())
    found = _ENHANCED.match(words)
    enhanced = found[0] if found else ""
    for row in TABLE:
        if row.matches(stage, str(code), enhanced, words[len(enhanced) :].strip()):
            return About.ROUTE if row.about is About.RELAYING and stage == Stage.MAIL else row.about
    return DEFAULTS.get((stage, code // 100), About.CLOSING)
