"""Kept SMTP connections, as aiosmtplib's and smtplib's documentation advise for many mails: sending only."""

import asyncio
import smtplib
import threading

import aiosmtplib

from bench.peers.job import SENDER, Job, address, build


class Kept:
    """Connections of an asyncio worker, at most `job.connections`, each used by one mail at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._room = asyncio.Semaphore(job.connections)
        self._idle: list[aiosmtplib.SMTP] = []

    async def deliver(self, number: int, message: str | None) -> None:
        """Send one mail, built here unless it is given; a connection that failed is not kept."""
        async with self._room:
            smtp = self._idle.pop() if self._idle else await self._connect()
            if message is None:
                await smtp.send_message(build(number, self._job.size))
            else:
                await smtp.sendmail(SENDER, [address(number)], message.encode())
            self._idle.append(smtp)

    async def _connect(self) -> aiosmtplib.SMTP:
        smtp = aiosmtplib.SMTP(hostname=self._job.host, port=self._job.port, timeout=60)
        await smtp.connect()
        return smtp


class KeptPerThread(threading.local):
    """One connection for each thread of a synchronous worker."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._smtp: smtplib.SMTP | None = None

    def deliver(self, number: int, message: str | None) -> None:
        """Send one mail, built here unless it is given; a connection that failed is not kept."""
        smtp, self._smtp = self._smtp or smtplib.SMTP(self._job.host, self._job.port, timeout=60), None
        if message is None:
            smtp.send_message(build(number, self._job.size))
        else:
            smtp.sendmail(SENDER, [address(number)], message)
        self._smtp = smtp
