"""A Maildir as the mail server, and a disk that takes no more."""

import asyncio
import resource
from collections import deque

import pytest

from outbox.smtp import maildir
from outbox.smtp.commands import Commands
from outbox.smtp.connection import Limits, SmtpConnection
from outbox.smtp.outgoing import Try
from outbox.smtp.verdict import Accepted, Deferred
from tests.unit.smtp.test_connection import Book, mail


class MarkedAtOnce(Book):
    """An owner whose marks are committed at once."""

    def ask_mark(self, connection, tried):
        tried.mark(tried.attempt + 1)
        connection.send_final_dot()


@pytest.fixture
def small_disk():
    """A file can have 4096 bytes and no more (EFBIG, as a full disk or a quota would say)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def sent(place, *claims):
    """The verdicts on these claims, in their order."""
    maildir.prepare(place)
    owner = MarkedAtOnce(deque(claims))
    clock = asyncio.get_running_loop().time
    connection = SmtpConnection(owner, Commands(maildir.OFFERS), Limits(10, 10, 100), clock=clock)
    connection.attach(maildir.MaildirTransport(place))
    async with asyncio.timeout(10):
        while len(owner.verdicts) < len(claims):
            await asyncio.sleep(0.001)
    return [verdict for _, verdict in owner.verdicts]


async def test_what_a_full_disk_cannot_take_is_deferred_and_leaves_nothing(tmp_path, small_disk):
    large, small = mail(b"Subject: x\r\n\r\n" + (b"x" * 78 + b"\r\n") * 100), mail()
    first, second = await sent(tmp_path, large, small)
    assert isinstance(first, Deferred)
    assert first.reply.startswith("452 ")
    assert isinstance(second, Accepted)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(list((tmp_path / "new").iterdir())) == 1


async def test_a_try_is_one_file_for_ever_wherever_a_reader_has_moved_it(tmp_path):
    claim = mail(b"Subject: .dots\r\n\r\n.\r\n..\r\nend")
    await sent(tmp_path, claim)
    (there,) = (tmp_path / "new").iterdir()
    assert there.read_bytes().endswith(b"\r\n" + claim.outgoing.message + b"\r\n")
    for place in (tmp_path / "new" / there.name, tmp_path / "cur" / f"{there.name}:2,S"):
        there = there.rename(place)
        (verdict,) = await sent(tmp_path, Try(claim.outgoing))
        assert isinstance(verdict, Accepted)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [place]
