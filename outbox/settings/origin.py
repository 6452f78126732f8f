"""Origin of settings: the files and variables they were read from, to read a rotated login again without a restart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outbox.errors import ConfigurationError
from outbox.settings.keys import variable
from outbox.settings.secret_files import LoginSource, age_s
from outbox.settings.urls import DatabaseUrl, SmtpAddress

if TYPE_CHECKING:
    from outbox.settings.model import Settings


@dataclass(frozen=True, repr=False)
class Origin:
    """Files and variables that settings were read from. All origins are equal: settings are compared by their values.

    `read_again` reads the same files and variables as they are now; it raises ConfigurationError.
    """

    files: tuple[Path, ...] = field(compare=False)
    environ: Mapping[str, str] = field(compare=False)
    read_again: "Callable[[], Settings]" = field(compare=False)

    def database_login(self, url: DatabaseUrl) -> LoginSource[DatabaseUrl]:
        """Return the source of the database's login."""
        return LoginSource(url, self.files, partial(self._read_database, url))

    def smtp_login(self, route: str, address: SmtpAddress) -> LoginSource[SmtpAddress]:
        """Return the source of a mail server's login; route '' is the usual one."""
        return LoginSource(address, self.files, partial(self._read_smtp, route, address))

    def smtp_login_age_s(self, route: str) -> float | None:
        """Return how long ago the file with a route's login was written; None if it came from the environment."""
        name = variable("smtp_url")
        if not route and name in self.environ:
            return None
        file = self.environ.get(f"{name}_FILE") if not route else None
        return age_s(self.files if file is None else (Path(file),))

    def _read_database(self, former: DatabaseUrl) -> DatabaseUrl | str:
        """Return the database's address with the login that the files have now, or why it cannot be used.

        Another server or database is not taken: what this process has sent and claimed belongs to the former one.
        """
        try:
            url = self.read_again().database_url
        except ConfigurationError as error:
            return error.faults[0]
        if url is None or url.without_login != former.without_login:
            return "database_url now names another server or database; restart outbox to use it."
        return replace(url, login=None)

    def _read_smtp(self, route: str, former: SmtpAddress) -> SmtpAddress | str:
        """Return the mail server's address with the login that the files have now; another server is not taken."""
        try:
            address = self.read_again().on_route(route).smtp_url
        except ConfigurationError as error:
            return error.faults[0]
        if address is None or address.anonymous != former.anonymous:
            return "smtp_url now names another server; restart outbox to use it."
        return address
