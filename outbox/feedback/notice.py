"""Notices of a bounce: what each says about one recipient, and what follows for the recipient of an email.

Knows nothing of the emails that were sent. `bounce_class` decides what a failure weighs.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from outbox.feedback.bounce_class import Judged, judge
from outbox.feedback.report_fields import one_line, untyped
from outbox.feedback.reported_address import (
    ADDRESS,
    AFTER_ADDRESS,
    address_in,
    forms,
    is_same_domain,
    is_same_mailbox,
    normal_address,
)

JUDGED_MAX: Final = 100  # notices about one recipient
REASON_MAX: Final = 400
_HELP: Final = re.compile(
    r"(?i)(?:mailto:)?(?:post-?master|hostmaster|abuse|support|help|helpdesk|contact|noc|security)@"
)
_QUOTED_DOMAIN: Final = re.compile(
    r"(?i)\b(?:domain|such host):? {0,2}[<'(\[]?([a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,9})"
)


class Kind(StrEnum):
    """Effect of a bounce: the address does not exist, only this email did not arrive, or the reader complained."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINED = "complained"


@dataclass(frozen=True)
class Notice:
    """Statement of a report about one recipient.

    `final`, `original` and `actual` are the values of the fields of these names, "" if they are missing: the address
    that failed, the one that the email was sent to, and the one that an alias of the reporting server led to.
    """

    final: str
    original: str = ""
    actual: str = ""
    has_failed: bool = True
    stated: str = ""
    diagnostic: str = ""
    transcript: str = ""
    complaint: str = ""

    @cached_property
    def addresses(self) -> frozenset[str]:
        """Return the addresses that it names, in the forms in which they can be compared."""
        return frozenset(form for value in (self.final, self.original) for form in forms(value))

    @cached_property
    def judged(self) -> Judged:
        """Return what it weighs against the recipient that it names."""
        return judge(self.stated, self.diagnostic, quoted=self.transcript)

    @property
    def kind(self) -> Kind:
        """Return what follows for the recipient that it names."""
        if self.complaint:
            return Kind.COMPLAINED
        return Kind.HARD if self.has_failed and self.judged.is_hard else Kind.SOFT

    @property
    def status(self) -> str | None:
        """Return the status that decided (RFC 3463)."""
        return None if self.complaint else self.judged.status

    @property
    def reason(self) -> str:
        """Return the status and the server's words on one line."""
        delayed = "" if self.has_failed else "delayed"
        return one_line(self.complaint or f"{delayed} {self.status or ''} {self.diagnostic or self.transcript}")[
            :REASON_MAX
        ]

    def is_about(self, recipient: str) -> bool:
        """Return True if it is this recipient's address that failed, and not one that the address leads to.

        An alias forwards to other addresses. When one of them fails, a report names it as its Final-Recipient, as
        X-Actual-Recipient (Sendmail) or in the words of the server ("550 <left@example.com>: User unknown"), and the
        alias at most as Original-Recipient: the alias itself works.
        """
        ours = normal_address(recipient)
        local, _, domain = ours.rpartition("@")
        if self.actual and not is_same_mailbox(self.actual, ours):
            return False
        words = (self.diagnostic or self.transcript)[:REASON_MAX]
        quoted = [one for one in ADDRESS.findall(words) if not _HELP.match(one)]
        if quoted and not any(is_same_mailbox(one.rstrip(AFTER_ADDRESS), ours) for one in quoted):
            return False
        domains = [one.lower() for one in _QUOTED_DOMAIN.findall(words)]
        if domains and not any(is_same_domain(one, domain) for one in domains):
            return False
        named = next((value for value in (self.final, self.original) if untyped(value)), "")
        if not named:
            return any(normal_address(one.rstrip(AFTER_ADDRESS)) == ours for one in quoted)
        return ours in forms(named) or ("@" not in named and address_in(named).lower() == local != "")

    def is_related(self, recipient: str) -> bool:
        """Return True if it names this recipient at all."""
        return normal_address(recipient) in self.addresses

    def is_from(self, recipient: str) -> bool:
        """Return True if a complaint can be this recipient's.

        Feedback reports may hide the name before the @ (RFC 6590), but an address of another domain is someone
        else's, to whom the email was passed on.
        """
        domains = {form.rpartition("@")[2] for form in forms(self.final) if "@" in form}
        return not domains or normal_address(recipient).rpartition("@")[2] in domains


@dataclass(frozen=True, slots=True)
class Finding:
    """What a bounce says about the recipient of an email.

    `counts` is True if it is a failure that counts towards `bounces_max`.
    """

    kind: Kind
    status: str | None
    reason: str
    counts: bool


@dataclass(frozen=True, slots=True)
class Bounce:
    """Content of a bounce or a complaint. In `evidence` a token may stand.

    `identity` is the same each time that this message is read.
    """

    identity: str
    notices: tuple[Notice, ...]
    evidence: str
    message_ids: tuple[str, ...]

    def about(self, recipient: str) -> Finding:
        """Return what it says about the recipient of the email that it is about; of several notices the mildest.

        A notice about another address never says more than that this email did not arrive there.
        """
        if complaint := next((one for one in self.notices if one.complaint), None):
            if complaint.is_from(recipient):
                return Finding(Kind.COMPLAINED, None, complaint.reason, counts=False)
            return _of_another(complaint, recipient)
        ours = [one for one in self.notices if one.is_about(recipient)][:JUDGED_MAX]
        if not ours:
            related = (one for one in self.notices if one.is_related(recipient))
            return _of_another(next(related, self.notices[0]), recipient)
        failed = [one for one in ours if one.has_failed]
        one = next((one for one in failed or ours if one.kind is Kind.SOFT), (failed or ours)[0])
        counts = one.kind is Kind.SOFT and one.has_failed and one.judged.counts
        return Finding(one.kind, one.status, one.reason, counts=counts)


def _of_another(notice: Notice, recipient: str) -> Finding:
    other = one_line(untyped(notice.actual or notice.final))
    is_known = other and normal_address(address_in(other)) != normal_address(recipient)
    reason = f"{other}: {notice.reason}" if is_known else notice.reason
    return Finding(Kind.SOFT, notice.status, reason[:REASON_MAX], counts=False)
