"""What the tests of this tier share: one mail server of each kind, and relays with default settings."""

import os

import pytest

from tests.neighbours.neighbour import Neighbour
from tests.neighbours.servers import SERVERS


def pytest_collection_modifyitems(items):
    """Mark every test of this directory."""
    for item in items:
        if "neighbours" in item.path.parts:
            item.add_marker(pytest.mark.neighbours)


def needs(kind: type[Neighbour]) -> None:
    """Skip the test where this server cannot run, but not as root in CI, which installs all that is needed."""
    if (reason := kind.missing()) is not None:
        assert "CI" not in os.environ or os.geteuid(), reason
        pytest.skip(reason)


@pytest.fixture(params=SERVERS, ids=[server.name for server in SERVERS])
def kind(request):
    """Each kind of mail server in turn; skipped where it cannot run."""
    needs(request.param)
    return request.param
