"""Trust in files whose content runs as this user: settings that were found, modules, templates.

As with ssh, only this user and root may be able to write or replace the file. Every directory and symbolic link on its
path is checked, in the order in which the kernel follows them. On Windows nothing is checked: the mode bits do not
reflect its access control lists.
"""

import os
import shlex
import stat
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LINKS_MAX: Final = 40  # as many as Linux follows
_ACL: Final = "system.posix_acl_access"
_BY_GROUP_OR_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Distrust:
    """Reason not to trust a file, and the command that removes it."""

    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.reason}; run `{self.fix}`"


def distrust_of(path: Path) -> Distrust | None:
    """Return why others than this user and root can change the file at `path`; None if they cannot.

    A group may have write permission if it has no other members, as with the private groups of many Linux
    distributions. In a directory with the sticky bit, such as /tmp, only the owner of a file may replace it.

    Raises:
        OSError: the path cannot be examined.

    """
    if sys.platform == "win32":
        return None
    current = "/"
    pending = deque(os.path.join(os.getcwd(), path).split("/"))  # noqa: PTH109, PTH118 - Path would fold `..` after a link
    links = 0
    found = _distrust_of(current, os.stat(current))  # noqa: PTH116 - as below
    while pending and found is None:
        part = pending.popleft()
        if part in ("", "."):
            continue
        if part == "..":
            current = os.path.dirname(current)  # noqa: PTH120
            continue
        candidate = os.path.join(current, part)  # noqa: PTH118
        status = os.lstat(candidate)
        if not stat.S_ISLNK(status.st_mode):
            current, found = candidate, _distrust_of(candidate, status)
            continue
        links += 1
        if links > LINKS_MAX:
            return Distrust(f"{candidate}: more than {LINKS_MAX} symbolic links", f"rm {shlex.quote(candidate)}")
        found = _distrust_of_owner(candidate, status)
        target = os.readlink(candidate)  # noqa: PTH115
        current = "/" if target.startswith("/") else current
        pending.extendleft(reversed(target.split("/")))
    return found


if sys.platform != "win32":
    import grp
    import pwd

    def _distrust_of(path: str, status: os.stat_result) -> Distrust | None:
        """Return why a file or directory itself is not trusted."""
        if (found := _distrust_of_owner(path, status)) is not None:
            return found
        mode = status.st_mode
        if not mode & _BY_GROUP_OR_OTHERS or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX) or _is_read_only(path):
            return None
        shown = f"{stat.filemode(mode)} {_user(status.st_uid)}:{_group(status.st_gid)}"
        if mode & stat.S_IWOTH:
            bits = "go-w" if mode & stat.S_IWGRP else "o-w"
            return Distrust(f"{path} is world-writable ({shown})", f"chmod {bits} {shlex.quote(path)}")
        if _has_acl(path):  # then the group bits are the mask of all entries
            reason = f"{path} is writable by others through its access control list ({shown}, see getfacl)"
            return Distrust(reason, f"setfacl -b {shlex.quote(path)} && chmod g-w {shlex.quote(path)}")
        if (others := _others_in(status.st_gid)) is not None:
            reason = f"{path} is writable by the group {_group(status.st_gid)} ({shown}){others}"
            return Distrust(reason, f"chmod g-w {shlex.quote(path)}")
        return None

    def _distrust_of_owner(path: str, status: os.stat_result) -> Distrust | None:
        if status.st_uid in (0, os.geteuid()):
            return None
        reason = f"{path} is owned by {_user(status.st_uid)}, not by {_user(os.geteuid())} or root"
        dereference = "-h " if stat.S_ISLNK(status.st_mode) else ""
        return Distrust(reason, f"chown {dereference}{_user(os.geteuid())} {shlex.quote(path)}")

    def _others_in(gid: int) -> str | None:
        """Return a clause that names another member of a group; None if only this user and root are in it."""
        ours = {0, os.geteuid()}
        members = {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == gid and entry.pw_uid not in ours}
        try:
            members |= {name for name in grp.getgrgid(gid).gr_mem if _uid(name) not in ours}
        except KeyError:  # a group without a name has no members; this user's own, as in containers, is private
            if gid != os.getegid():
                return ", which has no name on this system"
        return f", of which {min(members)} is a member" if members else None

    def _uid(name: str) -> int | None:
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            return None

    def _user(uid: int) -> str:
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return str(uid)

    def _group(gid: int) -> str:
        try:
            return grp.getgrgid(gid).gr_name
        except KeyError:
            return str(gid)

    def _is_read_only(path: str) -> bool:
        """Return True on a read-only file system, such as a ConfigMap of Kubernetes (mode 0777)."""
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)

    def _has_acl(path: str) -> bool:
        if sys.platform != "linux":
            return False
        try:
            return bool(os.getxattr(path, _ACL))
        except OSError:
            return False
