"""Classification of bounces: which of them are evidence against a recipient's address. Pure.

A bounce has two witnesses: the status that the reporting server states, and the words of the server that refused the
mail (`Diagnostic-Code`). Reporting servers often state 5.1.1 for a refusal that says "blacklisted", so the refusing
server's enhanced code is the evidence where there is one, and where the two disagree the milder counts. What the words
say of this host, its sender, the content, its reputation or its rate is never evidence against a recipient, whatever
the codes. Such words are those by which a relay judges replies (`reply_class`), and more that only bounces have.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from outbox.smtp.refusal import About, Stage
from outbox.smtp.reply_class import normal_words
from outbox.smtp.reply_table import TABLE

WORDS_MAX: Final = 2000  # characters of the words that are judged

# Statuses that say that the address does not exist or accepts no mail, unless something milder is stated, too.
#   5.1.1, 5.1.2, 5.1.3, 5.1.6, 5.2.1   RFC 3463 §3.2 and §3.3: no such mailbox, no such domain, not an address, moved
#                                       without a forwarding address, disabled
#   5.1.10                              RFC 7505 (null MX); Exchange and Microsoft 365: RecipientNotFound
# Not 5.1.0 and 5.2.0, which say nothing definite; 5.1.4 (ambiguous); 5.1.7 and 5.1.8 (the sender); 5.1.9 (RFC 3886);
# 5.1.351 and 5.4.1 "Access denied" of Microsoft 365, which stand for a recipient that is unknown, and for one that is
# not synchronised yet; 5.2.2 (full); 5.4.4, which a resolver of ours that is out of order gives for every domain;
# 5.7.x (policy).
HARD: Final = frozenset(("5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.2.1"))

# Statuses of failures that are about the address, its mailbox or its domain, so that many of them are evidence: X.0.0;
# X.1.x but the sender's; X.2.x but the message's length and a list's; 5.5.0 (Outlook.com: "mailbox unavailable");
# 5.4.1 (Microsoft 365: "Recipient address rejected: Access denied"); 5.4.4 and 5.4.310 (no such domain).
_COUNTED: Final = re.compile(r"[45]\.(0\.0|1\.(?![78]$)\d+|2\.(?![34]$)\d+)|5\.(5\.0|4\.(1|4|310))")

_VAGUE: Final = "5.0.0"  # many state it whatever it was
_DISABLED: Final = "5.2.1"
_ENHANCED: Final = re.compile(r"(?<![\w.])#?([245]\.\d{1,3}\.\d{1,3})(?!\.?\d)")
_REPLY: Final = re.compile(r"(?:^|[:;>(<]|\bsaid|\breturned)\s{0,3}'?([2-5]\d\d)(?=[\s-]|$)")
# Without an enhanced code these leave it open whom they are about: 552 is about storage, 554 and 571 about policy.
_OPEN_REPLIES: Final = frozenset(("550", "551", "553", "556", "501", "504"))

_TYPE: Final = re.compile(r"^\s*[a-z][a-z0-9./_-]{0,40}\s{0,3};")
# The speaker, and the command that was replied to: "host mx.example.com[192.0.2.1] said: 550 …" is not about a host.
_SPEAKER: Final = re.compile(
    r"\b(?:remote )?(?:host|server|mta)\b(?: \S{1,100}){0,2}? (?:said|says|responded|replied|returned)\b:?"
    r"|\b(?:host|server) \S{1,100} ?\[[\da-f.:]{2,60}\]:?|\bsmtp error from remote (?:mail )?server\b"
    r"|\(in reply to [a-z ]{1,30}command\)|\bremote server returned\b"
)
# Postfix says in which table a recipient is not found; the table of domains that it relays is not about relaying.
_TABLE: Final = re.compile(r"in (?:local|relay|virtual)(?: mailbox| alias)?(?: recipient)? table")
_CODES: Final = re.compile(
    r"(?<![\w.])(?:[245]\d\d(?:[ -]|$))?#?[245]\.\d{1,3}\.\d{1,3}(?!\.?\d)|(?<![\w.])[245]\d\d[ -]"
)

_MAILBOX: Final = r"(user|mailbox|mail ?box|recipient|account|inbox|addressee|address|rcpt|alias|e-?mail)"
_STATE: Final = r"(unavailable|not found|not known|not valid|invalid|inactive|disabled|suspended|closed)"


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


# The address does not exist, in so many words.
_UNKNOWN: Final = _any_of(
    rf"unknown (\w+ ){{0,2}}{_MAILBOX}|{_MAILBOX}( \S+){{0,3}} (is |was )?unknown|no such|(not|n't) exist",
    rf"{_MAILBOX}( \S+){{0,4}} {_STATE}|no (\w+ )?{_MAILBOX}|not a (valid|known) {_MAILBOX}",
    rf"(invalid|bad|non-?existent|unavailable|inactive|disabled|closed) (\w+ )?{_MAILBOX}",
    rf"{_MAILBOX} that you tried to reach is (disabled|inactive)|unroute?able address|^(<>)?\W{{0,5}}unknown$",
    r"not our (user|customer)|(does ?n.t|does not|do not|don't) have|recip\w*notfound|no longer|not local|not listed",
    r"host (unknown|not found)|(domain|host) (does not|doesn't)|couldn't find any host",
    r"unbekannt|existiert nicht|inconnue?\b|n'existe pas|inexist|desconocid|desconhecid|no existe|n[ãa]o existe",
    r"sconosciut|non esiste|onbekend|bestaat niet|nieznan|nie istnieje|okänd|ukendt|ukjent|неизвест|не существует",
    r"не найден|不存在|无此|查无|存在しません|見つかりません|존재하지",
)
# A refusal of the message, which is one of the address only where it says that as well.
_REFUSED: Final = _any_of(
    r"(message|mail|e-?mail|content)s? (has been |have been |was |were |is |are )?"
    r"(rejected|refused|not accepted|declined|dropped|returned)",
    r"access (is )?denied|(delivery|transaction) (not |failed|denied)",
)
# What is about the sender, its host, its country or its reputation.
_SENDER: Final = (
    r"(mail|messages?) from|from (your|this) |\bip( address)?\b|\bblock(ed|ing)?\b|countr(y|ies)|\bdynamic\b",
    r"your (ip|host|server|network|domain|isp|provider|organi[sz]ation|system|mail ?server)|\bu[bc]e\b|score",
    r"(host|client|from|for|of|by|unknown|see|ip|^)\W{1,3}\d{1,3}(\.\d{1,3}){3}\b",
    r"\bsender\b|from (address|domain|header)|\bsending (host|server|ip|domain|mta|address|limit|rate)|originator",
    r"return-?path|authentica|\bspf\b|dkim|dmarc|\bptr\b|\brdns\b|reverse|\bhelo\b|\behlo\b|\brelay(ing|ed)?\b",
)
# Anything else: what is about us, and what may be over soon.
_OTHERWISE: Final = _any_of(
    *_SENDER,
    # Policy and reputation.
    r"polic(y|ies)|spam|junk|unsolicited|\bbulk\b|phish|fraud|abus(e|ive)\b|reputation|(black|block|deny) ?list",
    r"gr[ea]y-?list|\w*\brbl|dnsbl|\bbann?ed|blackhole|suspicious|malicious|virus|malware|infected",
    r"content|filter|senderbase|barracuda|proofpoint|cloudmark|mimecast|spamhaus|spamcop|sorbs|uceprotect",
    r"administrative(ly)? |prohibited|not permitted|(not|un) ?-?authori[sz]ed|restrict|not allowed|forbidden",
    r"permission|denied|complain|unsubscrib|challenge|captcha",
    r"go away|this mail ?server|no access|refused - see|\bproxy|submit messages|detected|organi[sz]ational|preference",
    r"protected|members?-? ?only|non-?member|mailing list|subscribed|low priority|multiple addresses|third-?party",
    r"batv|backscatter|rfc[ -]?\d+ ?(non-?)?(compliant|violation|conform)|not rfc|(user|recipient) (reject|refuse)",
    r"\b(s3140|s3150|ou-00\d|dy-00\d|sc-00\d|tss?\d\d|ib\d{3})\b|\((rtr|hvu|dyn|cnf|con|rly):\w+\)",
    # The sender's authenticity, and what it is asked to do.
    r"relay|\btls\b|\bssl\b|encrypt|certificate|login|(verif|valid)\w+ fail|fully[ -]qualified",
    r"(unable|failed|could not|cannot) (to )?verify|callback|call-?out",
    # Rate, quota and size.
    r"\brate\b|throttl|too (many|much|fast|quick|frequent|often|large|big|long)|limit|quota|exceed|excessive|overload",
    r"\bfull\b|insufficient|enough (disk |free )?space|out of (space|storage|disk|memory)|disk|storage|no space",
    r"\bsize\b|allot|allowance|maximum|bandwidth|volume|\bcap\b|daily|hourly|per (day|hour|minute)",
    # For now.
    r"\bbusy\b|tempora|temp ?fail|transient|try (again )?(later|in|after)\b|again later|\bretry|at this time|right now",
    r"vacation|out of (the )?office|holiday|currently|for now|moment|not accepting|not found, try|attempts?\b",
    r"allowed queue|days\b",
    r"frozen|locked|time(d)?[ -]?out|(message|delivery|time|queue)\b.{0,20} expired|deferred|delayed",
    # The network, its names, and the server's own troubles.
    r"not respond|unreachable|not reachable|no route|gateway|malformed (or unexpected )?name|connection",
    r"ldap|directory|expansion|lookup (error|fail|tim)|name server (error|fail|tim)|name service",
    r"resolv(?!er\.)|\bdns\b|servfail|config|\bloop|hop count|too many hops|internal|local error|system error",
    r"i/o error|read-only|maintenance|service (is )?(not|un)|protocol|syntax error|out of sequence|not implemented",
    r"(could ?n.t|could not|can ?not|can't) (create|open|write|lock|access|update)|command|transport|\bdied\b|crash",
    r"procmail|maildrop|mailer error|pipe to|interrupted|error while|encountered|queue file|could not load",
)
# The same in other languages in which servers are known to answer.
_OTHERWISE_ELSEWHERE: Final = _any_of(
    r"gesperrt|blockiert|sperrliste|richtlinie|überschritten|kontingent|vorübergehend|voll\b|unerwünscht|absender",
    r"liste noire|bloqu|politique|dépass|pleine?\b|indésirable|provisoire|temporaire|expéditeur|emetteur|trop de",
    r"authentif",
    r"lista negra|lista nera|bloccat|polític|exced|superad|llen[oa]\b|cheia|lotad|cuota|pien[ao]\b|límite|remitente",
    r"mittente|remetente|geblokkeerd|zwarte lijst|beleid|tijdelijk|afzender|zablokowan|czarn\w+ list|przepełnion",
    r"nadawc|spärrad|svartlist|avsändare|спам|блокир|черн\w+ списк|чёрн\w+ списк|переполн|полон|временн|политик",
    r"превыш|лимит|отправител|垃圾|黑名单|黑名單|频率|頻率|限制|限額|已满|已滿|策略|发件|寄件|发信|稍后|稍後|暂时|暫時",
    r"迷惑|スパム|ブロック|容量|制限|一時|しばらく|送信元|ポリシ|스팸|차단|초과|일시|정책",
)
# Words that are never about the mailbox, so that they do not count, however often they come; beside the rows of
# `reply_class`.
_NEVER: Final = _any_of(
    r"spam|junk|unsolicited|reputation|polic(y|ies)|\bbulk\b|bann?ed|(black|block|deny) ?list|abuse|phish|malware",
    *_SENDER,
    r"gr[ea]y-?list|throttl|\brate\b|receiv\w+ mail|too (many|much|fast|quick|frequent|often)",
)
_SAID_TO: Final = (
    (Stage.MAIL, "450"), (Stage.RCPT, "450"), (Stage.RCPT, "550"), (Stage.DOT, "450"), (Stage.DOT, "550"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judged:
    """Weight of a failure as evidence against the recipient's address.

    `status` is the code that decided. `is_hard` is True if it alone shows that the address does not exist or accepts no
    mail; `counts` if many of them, for different emails, do.
    """

    status: str | None
    is_hard: bool
    counts: bool


def judge(stated: str, diagnostic: str, *, quoted: str = "") -> Judged:
    """Return the weight of a final failure with that Status field and those words of the refusing server.

    `quoted` is what the text of a report without such words quotes from the server, as Sendmail's transcript.
    """
    plain = normal_words(f"{diagnostic} {quoted}"[:WORDS_MAX])
    remote = _ENHANCED.findall(plain)
    both = _ENHANCED.findall(stated) + remote
    codes = [code for code in both if code != _VAGUE] or both
    decisive = next((code for code in codes if code not in HARD), codes[-1] if codes else None)
    replies = _REPLY.findall(_TYPE.sub("", plain))
    words = _words_alone(plain)
    agreed = bool(codes) and all(code in HARD for code in codes) and not any(code[0] == "4" for code in replies)
    is_unknown = _UNKNOWN.search(words) is not None
    # A reporting server makes up its status from the three digits of the reply where the refusing one gave no enhanced
    # code. Then, and with 5.2.1, which servers give for a rate as well, the words have to say that there is no such
    # address.
    is_definite = any(code not in (_VAGUE, _DISABLED) for code in remote)
    is_bare = not words and _OPEN_REPLIES.issuperset(replies)
    named = is_unknown or is_bare or (is_definite and _REFUSED.search(words) is None)
    counts = all(_COUNTED.fullmatch(code) for code in codes) and not _is_about_us(words)
    return Judged(decisive, agreed and named and not _says_otherwise(words), counts)


def _words_alone(plain: str) -> str:
    """Return the words without codes, and without the name of the server they come from."""
    return " ".join(_CODES.sub(" ", _TABLE.sub(" ", _SPEAKER.sub(" ", _TYPE.sub("", plain)))).split())


def _says_otherwise(words: str) -> bool:
    """Return True if the words say anything but that the address does not exist."""
    return _OTHERWISE.search(words) is not None or _OTHERWISE_ELSEWHERE.search(words) is not None or _is_about_us(words)


def _is_about_us(words: str) -> bool:
    """Return True if the words are about this host, its sender, the message or the rate."""
    return _NEVER.search(words) is not None or any(pattern.search(words) for pattern in _rows_about_us())


@cache
def _rows_about_us() -> tuple[re.Pattern[str], ...]:
    """Return the words of those rows of `reply_class` that a bounce can have and that are not about the recipient."""
    return tuple(
        re.compile(words)
        for row in TABLE
        if row.about is not About.RECIPIENT and any(row.may_be_said(stage, code) for stage, code in _SAID_TO)
        for words in row.words
    )
