"""Trust in files: only this user and root may be able to change them, and every directory on their path."""

import os
import struct
import subprocess

import pytest

from outbox.trust import LINKS_MAX, distrust_of

NOBODY = 65_534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(name="file")
def _file(tmp_path):
    (tmp_path / "srv" / "app").mkdir(parents=True)
    for directory in (tmp_path / "srv", tmp_path / "srv" / "app"):
        directory.chmod(0o755)
    path = tmp_path / "srv" / "app" / "outbox.toml"
    path.write_text("")
    path.chmod(0o644)
    return path


def as_user(uid, gid, path):
    """Return `distrust_of` from a process of another user, which must be able to traverse the directories above."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.write(writer, str(distrust_of(path)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        found = said.read()
    os.waitpid(pid, 0)
    return found


def mended(path, found):
    """Run the command that is suggested; nothing is wrong then."""
    subprocess.run(found.fix, shell=True, check=True)
    return distrust_of(path) is None


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o444])
def test_a_file_of_ones_own_that_nobody_else_may_write_is_trusted(file, mode):
    file.chmod(mode)
    assert distrust_of(file) is None


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o602])
def test_a_file_that_everybody_may_write_is_not_trusted(file, mode):
    file.chmod(mode)
    found = distrust_of(file)
    assert found.reason.startswith(f"{file} is world-writable (-")
    assert mended(file, found)


@pytest.mark.parametrize("up", [0, 1])
def test_a_directory_above_that_everybody_may_write_is_not_trusted_unless_it_is_sticky(file, up):
    directory = file.parents[up]
    directory.chmod(0o777)
    found = distrust_of(file)
    assert found.reason.startswith(f"{directory} is world-writable (drwxrwxrwx ")
    directory.chmod(0o1777)
    assert distrust_of(file) is None
    directory.chmod(0o777)
    assert mended(file, found)


@AS_ROOT
@pytest.mark.parametrize("up", [None, 0, 1])
def test_what_belongs_to_somebody_else_is_not_trusted(file, up):
    path = file if up is None else file.parents[up]
    os.chown(path, NOBODY, 0)
    found = distrust_of(file)
    assert found.reason == f"{path} is owned by nobody, not by root or root"
    assert mended(file, found)


@AS_ROOT
def test_in_a_sticky_directory_the_owner_of_the_file_decides(file):
    file.parent.chmod(0o1777)
    os.chown(file, NOBODY, 0)
    assert "is owned by nobody" in distrust_of(file).reason


@AS_ROOT
def test_a_group_that_somebody_else_is_in_may_not_write(file):
    os.chown(file, 0, NOBODY)  # the primary group of nobody
    file.chmod(0o664)
    found = distrust_of(file)
    assert "is writable by the group" in found.reason
    assert ", of which " in found.reason
    assert mended(file, found)


@AS_ROOT
def test_an_ordinary_user_with_umask_002_and_a_private_group_is_trusted(file):
    for path in (file, file.parent, file.parent.parent):
        os.chown(path, 54_321, 54_321)
    file.parent.parent.parent.chmod(0o755)
    file.chmod(0o664)
    file.parent.chmod(0o775)
    base = file.parents[2]
    while base != base.parent:  # pytest's directories are for root only
        if base.stat().st_mode & 0o005 == 0:
            base.chmod(base.stat().st_mode | 0o005)
        base = base.parent
    assert as_user(54_321, 54_321, file) == "None"
    assert "is writable by the group 54321" in as_user(54_321, 54_322, file)
    assert f"{file.parent.parent} is owned by 54321" in as_user(NOBODY, NOBODY, file)


def test_a_link_is_followed_and_each_directory_on_its_way_looked_at(file, tmp_path):
    (tmp_path / "other").mkdir(mode=0o755)
    link = tmp_path / "other" / "outbox.toml"
    link.symlink_to("../srv/app/outbox.toml")
    assert distrust_of(link) is None
    for directory in (link.parent, file.parent, file.parent.parent):
        directory.chmod(0o777)
        assert distrust_of(link).reason.startswith(f"{directory} is world-writable")
        directory.chmod(0o755)
    file.chmod(0o666)
    assert distrust_of(link).reason.startswith(f"{file} is ")


def test_a_directory_that_is_reached_by_a_link_and_left_by_dots_is_the_one_that_the_kernel_takes(file, tmp_path):
    (tmp_path / "link").symlink_to(file.parent)
    file.parent.parent.chmod(0o777)
    assert distrust_of(tmp_path / "link" / ".." / "app" / "outbox.toml").reason.startswith(f"{file.parent.parent} ")


@AS_ROOT
def test_a_link_of_somebody_else_is_not_trusted(file, tmp_path):
    tmp_path.chmod(0o1777)
    link = tmp_path / "outbox.toml"
    link.symlink_to(file)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    found = distrust_of(link)
    assert f"{link} is owned by nobody" in found.reason
    assert mended(link, found)


def test_links_in_a_circle_end(tmp_path):
    for at in range(LINKS_MAX + 2):
        (tmp_path / f"l{at}").symlink_to(f"l{at + 1}")
    (tmp_path / f"l{LINKS_MAX + 2}").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("l0", "circle"):
        assert "more than 40 symbolic links" in distrust_of(tmp_path / name).reason


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        distrust_of(tmp_path / "outbox.toml")


def test_a_relative_path_begins_in_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    file.parent.parent.chmod(0o777)
    assert distrust_of(file.relative_to(file.parent)).reason.startswith(f"{file.parent.parent} is ")


@AS_ROOT
def test_an_access_list_that_lets_somebody_write_is_not_trusted(file):
    entry = struct.Struct("<HHI")
    undefined = 0xFFFFFFFF  # user:nobody:rw- and the mask that lets it be so
    entries = [(1, 6, undefined), (2, 6, NOBODY), (4, 4, undefined), (16, 6, undefined), (32, 4, undefined)]
    acl = struct.pack("<I", 2) + b"".join(entry.pack(*one) for one in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", acl)
    except OSError as error:
        pytest.skip(f"no access lists here ({error})")
    assert "access control list" in distrust_of(file).reason
