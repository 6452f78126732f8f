"""The mail servers: Exim, OpenSMTPD, Postfix, Haraka, smtp-server and aiosmtpd."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.neighbours.neighbour import KeepsFiles, Neighbour, Received, crlf, maildir, with_users
from tests.support import cached
from tests.support.postfix import INSTANCE_CF, MASTER_CF, SBIN

HERE = Path(__file__).parent


class Exim(Neighbour):
    """Exim 4, which takes mail into its queue and delivers none: what lies there is what it accepted."""

    name = "exim"
    limits = """smtp_accept_max 20: `421 Too many concurrent SMTP connections` instead of a greeting.
    smtp_accept_max_nonmail 10: `554 Too many nonmail commands` to the eleventh RSET or NOOP of a session.
    smtp_accept_max_per_connection 1000: `421 … too many messages in this connection` to MAIL.
    smtp_max_synprot_errors 3: hangs up."""
    packages = ("exim4-daemon-light", "libidn12", "libnss-wrapper")

    @classmethod
    def missing(cls) -> str | None:
        return _root_and(cls.packages, "Exim")

    def prepare(self) -> None:
        for directory in ("spool", "exim-log"):
            (self.base / directory).mkdir()
            shutil.chown(self.base / directory, "nobody", "nogroup")
        with_users(self.base, "Debian-exim")
        (self.base / "conf").write_text(EXIM_CONF.format(exim=self._program, base=self.base, options=self.options))

    @property
    def _program(self) -> Path:
        return cached.debian(*self.packages) / "usr/sbin/exim4"

    def command(self) -> Sequence[str | Path]:
        return [self._program, "-C", self.base / "conf", "-bdf", "-oX", f"127.0.0.1:{self.port}"]

    def environment(self) -> dict[str, str]:
        # Exim asks for the user that its package would make; libnss_wrapper answers for this one process.
        libraries = next(cached.debian(*self.packages).glob("usr/lib/*/libnss_wrapper.so")).parent
        return {
            "LD_LIBRARY_PATH": str(libraries),
            "LD_PRELOAD": str(libraries / "libnss_wrapper.so"),
            "NSS_WRAPPER_PASSWD": str(self.base / "passwd"),
            "NSS_WRAPPER_GROUP": str(self.base / "group"),
        }

    def received(self) -> list[Received]:
        # A message is accepted once its -H file is there (Exim's specification, "Format of spool files").
        found = []
        for header in (self.base / "spool/input").glob("*-H"):
            head = header.read_bytes()
            body = header.with_name(header.name[:-1] + "D").read_bytes().partition(b"\n")[2]
            envelope, _, fields = head.partition(b"\n\n")
            lines = envelope.decode().splitlines()
            at = next(n for n, line in enumerate(lines) if n > 3 and line.isdigit())  # how many recipients follow
            message = crlf(_exim_fields(fields) + b"\n" + body)
            found += [Received(recipient, message) for recipient in lines[at + 1 : at + 1 + int(lines[at])]]
        return found


def _exim_fields(spooled: bytes) -> bytes:
    """Return the header of a -H file: each field follows its length and a flag; `*` marks a deleted one."""
    fields = b""
    while found := re.match(rb"(\d{3,})(.) ?", spooled):
        end = found.end() + int(found[1])
        if found[2] != b"*":
            fields += spooled[found.end() : end]
        spooled = spooled[end:]
    return fields


EXIM_CONF = """
exim_path = {exim}
spool_directory = {base}/spool
log_file_path = {base}/exim-log/%slog
pid_file_path = {base}/pid
exim_user = nobody
exim_group = nogroup
primary_hostname = mail.example.net
keep_environment = LD_LIBRARY_PATH:LD_PRELOAD:NSS_WRAPPER_PASSWD:NSS_WRAPPER_GROUP
tls_advertise_hosts =
host_lookup =
queue_only = true
acl_smtp_rcpt = take
acl_smtp_data = accept
{options}
begin acl
take:
  deny local_parts = ^unknown
       message = 5.1.1 unknown user
  accept
