r"""Classification of bounces: which of them are evidence against a recipient's address. Pure.

A bounce has two witnesses: the status that the reporting server states, and the words of the server that refused the
mail (`Diagnostic-Code`). Reporting servers often state 5.1.1 for a refusal that says "blacklisted", so the refusing
server's enhanced code is the evidence where there is one, and where the two disagree the milder counts. What the words
say of this host, its sender, the content, its reputation or its rate is never evidence against a recipient, whatever
the codes. The knowledge of such words is that of `reply_class`, by which a relay judges replies.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from outbox.reply_class import TABLE, About, Stage, normal_words

SAID_MAX: Final = 2000  # characters of what was said that are judged

# Statuses that say that the address does not exist or accepts no mail, when nothing milder is said.
#   5.1.1, 5.1.2, 5.1.3, 5.1.6, 5.2.1   RFC 3463 §3.2 and §3.3: no such mailbox, no such domain, not an address, moved
#                                       without a forwarding address, disabled
#   5.1.10                              RFC 7505 (null MX); Exchange and Microsoft 365: RecipientNotFound
# Not 5.1.0 and 5.2.0, which say nothing definite; 5.1.4 (ambiguous); 5.1.7 and 5.1.8 (the sender); 5.1.9 (RFC 3886);
# 5.1.351 and 5.4.1 "Access denied" of Microsoft 365, which stand for a recipient that is unknown, and for one that is
# only not synchronised yet; 5.2.2 (full); 5.4.4, which a resolver of ours that is out of order gives for every domain;
# 5.7.x (policy).
HARD: Final = frozenset(("5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.2.1"))

# Statuses of failures that are about the address, its mailbox or its domain, so that they count when they go on and on:
# X.0.0, X.1.x but the sender's, X.2.x but the message's length and a list's, 5.5.0 (Outlook.com: "mailbox unavailable"),
# 5.4.1 (Microsoft 365: "Recipient address rejected: Access denied"), 5.4.4 and 5.4.310 (no such domain).
_COUNTED: Final = re.compile(r"[45]\.(0\.0|1\.(?![78]$)\d+|2\.(?![34]$)\d+)|5\.(5\.0|4\.(1|4|310))")

_ENHANCED: Final = re.compile(r"(?<![\w.])#?([245]\.\d{1,3}\.\d{1,3})(?!\.?\d)")
_VAGUE: Final = "5.0.0"  # many state it whatever it was
_REPLY: Final = re.compile(r"(?:^|[:;>(<]|\bsaid|\breturned)\s{0,3}'?([2-5]\d\d)(?=[\s-]|$)")
_TYPE: Final = re.compile(r"^\s*[a-z][a-z0-9./_-]{0,40}\s{0,3};")
# Postfix says in which table a recipient is not found; the table of domains that it relays is not about relaying.
_TABLE: Final = re.compile(r"in (?:local|relay|virtual)(?: mailbox| alias)?(?: recipient)? table")
# Who said it and in reply to what: "host mx.example.com[192.0.2.1] said: 550 …" is not about a host.
_SPEAKER: Final = re.compile(
    r"\b(?:remote )?(?:host|server|mta)\b(?: \S{1,100}){0,2}? (?:said|says|responded|replied|returned)\b:?"
    r"|\b(?:host|server) \S{1,100} ?\[[\da-f.:]{2,60}\]:?|\bsmtp error from remote (?:mail )?server\b"
    r"|\(in reply to [a-z ]{1,30}command\)|\bremote server returned\b"
)
# What a server tells before it quotes another one's reply.
_PRELUDE: Final = re.compile(r"^.{0,600}?\b(?:said|says|returned|after|server|host|response|reply)\b.{0,200}?(?<![\w.])(?=[45]\d\d[ -])")
_CODES: Final = re.compile(r"(?<![\w.])(?:[245]\d\d(?:[ -]|$))?#?[245]\.\d{1,3}\.\d{1,3}(?!\.?\d)|(?<![\w.])[245]\d\d[ -]")

# Words of the rows of `reply_class` that a bounce shares with a reply, and more that only bounces have.
_STAGES: Final = ((Stage.MAIL, "450"), (Stage.RCPT, "450"), (Stage.RCPT, "550"), (Stage.DOT, "450"), (Stage.DOT, "550"))

_MAILBOX: Final = r"(user|mailbox|mail ?box|recipient|account|inbox|addressee|address|rcpt|alias|e-?mail)"
_UNKNOWN: Final = re.compile(
    rf"unknown (\w+ ){{0,2}}{_MAILBOX}|{_MAILBOX}( \S+){{0,3}} (is |was )?unknown|no such|(not|n't) exist"
    rf"|{_MAILBOX}( \S+){{0,4}} (unavailable|not found|not known|not valid|invalid|inactive|disabled|suspended|closed)"
    rf"|(invalid|bad|non-?existent|unavailable|inactive|disabled|closed) (\w+ )?{_MAILBOX}|no (\w+ )?{_MAILBOX}"
    rf"|not a (valid|known) {_MAILBOX}|not our (user|customer)|(does ?n.t|does not|do not|don't) have|recip\w*notfound"
    r"|no longer|not local|not listed|host (unknown|not found)|(domain|host) (does not|doesn't)|couldn't find any host"
)
_OURS: Final = re.compile(
    # policy and reputation
    r"policy|policies|spam|unsolicited|\bbulk\b|phish|fraud|abus(e|ive)\b|reputation|blacklist|blocklist|black ?list"
    r"|block ?list|deny ?list|grey ?list|gray ?list|\brbl|dnsbl|banned|\bblock(ed|ing)\b|\bblackhole|suspicious|malicious"
    r"|virus|malware|infected|content|filter|senderbase|\bbarracuda|proofpoint|cloudmark|mimecast|spamhaus|spamcop"
    r"|sorbs|uceprotect|administrative(ly)? (prohibit|denied|den|block|reject)|prohibited|not permitted|not authori[sz]ed"
    r"|unauthori[sz]ed|restricted|not allowed|forbidden|access (is )?den|permission|denied|complaint|unsubscrib"
    # the sender, and what it is asked to do
    r"|\bsender\b|\bfrom (address|domain|header)|\bsending (host|server|ip|domain|mta|address|limit|rate)|originator|return-?path|authenticat|\bspf\b|dkim|dmarc"
    r"|\bptr\b|\brdns\b|reverse|\bhelo\b|\behlo\b|relay|\btls\b|\bssl\b|encrypt|certificate|login|challenge|captcha"
    # rate, quota and what is over soon
    r"|\brate\b|rate ?limit|throttl|too (many|much|fast|quick|frequent|often)|limit|quota|exceed|excessive|overloaded"
    r"|\bfull\b|over ?quota|insufficient|out of (space|storage|disk|memory)|disk|storage|no space|too (large|big|long)"
    r"|(message|mail) size|\bbusy\b|tempora|tempfail|temp fail|transient|try (again )?(later|in|after)\b|again later|\bretry"
    r"|timed? ?out|time-?out|(message|delivery|time|queue)\b.{0,20} expired|deferred|delayed|not responding|unreachable|refused connection|connection"
    # the server's own troubles
    r"|lookup (error|fail|tim)|name server (error|fail|tim)|name service|resolv(?!er\.)|\bdns\b|servfail|config|misconfig|\bloop|hop count|too many hops"
    r"|internal (server )?error|local error|system error|i/o error|read-only|maintenance|service (is )?(not|un)"
    r"|could ?n.t (create|open|write|lock)|could not (create|open|write|lock)|can(not|'t) (create|open|write|lock)"
    r"|protocol|syntax error|out of sequence|not implemented|bad command"
)  # fmt: skip
# The same in the languages in which servers are known to answer.
_OURS_ELSEWHERE: Final = re.compile(
    r"gesperrt|blockiert|sperrliste|richtlinie|überschritten|kontingent|vorübergehend|voll\b|unerwünscht"
    r"|liste noire|bloqu|politique|dépass|pleine?\b|indésirable|refusé pour|provisoire|temporaire"
    r"|lista negra|lista nera|bloccat|polític|política|exced|superad|llen[oa]\b|cheia|lotad|cuota|pien[ao]\b|límite"
    r"|geblokkeerd|zwarte lijst|beleid|tijdelijk|zablokowan|czarn\w+ list|przepełnion|limit|spärrad|svartlist"
    r"|спам|блокир|черн\w+ списк|чёрн\w+ списк|переполн|временн|политик|превыш|лимит|отправител"
    r"|垃圾|黑名单|黑名單|频率|頻率|限制|限額|已满|已滿|策略|发件|寄件|发信|稍后|稍後|暂时|暫時"
    r"|迷惑|スパム|ブロック|容量|制限|一時|しばらく|送信元|ポリシ|스팸|차단|초과|일시|정책"
)
# Of these what is never about a mailbox, so that it does not count however often it is said.
_POLICY: Final = re.compile(
    r"spam|unsolicited|reputation|policy|\bbulk\b|banned|blacklist|abuse|phish|malware|grey ?list|gray ?list|throttl"
    r"|\brate\b|receiv\w+ mail|too (many|much|fast|quick|frequent|often)"
)


@dataclass(frozen=True, slots=True)
class Judged:
    """Weight of a failure as evidence against the recipient's address.

    `status` is the code that decided. `is_hard` is True if it alone shows that the address does not exist or accepts no
    mail; `counts` if many of them, for different emails, do.
    """

    status: str | None
    is_hard: bool
    counts: bool


def judge(stated: str, said: str, *, asked: str = "") -> Judged:
    """Return the weight of a final failure with that Status field and those words of the refusing server.

    `asked` is what else a report without such words quotes from the server, as in the transcript of Sendmail.
    """
    text = f"{said} {asked}"[:SAID_MAX].lower()
    plain = normal_words(text)
    remote = _ENHANCED.findall(plain)
    both = _ENHANCED.findall(stated)[:1] + remote
    codes = [code for code in both if code != _VAGUE] or both
    decisive = next((code for code in codes if code not in HARD), codes[-1] if codes else None)
    replies = _REPLY.findall(_TYPE.sub("", plain))
    words = _words_alone(plain)
    is_ours = _is_ours(words)
    is_unknown = _UNKNOWN.search(words) is not None
    agreed = bool(codes) and all(code in HARD for code in codes) and not any(code[0] == "4" for code in replies)
    named = any(code != _VAGUE for code in remote) or is_unknown or (not remote and _may_be_about_a_mailbox(replies))
    counted = all(_COUNTED.fullmatch(code) for code in codes) and not _is_about_us(words)
    return Judged(decisive, agreed and named and not is_ours, counted)


def _may_be_about_a_mailbox(replies: list[str]) -> bool:
    """Return True if the reply codes leave room for it: 552 is about storage, 554 and 571 are about policy."""
    return all(code in ("550", "551", "553", "501", "504", "556") for code in replies)


def _words_alone(plain: str) -> str:
    """Return the words without codes, and without the name of the server that said them."""
    said = _PRELUDE.sub("", _TYPE.sub("", plain), count=1)
    return " ".join(_CODES.sub(" ", _TABLE.sub(" ", _SPEAKER.sub(" ", said))).split())


@cache
def _rows_about_us() -> tuple[re.Pattern[str], ...]:
    """Return the words of the rows of `reply_class` that are not about the recipient, as a reply to a recipient has them."""
    return tuple(
        re.compile(words)
        for row in TABLE
        if row.about is not About.RECIPIENT and any(row.may_be_said(stage, code) for stage, code in _STAGES)
        for words in row.words
    )


def _is_about_us(words: str) -> bool:
    """Return True if the words are about this host, sender, message or rate as `reply_class` knows them."""
    return _POLICY.search(words) is not None or any(pattern.search(words) for pattern in _rows_about_us())


def _is_ours(words: str) -> bool:
    """Return True if the words say anything but that the address does not exist."""
    return _OURS.search(words) is not None or _OURS_ELSEWHERE.search(words) is not None or _is_about_us(words)

