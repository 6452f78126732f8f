"""Settings files for tests: samples, and what `load` makes of a text in the working directory."""

from pathlib import Path

import pytest

from outbox.errors import ConfigurationError
from outbox.settings import Settings, load

SECRET = "s3cr3t"
QUERIES = """
link = "https://reports.example.com/r/{token}"
recipients = "select id::text as key, email from people"
data = "select day from progress where person_id = cast(:key as int)"
"""
REPORT = f"[reports.progress]{QUERIES}"
WHOLE = f"""
database_url = "postgresql://bob@db/app"
smtp_url = "smtp://mail:25"
sender = "Progress reports <reports@example.com>"
{REPORT}
"""
ENCODE = "percent-encode @ / ? # : and % in the user and the password (p@ss is p%40ss)"
LINK = "https://reports.example.com/r/{token}"


def read(text: str = "", **variables: str) -> Settings:
    Path("outbox.toml").write_text(text, encoding="utf-8")
    return load(environ=variables)


def faults(text: str = "", **variables: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(text, **variables)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults
