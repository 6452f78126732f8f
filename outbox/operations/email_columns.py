"""Columns that several lists of emails show, in SQL: the last reply, and the time at which an email is due."""

from typing import Final

# Of the delivery `d`: null if the email is settled, is being sent, or is not due by itself.
DUE_AT: Final = "CASE WHEN d.settled_at IS NULL AND d.state <> 'sending' THEN nullif(d.due_at, 'infinity') END"


def last_reply(email: str, *, characters: int = 2000) -> str:
    """Return the subquery for the last line of an email's trail; `email` is the SQL of its id.

    Of two lines of one transaction, which have the same time, the one with the later attempt is the last.
    """
    return (
        f"(SELECT left(a.reply, {characters}) FROM outbox.attempt a"
        f" WHERE a.email = {email} ORDER BY a.settled_at DESC, a.attempt DESC LIMIT 1)"
    )
