import pytest

from outbox.errors import ConfigurationError
from outbox.settings import DkimSettings, WebSettings
from outbox.smtp.dkim import load_signer
from outbox.web.sub_path import ORIGIN, SubPath


async def passed_on(url, path, root_path=""):
    seen = []

    async def app(scope, _receive, _send):
        seen.append(scope)

    await SubPath(app, url)({"type": "http", "path": path, "root_path": root_path}, None, None)
    return seen[0]


@pytest.mark.parametrize("url, path, below", [
    ("https://h/outbox/", "/emails", "/outbox/emails"),
    ("https://h/outbox/", "/outbox/emails", "/outbox/emails"),
    ("https://h/outbox/", "/outbox", "/outbox/"),
    ("https://h/outbox/", "/", "/outbox/"),
    ("https://h/outbox/", "/outboxes", "/outbox/outboxes"),
    ("https://h/a/b/", "/a/b/r/x", "/a/b/r/x"),
    ("https://h/", "/emails", "/emails"),
])  # fmt: skip
async def test_a_path_that_the_proxy_took_off_and_one_that_it_passed_on_are_the_same(url, path, below):
    scope = await passed_on(url, path)
    assert (scope["path"], scope[ORIGIN]) == (below, "https://h")
    assert below.startswith(scope["root_path"])


async def test_an_application_that_is_mounted_keeps_its_path():
    scope = await passed_on("https://h/outbox/", "/mail/emails", root_path="/mail")
    assert (scope["path"], scope["root_path"]) == ("/mail/emails", "/mail")


@pytest.mark.parametrize("given, read", [
    ("https://intern/outbox", "https://intern/outbox/"),
    ("https://Intern:443/outbox/", "https://intern/outbox/"),
    ("http://127.0.0.1:8080/a/b", "http://127.0.0.1:8080/a/b/"),
    ("http://[::1]:80", "http://[::1]/"),
])  # fmt: skip
def test_an_address_is_read_as_browsers_write_it(given, read):
    assert WebSettings(url=given).url == read


@pytest.mark.parametrize(
    "url", ["/outbox", "intern/outbox", "https://h/a/../b", "https://h/?x=1", "https://h//a", "ftp://h/"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match=r"https://intern\.example\.com/outbox/"):
        WebSettings(url=url)


def test_a_signature_without_its_extra_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "dkim.crypto", None)
    with pytest.raises(ConfigurationError, match=r"extra `dkim`.*pip install 'outbox-mail\[dkim\]'"):
        load_signer(DkimSettings(domain="example.com", selector="a", key_file="k.pem"), tmp_path)
