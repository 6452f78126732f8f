"""URLs of mail servers."""

import pytest

from outbox.settings.urls import SmtpAddress


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("lmtp://store", SmtpAddress("store", 24, implicit_tls=False, scheme="lmtp"), "lmtp://store:24"),
        ("LMTP://[::1]:2424", SmtpAddress("::1", 2424, implicit_tls=False, scheme="lmtp"), "lmtp://[::1]:2424"),
        (
            "lmtp:///run/lmtp%20socket",
            SmtpAddress("", 0, implicit_tls=False, scheme="lmtp", path="/run/lmtp socket"),
            "lmtp:///run/lmtp%20socket",
        ),
        ("file:///var/try", SmtpAddress("", 0, implicit_tls=False, scheme="file", path="/var/try"), "file:///var/try"),
    ],
)
def test_lmtp_and_a_maildir_are_addresses_too(url, address, shown):
    found = SmtpAddress.parse(url)
    assert found == address
    assert found.name == found.redacted == shown


@pytest.mark.parametrize("url", ["file://here", "file:///", "file://", "lmtp://", "lmtp://a:b@host", "lmtp://host/x"])
def test_a_url_that_is_none_is_said_with_the_mend(url):
    with pytest.raises(ValueError, match=r"; (write|end) "):
        SmtpAddress.parse(url)
