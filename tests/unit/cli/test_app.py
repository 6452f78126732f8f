"""What each start of a command pays for."""

import subprocess
import sys

LOADED = "import sys, outbox.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
OWN = "import sys, outbox.cli; print(*sorted(name for name in sys.modules if name.startswith('outbox.')))"
SHARED = {"outbox.cli", "outbox.errors", "outbox.mail", "outbox.mail.delivery_state"}


def modules(program):
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_list_of_commands_loads_no_library_that_only_some_of_them_need():
    libraries = {"asyncio", "asyncpg", "sqlalchemy", "pydantic", "jinja2", "aiosmtplib", "rich", "starlette"}
    assert not libraries & modules(LOADED)


def test_the_list_of_commands_loads_nothing_of_what_they_do():
    assert {name for name in modules(OWN) if not name.startswith("outbox.cli.")} <= SHARED