begin routers
begin transports
begin retry
begin rewrite
begin authenticators
"""


class OpenSmtpd(Neighbour):
    """OpenSMTPD, in a mount namespace: its users, its spool and its programs are where it was compiled to find them."""

    name = "opensmtpd"
    limits = """limit max-mails 100: `452 4.5.3 Too many messages sent` to the next MAIL of the session.
    No PIPELINING."""
    packages = ("opensmtpd",)

    @classmethod
    def missing(cls) -> str | None:
        if (reason := _root_and(cls.packages, "OpenSMTPD")) is not None:
            return reason
        if subprocess.run(["unshare", "-m", "-p", "-f", "true"], capture_output=True, check=False).returncode:
            return "OpenSMTPD needs a mount namespace of its own, and the kernel refuses one (unshare -m -p)"
        return None

    def prepare(self) -> None:
        (self.base / "spool").mkdir()
        (self.base / "mail").mkdir()
        shutil.chown(self.base / "mail", "nobody", "nogroup")
        with_users(self.base, "opensmtpd", "opensmtpq")
        (self.base / "conf").write_text(OPENSMTPD_CONF.format(port=self.port, base=self.base, options=self.options))
        root = cached.debian(*self.packages)
        (self.base / "start").write_text(OPENSMTPD_START.format(base=self.base, root=root))

    def command(self) -> Sequence[str | Path]:
        return ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", self.base / "start"]

    def _main_pid(self) -> int:
        # unshare does not pass SIGTERM on; its only child is the server.
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def undelivered(self) -> list[Path]:
        # What it receives is in `incoming`, and moves before the reply.
        return [path for path in (self.base / "spool/smtpd/queue").rglob("*") if path.is_file()]

    def received(self) -> list[Received]:
        return maildir(self.base / "mail/all", re.compile(rb"\(OpenSMTPD\) with ESMTP id (\w+)"))


OPENSMTPD_CONF = """
{options}
listen on 127.0.0.1 port {port} hostname mail.example.net
table everybody {{ "@" = "nobody" }}
action "keep" maildir "{base}/mail/all" virtual <everybody>
match from any for rcpt-to regex "^unknown" reject
match from any for any action "keep"
"""

OPENSMTPD_START = """
set -e
mount --make-rprivate /
mount --bind {base}/passwd /etc/passwd
mount --bind {base}/group /etc/group
mount --bind {root}/usr/libexec /usr/libexec
mount --bind {base}/spool /var/spool
mount -t tmpfs none /var/lib
mkdir -p /var/lib/opensmtpd/empty
mount -t tmpfs none /run
exec {root}/usr/sbin/smtpd -d -f {base}/conf
"""


class Postfix(Neighbour):
    """Postfix as installed, with an instance of its own that delivers into maildirs; its anvil counts us as well."""

    name = "postfix"
    limits = """smtpd_client_connection_count_limit 50: `421 4.7.0 … Error: too many connections from` after connect.
    smtpd_client_message_rate_limit (none by default): `450 4.7.1 … Error: too much mail from` to MAIL.
    smtpd_client_connection_rate_limit (none by default): `421 4.7.0 … Error: connection rate limit exceeded`.
    smtpd_junk_command_limit 100: more RSETs than that between two messages count as errors."""

    @classmethod
    def missing(cls) -> str | None:
        if shutil.which("postfix", path=SBIN) is None:
            return "Postfix is not installed (apt-get install postfix)"
        return "Postfix can be started by root only" if os.geteuid() else None

    def prepare(self) -> None:
        for directory in ("etc", "queue", "data", "mail"):
            (self.base / directory).mkdir()
        shutil.chown(self.base / "data", "postfix")
        shutil.chown(self.base / "mail", "nobody", "nogroup")
        (self.base / "postfix.log").touch()
        (self.base / "postfix.log").chmod(0o666)  # postsuper writes there as Postfix's user
        (self.base / "etc/main.cf").write_text(POSTFIX_CONF.format(base=self.base, options=self.options))
        services = MASTER_CF.format(smtp=self.port)
        if "postscreen" in self.options:
            services = services.replace("- smtpd\n", "1 postscreen\n", 1) + POSTSCREEN_CF
        (self.base / "etc/master.cf").write_text(services)

    def command(self) -> Sequence[str | Path]:
        return ["postfix", "-c", self.base / "etc", "start-fg"]

    def _main_pid(self) -> int:
        return int((self.base / "queue/pid/master.pid").read_text())

    def _groups(self) -> list[int]:
        # The master makes a session of its own. It goes with its pid file, since its number may be another's later.
        pid_file = self.base / "queue/pid/master.pid"
        master = [int(pid_file.read_text())] if pid_file.exists() else []
        pid_file.unlink(missing_ok=True)
        return [*master, *super()._groups()]

    def undelivered(self) -> list[Path]:
        # In the order in which mail walks, so that what moves on meanwhile is met again.
        queues = [self.base / "queue" / name for name in ("incoming", "active", "deferred")]
        # A file becomes executable once it is complete; only then Postfix replies.
        return [path for queue in queues for path in queue.rglob("*") if path.is_file() and os.access(path, os.X_OK)]

    def received(self) -> list[Received]:
        return maildir(self.base / "mail/all", re.compile(rb"\(Postfix\) with ESMTP id (\w+)"))

    def log(self) -> str:
        path = self.base / "postfix.log"
        said = path.read_text(errors="replace").splitlines()[-40:] if path.exists() else []
        return super().log() + "\n" + "\n".join(said)


POSTSCREEN_CF = """
smtpd pass - - n - - smtpd
dnsblog unix - - n - 0 dnsblog
tlsproxy unix - - n - 0 tlsproxy
"""

POSTFIX_CONF = (
    INSTANCE_CF
    + """
