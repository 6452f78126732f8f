"""The lock files: every dependency is pinned with hashes, and all that pyproject.toml wants is in them."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ALL = ROOT / "scripts/constraints.txt"
LOCKS = {
    "constraints": ALL,
    "build": ROOT / "scripts/constraints-build.txt",
    "demo": ROOT / "scripts/constraints-demo.txt",
    "image": ROOT / "docs/deploy/requirements.txt",
    "lock": ROOT / "scripts/constraints-lock.txt",
    "peers": ROOT / "bench/peers/requirements.txt",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PYTHONS = ("3.11.0", "3.12.0", "3.13.0", "3.14.0")


def entries(path):
    """Each requirement of a lock file with the hashes of its files."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^ *#.*\n", "", path.read_text())).splitlines()
    for line in lines:
        said, *hashes = re.split(r" +--hash=", line.strip())
        yield Requirement(said), hashes


def pins(path, python):
    """The version of each distribution that is installed by one Python on Linux."""
    found = {}
    environment = {
        "python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux",
        "platform_machine": "x86_64", "platform_python_implementation": "CPython", "implementation_name": "cpython",
    }  # fmt: skip
    for one, _ in entries(path):
        if one.marker is None or one.marker.evaluate(environment):
            (pin,) = one.specifier
            assert pin.operator == "=="
            assert canonicalize_name(one.name) not in found, one.name
            found[canonicalize_name(one.name)] = pin.version
    return found


def group(name):
    """The requirements of a dependency group, with those of the groups in it."""
    for one in PROJECT["dependency-groups"][name]:
        yield from group(one["include-group"]) if isinstance(one, dict) else [one]


def wanted(name):
    """The requirements of ours that one lock file is for."""
    core = PROJECT["project"]["dependencies"]
    return {
        "constraints": [*core, *(one for extra in EXTRAS.values() for one in extra), *group("dev"), *group("build")],
        "build": [*group("build")],
        "demo": [*core, *EXTRAS["demo"]],
        "image": [*core, *EXTRAS["dkim"], *EXTRAS["otel"], *EXTRAS["web"]],
        "lock": [*group("lock")],
        "peers": [
            line for line in (ROOT / "bench/peers/requirements.in").read_text().splitlines() if not line.startswith("#")
        ],
    }[name]


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_of_a_lock_is_exact_and_has_a_hash(name):
    for one, hashes in entries(LOCKS[name]):
        assert [pin.operator for pin in one.specifier] == ["=="], one
        assert one.url is None
        assert hashes, f"{one} has no hash; run scripts/lock"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), one
        assert len(hashes) == len(set(hashes))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_a_version_of_every_dependency_that_pyproject_allows(name, python):
    locked = pins(LOCKS[name], python)
    for said in wanted(name):
        one = Requirement(said)
        if one.marker is None or one.marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"}):
            version = locked.get(canonicalize_name(one.name))
            assert version is not None, f"{one.name} is not locked; run scripts/lock"
            assert one.specifier.contains(version, prereleases=True), f"{one} is locked as {version}; run scripts/lock"


@pytest.mark.parametrize("name", ["build", "demo", "image"])
def test_one_package_has_one_version_and_one_list_of_hashes_in_all_of_our_locks(name):
    whole = {(one.name, str(one.specifier)): hashes for one, hashes in entries(ALL)}
    for one, hashes in entries(LOCKS[name]):
        assert whole[one.name, str(one.specifier)] == hashes


def test_the_locks_name_no_index_and_no_url():
    for path in LOCKS.values():
        text = path.read_text()
        assert "://" not in text, path
        assert not re.search(r"(?m)^(-i|-f|--(extra-)?index|--find-links|--trusted-host)", text), path


def test_setup_installs_nothing_without_a_hash_but_the_project_itself():
    text = (ROOT / "scripts/setup").read_text()
    calls = re.findall(r"(?m)^ *(?:\w+\) |\*\) )?(pip --.*?)(?: ;;)?$", text)
    assert len(calls) == 4
    *locked, own = calls
    assert own.split() == ["pip", "--no-deps", "--no-build-isolation", "-e", "."]
    for call in locked:
        assert call.startswith("pip --require-hashes ")
        assert (ROOT / call.rpartition(" -r ")[2]).is_file()


def test_pip_refuses_a_file_that_does_not_have_the_locked_hash(tmp_path):
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not the file that was locked")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"other==1.0 --hash=sha256:{'0' * 64}\n")
    pip = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-index", "--find-links", tmp_path]
    done = subprocess.run(
        [*pip, "--target", tmp_path / "to", "-r", lock], capture_output=True, text=True, check=False,
        env={"PIP_CONFIG_FILE": "/dev/null", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def modules(path):
    """The top-level modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_module_that_we_import_belongs_to_a_dependency_that_we_declare():
    said = [*PROJECT["project"]["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    declared = {canonicalize_name(Requirement(one).name) for one in said}
    # The last three are parts of what is declared: jinja2 and pydantic want them and hand out their types.
    named = {
        "dkim": "dkimpy", "opentelemetry": "opentelemetry-api",
        "_pytest": "pytest", "markupsafe": "jinja2", "pydantic_core": "pydantic",
    }  # fmt: skip
    ours = {"outbox", "psycopg"}  # who calls us with a connection of psycopg has it
    for path in (ROOT / "outbox").rglob("*.py"):
        for module in {*modules(path)} - sys.stdlib_module_names - ours:
            assert canonicalize_name(named.get(module, module)) in declared, f"{path.name} imports {module}"
