"""Settings, modules and templates that others may write do not run; what is named with --config is trusted."""

import os

import pytest

MINE = """
from pathlib import Path
Path("ran").touch()
from outbox import Recipient
{more}
class Mine:
    def recipients(self, period):
        return [Recipient("1", "p1@example.com")]
    def build(self, recipient, period):
        return [{{"done": 1}}]
"""
NOBODY = 65_534


def ran(fleet):
    return (fleet.directory / "ran").exists()


@pytest.fixture
def own(fleet):
    """The fleet in a directory that only this user may write."""
    fleet.directory.chmod(0o755)
    return fleet


async def refused(fleet, *words, command=("generate",), code=2):
    ended = await fleet.run(*command)
    assert ended.code == code, ended
    (sentence,) = ended.sentences
    for word in words:
        assert word in sentence
    assert not ran(fleet)
    return ended


@pytest.mark.parametrize(
    "how", ["mode", pytest.param("owner", marks=pytest.mark.skipif(os.geteuid() != 0, reason="root"))]
)
async def test_settings_that_were_only_found_and_others_may_write_are_not_read(own, how):
    own.source = "mine:Mine"
    (own.directory / "mine.py").write_text(MINE.format(more=""))
    if how == "mode":
        own.directory.chmod(0o777)
        reason = f"{own.directory} is world-writable (drwxrwxrwx "
        fix = f"; run `chmod go-w {own.directory}`"
    else:
        os.chown(own.directory, NOBODY, 0)
        reason = f"{own.directory} is owned by nobody, not by root or root"
        fix = f"; run `chown root {own.directory}`"
    for command in (("generate",), ("status",), ("relay", "--until-empty"), ("init",), ("doctor",)):
        await refused(own, "outbox.toml: found in the working directory", reason, fix, "--config", command=command)
    config = str(own.directory / "outbox.toml")
    assert (await own.run("status", "--config", config)).code == 0
    assert (await own.run("--config", config, "status")).code == 0
    assert (await own.run("status", environment={"OUTBOX_CONFIG": config})).code == 0


async def test_a_settings_file_that_everybody_may_write_is_not_read_and_the_suggested_command_mends_it(own):
    path = own.write_settings()
    path.chmod(0o666)
    own.settings = path.read_text()
    own.write_settings = lambda: path
    await refused(own, f"{path} is world-writable (-rw-rw-rw- ", f"`chmod go-w {path}`", command=("status",))
    path.chmod(0o644)
    assert (await own.run("status")).code == 0


@pytest.mark.parametrize("named", [False, True], ids=["found", "--config"])
async def test_a_source_module_that_others_may_write_does_not_run_whoever_named_the_settings(own, named):
    own.source = "mine:Mine"
    module = own.directory / "mine.py"
    module.write_text(MINE.format(more=""))
    module.chmod(0o666)
    command = ("generate", *(("--config", str(own.directory / "outbox.toml")) if named else ()))
    await refused(own, "reports.progress.source: ", f"{module}: not run", "is world-writable", command=command)
    module.chmod(0o644)
    ended = await own.run(*command)
    assert (ended.code, ended.err) == (0, ""), ended
    assert ran(own)


async def test_a_directory_with_modules_that_others_may_write_does_not_run_with_config_either(own):
    own.source = "mine:Mine"
    (own.directory / "mine.py").write_text(MINE.format(more=""))
    own.directory.chmod(0o777)
    command = ("generate", "--config", str(own.directory / "outbox.toml"))
    await refused(own, f"{own.directory} is world-writable", command=command)


@pytest.mark.parametrize("which", ["package", "its __init__", "module", "helper", "__pycache__"])
async def test_each_module_beside_the_settings_is_looked_at_before_it_runs(own, which):
    own.source = "pack.mine:Mine"
    package = own.directory / "pack"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("import helper\n" + MINE.format(more=""))
    (own.directory / "helper.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    path = {
        "package": package,
        "its __init__": package / "__init__.py",
        "module": package / "mine.py",
        "helper": own.directory / "helper.py",
        "__pycache__": package / "__pycache__",
    }[which]
    path.chmod(0o777)
    await refused(own, f"{path} is world-writable")
    path.chmod(0o755)
    assert (await own.run("generate")).code == 0
    assert ran(own)


async def test_a_resolver_that_others_may_write_does_not_run(own):
    own.top = 'in_doubt = "ask"\nresolver = "resolving:was_accepted"'
    module = own.directory / "resolving.py"
    module.write_text("from pathlib import Path\nPath('ran').touch()\ndef was_accepted(email): return None\n")
    module.chmod(0o666)
    await refused(own, "resolver: ", f"{module} is world-writable", command=("relay", "--until-empty"))
    module.chmod(0o644)
    assert (await own.run("relay", "--until-empty")).code == 0
    assert ran(own)


@pytest.mark.parametrize("name", ["progress/email.html.j2", "subject.txt.j2", "included.j2"])
async def test_a_template_that_others_may_write_does_not_run(own, name):
    await own.hire(1)
    path = own.directory / "templates" / name
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o755)
    path.write_text("{{ cycler.__init__.__globals__.os.system('touch ran') }}")
    if name == "included.j2":
        (path.parent / "subject.txt.j2").write_text("{% include 'included.j2' %}")
    path.chmod(0o666)
    ended = await own.run("generate")
    assert ended.code == 1
    assert f"{path}: not used, since a template can run code and {path} is world-writable" in ended.err
    assert not ran(own)
    path.chmod(0o644)
    assert (await own.run("generate")).code == 0
