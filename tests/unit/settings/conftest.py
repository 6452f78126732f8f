import pytest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
