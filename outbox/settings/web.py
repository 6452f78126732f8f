"""Table `[web]`: report pages, and the operators' board."""

import ipaddress
import re
from typing import Annotated, Final

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from outbox.settings.urls import parse_listen
from outbox.settings.values import Table, duration_s, is_duration, shown

SECRET_MIN: Final = 16
"""Characters of a secret that cannot be guessed."""

_PAGE: Final = re.compile(
    r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?((?:/[A-Za-z0-9._~-]+)*)/?", re.IGNORECASE
)
_DEFAULT_PORTS: Final = frozenset({("http", ":80"), ("https", ":443")})


class WebSettings(Table):
    """Table `[web]`: report pages behind links, and the board for users who sign in."""

    http: str = "127.0.0.1:8025"
    url: str | None = None  # address in browsers, if a proxy serves it elsewhere, as "https://intern/outbox/"
    board: Annotated[bool, Field(strict=True)] = True  # else the report pages alone
    read_only: Annotated[bool, Field(strict=True)] = False  # the board accepts no decisions
    board_token: SecretStr | None = None  # users who know it may sign in
    board_token_file: str | None = None  # ... or a file that holds it
    board_header: str | None = None  # header in which a sign-in proxy names the user
    board_users: list[str] = []  # users of the proxy who may see the board
    history: Annotated[bool, Field(strict=True)] = False  # a page names the recipient's earlier editions
    expires: str | None = None  # "400d": a page that was made longer ago is not shown; None: all are
    user_header: str | None = None  # header in which a proxy names the recipient's address
    trusted_proxies: list[str] = []  # addresses or networks whose headers are believed

    @property
    def expires_s(self) -> float | None:
        """Return how many seconds after it was made a page expires; None is never."""
        return None if self.expires is None else duration_s(self.expires)

    @property
    def proxies(self) -> "list[ipaddress.IPv4Network | ipaddress.IPv6Network]":
        """Return the networks of the trusted proxies."""
        return [ipaddress.ip_network(proxy, strict=False) for proxy in self.trusted_proxies]

    @property
    def has_sign_in(self) -> bool:
        """Return True if these settings have a sign-in for the board; else `outbox web` prints a link with a token."""
        return self.board_token is not None or self.board_token_file is not None or self.board_header is not None

    @field_validator("http")
    @classmethod
    def _is_host_and_port(cls, http: str) -> str:
        parse_listen(http)
        return http

    @field_validator("url")
    @classmethod
    def _is_a_page(cls, url: str | None) -> str | None:
        if url is None:
            return None
        found = _PAGE.fullmatch(url)
        if found is None or {".", ".."} & set(found[4].split("/")):
            raise ValueError(
                'is not the address of a page; write one like "https://intern.example.com/outbox/", without a query'
            )
        scheme, port = found[1].lower(), found[3] or ""
        port = "" if (scheme, port) in _DEFAULT_PORTS else port
        return f"{scheme}://{found[2].lower()}{port}{found[4]}/"

    @field_validator("board_token")
    @classmethod
    def _is_long(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and len(token.get_secret_value()) < SECRET_MIN:
            raise ValueError(f"is too short to be secret; write at least {SECRET_MIN} random characters")
        return token

    @field_validator("board_token_file")
    @classmethod
    def _is_the_only_token(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and info.data.get("board_token") is not None:
            raise ValueError("stands beside board_token; keep one of them")
        return path

    @field_validator("board_users")
    @classmethod
    def _are_named(cls, users: list[str], info: ValidationInfo) -> list[str]:
        if not users and info.data.get("board_header") is not None:
            raise ValueError(
                "is missing beside board_header, by which everybody whom the proxy knows would be let in; "
                'write one like ["anna@example.com"]'
            )
        return [user.strip().lower() for user in users]

    @field_validator("board_header", "user_header")
    @classmethod
    def _is_a_header(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9-]+", name):
            raise ValueError(f"{shown(name)} is no header; write one like X-Forwarded-Email")
        return name

    @field_validator("expires")
    @classmethod
    def _is_duration(cls, length: str | None) -> str | None:
        if length is not None and not is_duration(length):
            raise ValueError(f'{shown(length)} is no length of time; write one like "400d", "52w" or "48h"')
        return length

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: list[str], info: ValidationInfo) -> list[str]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(
                    f'{shown(proxy)} is no address or network; write one like "127.0.0.1" or "10.0.0.0/8"'
                ) from None
        believed = [key for key in ("board_header", "user_header") if info.data.get(key) is not None]
        if believed and not proxies:
            raise ValueError(
                f"is missing beside {believed[0]}, which anybody could send; write the proxy's address, "
                'like ["127.0.0.1"]'
            )
        return proxies
