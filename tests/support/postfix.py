"""A real Postfix and a real Dovecot: mail comes in by SMTP, lies in maildirs, and is read back by IMAP.

Instances of the test's own, with configuration, queue and sockets in one directory, on ports of the loopback
interface; the system's own mail service is neither read nor started nor stopped. Postfix asks a policy server of the
test before its 354 and before its reply to the final dot, as it would ask a greylisting daemon (Postfix,
SMTPD_POLICY_README): so the test decides how long each takes, and knows what Postfix has read.
"""

import asyncio
import contextlib
import imaplib
import os
import pwd
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.fleet import free_port, until

SBIN = "/usr/sbin:/usr/local/sbin:/sbin"
LMTP = Path("/usr/lib/dovecot/lmtp")
PASSWORD = "secret"
DOMAIN = "example.com"
READERS_MAX = 4

# Postfix asks with these words (protocol_state) after DATA and after the final dot.
AT_DATA, AT_DOT = "DATA", "END-OF-MESSAGE"

# Settings of an instance that has everything below one directory.
INSTANCE_CF = """
compatibility_level = 3.6
queue_directory = {base}/queue
data_directory = {base}/data
maillog_file = {base}/postfix.log
maillog_file_prefixes = {base}
myhostname = mail.example.net
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
mydestination =
alias_maps =
alias_database =
local_recipient_maps =
smtpd_peername_lookup = no
"""

MAIN_CF = (
    INSTANCE_CF
    + """
virtual_mailbox_domains = {domain}
virtual_mailbox_base = {base}/mail
virtual_mailbox_maps = texthash:{base}/mailboxes
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
smtpd_forbid_unauth_pipelining = yes
smtpd_forbid_bare_newline = yes
smtpd_data_restrictions = reject_unauth_pipelining, check_policy_service inet:127.0.0.1:{policy}
smtpd_end_of_data_restrictions = check_policy_service inet:127.0.0.1:{policy}
smtpd_tls_received_header = yes
"""
)

