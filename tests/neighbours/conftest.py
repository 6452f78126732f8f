"""What the tests of this tier share: one mail server of each kind, and relays with default settings."""

import pytest

from tests.neighbours.servers import SERVERS


def pytest_collection_modifyitems(items):
    """Mark every test of this directory."""
    for item in items:
        if "neighbours" in item.path.parts:
            item.add_marker(pytest.mark.neighbours)


@pytest.fixture(params=SERVERS, ids=[server.name for server in SERVERS])
def kind(request):
    """Each kind of mail server in turn; skipped where it cannot run."""
    if (reason := request.param.missing()) is not None:
        pytest.skip(reason)
    return request.param