enable_long_queue_ids = yes
smtpd_client_event_limit_exceptions =
recipient_delimiter = +
smtpd_recipient_restrictions =
    check_recipient_access inline:{{{{unknown@example.com = 550 5.1.1 unknown user}}}} permit_mynetworks reject
virtual_mailbox_domains = example.com
virtual_mailbox_base = {base}/mail
virtual_mailbox_maps = static:all/
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
{options}
"""
)


class Haraka(KeepsFiles):
    """Haraka 3, which refuses commands that are pipelined behind the final dot."""

    name = "haraka"
    limits = """`503 Bad sequence of commands - pipelined after end of DATA` to an envelope behind the final dot.
    The plugin `limit` disconnects (DENYSOFTDISCONNECT) with 450 for too many connections, and refuses mail above a
    rate with 450 to RCPT. `max_unrecognized_commands` 10: `521`."""
    redis = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1")
    """The plugin `limit` counts in Redis; it runs where there are options, which are the sections of limit.ini."""

    @classmethod
    def missing(cls) -> str | None:
        return _npm_packages()

    def prepare(self) -> None:
        super().prepare()
        shutil.copytree(cached.npm(HERE) / "Haraka/config", self.base / "config")
        for directory in ("plugins", "queue"):
            (self.base / directory).mkdir()
        (self.base / "config/smtp.ini").write_text(f"listen=127.0.0.1:{self.port}\n")
        (self.base / "config/me").write_text("mail.example.net\n")
        (self.base / "config/plugins").write_text("limit\nkeep\n" if self.options else "keep\n")
        (self.base / "config/limit.ini").write_text(f"tarpit_delay=0\n[redis]\npath={self.base}/redis\n{self.options}")
        (self.base / "config/loglevel").write_text("WARN\n")
        shutil.copy(HERE / "haraka/keep.js", self.base / "plugins")

    def command(self) -> Sequence[str | Path]:
        haraka = ["node", cached.npm(HERE) / "Haraka/bin/haraka", "-c", self.base]
        if not self.options:
            return haraka
        redis = cached.debian(*self.redis)
        libraries = next(redis.glob("usr/lib/*/libjemalloc.so.2")).parent
        program = f"LD_LIBRARY_PATH={libraries} {redis}/usr/bin/redis-server"
        start = f'{program} --port 0 --unixsocket {self.base}/redis --save "" & exec "$@"'
        return ["sh", "-c", start, "sh", *haraka]

    def environment(self) -> dict[str, str]:
        return {"HARAKA": str(self.base)}


class SmtpServer(KeepsFiles):
    """smtp-server, the one that comes with nodemailer."""

    name = "smtp-server"
    limits = """maxClients (none by default): `421 mail.example.net Too many connected clients, try again in a moment`.
    Ten commands that it does not know: `421 Error: too many unrecognized commands`."""

    @classmethod
    def missing(cls) -> str | None:
        return _npm_packages()

    def command(self) -> Sequence[str | Path]:
        return ["node", HERE / "smtp-server.js", str(self.port), self.base / "kept", self.options or "{}"]

    def environment(self) -> dict[str, str]:
        return {"NODE_PATH": str(cached.npm(HERE))}


class Aiosmtpd(KeepsFiles):
    """aiosmtpd, without PIPELINING."""

    name = "aiosmtpd"
    limits = """command_call_limit 20 for each command but the usual ones, which are not limited unless told.
    `421 4.7.0 … Too many …` once a command is given too often, and it hangs up."""

    def command(self) -> Sequence[str | Path]:
        arguments = str(self.port), self.base / "kept", self.options or "{}"
        return [sys.executable, HERE / "aiosmtpd_server.py", *arguments]


def _root_and(packages: Sequence[str], name: str) -> str | None:
    if os.geteuid():
        return f"{name} can be started by root only"
    try:
        cached.debian(*packages)
    except cached.MissingError as missing:
        return str(missing)
    return None


def _npm_packages() -> str | None:
    try:
        cached.npm(HERE)
    except cached.MissingError as missing:
        return str(missing)
    return None


SERVERS: list[type[Neighbour]] = [Exim, OpenSmtpd, Postfix, Haraka, SmtpServer, Aiosmtpd]
