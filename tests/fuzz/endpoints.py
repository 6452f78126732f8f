"""The relay's /metrics, /livez and /readyz: raw bytes on its port."""

from contextlib import contextmanager

from tests.fuzz.harness import TARGETS, Target, pieces
from tests.fuzz.served import ANSWER_MAX_S, heads, served

_PASSWORD = "a-password-in-the-smtp-url"

HTTP = (
    b"GET ", b"HEAD ", b"POST ", b"OPTIONS ", b"get ", b"PRI * ", b"/metrics", b"/livez", b"/readyz", b"/", b"*",
    b"//", b"/../",
    b"?", b"#", b"%", b"%00", b"%0d%0a", b"http://x/", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/0.9", b" HTTP/9.9",
    b"\r\n",
    b"\n", b"\r", b"\r\n\r\n", b"\0", b"\xff", b" ", b"\t", b":", b"Host: x\r\n", b"Host: ", b"Content-Length: ",
    b"10\r\n", b"-1",
    b"99999999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked, identity\r\n",
    b"Expect: 100-continue\r\n", b"Connection: keep-alive\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n", b"ffffffffffffffff\r\n", b" folded\r\n", b"X: ", b"a", b"Accept: text/plain\r\n",
    b"\x16\x03\x01\x02\x00",
    b"Accept-Encoding: gzip\r\n", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
)  # fmt: skip
_SEEDS = (
    b"GET /livez HTTP/1.1\r\nHost: relay:9464\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: relay:9464\r\nAccept: application/openmetrics-text\r\nConnection: close\r\n\r\n",
    b"HEAD /readyz HTTP/1.0\r\n\r\n",
)
_PROBE = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@contextmanager
def _opened(url):
    settings = (
        f'database_url = "{url}"\nsmtp_url = "smtp://u:{_PASSWORD}@127.0.0.1:1"\nsender = "reports@example.com"\n'
    )
    with served(
        "relay", "--http", "127.0.0.1:0", settings=settings, event="http_listening", secrets=[_PASSWORD]
    ) as relay:

        def any_bytes_get_an_answer_of_http_or_none_and_the_probe_is_answered(request):
            for status, head in heads(relay.ask(request)):
                assert status < 500 or status in (501, 503, 505), head[:500]
            ((status, _),) = heads(relay.ask(_PROBE, silent_s=ANSWER_MAX_S))
            assert status == 200

        yield any_bytes_get_an_answer_of_http_or_none_and_the_probe_is_answered


TARGETS["endpoints"] = Target("endpoints", pieces(*HTTP, seeds=_SEEDS), bytes, _opened, needs_database=True)