MASTER_CF = """
127.0.0.1:{smtp} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""

DOVECOT_CONF = """
base_dir = {base}/run
state_dir = {base}/state
log_path = {base}/dovecot.log
listen = 127.0.0.1
protocols = imap lmtp
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
first_valid_uid = {uid}
first_valid_gid = {gid}
mail_location = maildir:{base}/mail/%n
passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={base}/mail/%n allow_all_users=yes
}}
service imap-login {{
  service_count = 0
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service lmtp {{
  unix_listener {base}/lmtp {{
    mode = 0666
  }}
  inet_listener lmtp {{
    port = {lmtp}
  }}
}}
namespace inbox {{
  inbox = yes
}}
"""


def missing() -> str | None:
    """Why no Postfix and Dovecot can be started here, in one sentence; None if they can."""
    if not all(shutil.which(name, path=SBIN) for name in ("postfix", "dovecot")):
        return "Postfix or Dovecot is not installed (apt-get install postfix dovecot-imapd dovecot-lmtpd)"
    if not LMTP.exists():
        return "Dovecot's LMTP server is not installed (apt-get install dovecot-lmtpd)"
    return "Postfix can be started by root only" if os.geteuid() else None


Pause = Callable[[str, str], Awaitable[None]]


async def _at_once(_state: str, _recipient: str) -> None:
    """Keep nothing waiting."""


@dataclass
class MailServer:
    """Where Postfix takes mail, what lies in its queues, and what lies in the mailboxes."""

    base: Path
    smtp_port: int
    imap_port: int
    lmtp_port: int
    pause: Pause
    dots: Counter[str] = field(default_factory=Counter)
    """How many final dots Postfix has read, for each recipient."""

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.smtp_port}"

    @property
    def lmtp_urls(self) -> list[str]:
        """Where Dovecot takes mail by itself: a port, and a socket."""
        return [f"lmtp://127.0.0.1:{self.lmtp_port}", f"lmtp://{self.base}/lmtp"]

    def under_way(self) -> list[str]:
        """The files of mail that Postfix receives or has still to deliver."""
        # In the order in which mail walks, so that what moves on meanwhile is met again.
        queues = [self.base / "queue" / name for name in ("maildrop", "incoming", "active", "deferred")]
        return [str(path) for queue in queues for path in queue.rglob("*") if path.is_file()]

    async def delivered(self, deadline_s: float = 20) -> None:
        """Wait until all that Postfix has accepted lies in the mailboxes."""
        try:
            await until(lambda: not self.under_way(), "Postfix's queues are empty", deadline_s)
        except AssertionError as late:
            raise AssertionError(f"{late}\n{self.log()}") from late

    async def read(self, addresses: Iterable[str]) -> dict[str, list[bytes]]:
        """What each mailbox holds, whole messages, by IMAP."""
        room = asyncio.Semaphore(READERS_MAX)

        async def look(address: str) -> tuple[str, list[bytes]]:
            async with room:
                return address, await asyncio.to_thread(self._read_mailbox, address)

        return dict(await asyncio.gather(*map(look, addresses)))

    def _read_mailbox(self, address: str) -> list[bytes]:
        with imaplib.IMAP4("127.0.0.1", self.imap_port, timeout=10) as imap:
            imap.login(address, PASSWORD)
            _, (count,) = imap.select("INBOX", readonly=True)
            if int(count or 0) == 0:
                return []
            _, parts = imap.fetch("1:*", "(BODY.PEEK[])")
            found = [part[1] for part in parts if isinstance(part, tuple)]
            assert len(found) == int(count)
            return found

    def log(self) -> str:
        """The end of what both programs logged."""
        logs = [self.base / name for name in ("start.log", "postfix.log", "dovecot.log")]
        return "\n".join("\n".join(log.read_text().splitlines()[-15:]) for log in logs if log.exists())

    async def answer_policy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer Postfix's questions on one connection: each is `name=value` lines up to an empty one."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # Postfix ends it when it likes
            while True:
                lines = (await reader.readuntil(b"\n\n")).decode().splitlines()
                asked = dict(line.split("=", 1) for line in lines if line)
                state, recipient = asked["protocol_state"], asked["recipient"]
                if state == AT_DOT:
                    self.dots[recipient] += 1
                await self.pause(state, recipient)
                writer.write(b"action=DUNNO\n\n")
                await writer.drain()
        writer.close()


async def _command(log: Path, *words: str) -> int:
    """Run a command to its end; what it says goes to the log, which a daemon that it leaves may hold open."""
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, env={"PATH": f"{SBIN}:/usr/bin:/bin"}
        )
        async with asyncio.timeout(30):
            return await process.wait()


@asynccontextmanager
async def mail_server(
    addresses: Iterable[str], *, main_cf: str = "", pause: Pause = _at_once
) -> AsyncIterator[MailServer]:
    """Postfix and Dovecot with these mailboxes; gone at the end, with all they made.

    `main_cf` is what Postfix's configuration says besides. `pause` is awaited with AT_DATA or AT_DOT and the recipient
    while Postfix waits with its reply.
    """
    # In /tmp whatever TMPDIR says: a socket's path ends at 107 bytes.
    server = MailServer(
        Path(tempfile.mkdtemp(prefix="outbox-mail-", dir="/tmp")), *(free_port() for _ in range(3)), pause
    )
    log = server.base / "start.log"
    postfix = ("postfix", "-c", str(server.base / "etc"))
    dovecot_conf = str(server.base / "dovecot.conf")
    try:
        async with await asyncio.start_server(server.answer_policy, "127.0.0.1", 0) as policy:
            _configure(server, addresses, main_cf, policy_port=policy.sockets[0].getsockname()[1])
            try:
                assert await _command(log, *postfix, "start") == 0, server.log()
                assert await _command(log, "dovecot", "-c", dovecot_conf) == 0, server.log()
                yield server
            finally:
                await _command(log, *postfix, "stop")
                await _command(log, "doveadm", "-c", dovecot_conf, "stop")
                pid_file = server.base / "run" / "master.pid"
                await until(lambda: not pid_file.exists(), "Dovecot has ended, and removed its sockets")
    finally:
        shutil.rmtree(server.base)


def _configure(server: MailServer, addresses: Iterable[str], main_cf: str, *, policy_port: int) -> None:
    base = server.base
    owner = pwd.getpwnam("nobody")  # of all mailboxes
    values = {
        "base": base, "uid": owner.pw_uid, "gid": owner.pw_gid, "domain": DOMAIN, "password": PASSWORD,
        "smtp": server.smtp_port, "imap": server.imap_port, "lmtp": server.lmtp_port, "policy": policy_port,
    }  # fmt: skip
    base.chmod(0o755)  # both give up root, and must still get there
    for directory in ("etc", "queue", "data", "mail"):
        (base / directory).mkdir()
    shutil.chown(base / "data", "postfix")
    os.chown(base / "mail", owner.pw_uid, owner.pw_gid)
    (base / "etc" / "main.cf").write_text(MAIN_CF.format_map(values) + main_cf)
    (base / "etc" / "master.cf").write_text(MASTER_CF.format_map(values))
    (base / "mailboxes").write_text("".join(f"{address} {address.partition('@')[0]}/\n" for address in addresses))
    (base / "dovecot.conf").write_text(DOVECOT_CONF.format_map(values))
