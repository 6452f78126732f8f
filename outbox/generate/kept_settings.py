"""Settings of generate's session, which hold whatever a query of the user's changes."""

from typing import Final

from outbox.database.connection import Connection

KEEP: Final = "SELECT pg_catalog.set_config('{name}', '{value}', false)"


class KeptSettings:
    """Settings that were made for the rest of the session."""

    def __init__(self, driver: Connection) -> None:
        self._driver = driver
        self._statements: dict[str, str] = {}
        self._may_be_changed = False

    async def keep(self, name: str, value: str) -> None:
        """Set a setting for the rest of the session; the user's queries see it, but cannot change it for later ones."""
        statement = KEEP.format(name=name, value=value.replace("'", "''"))
        await self._driver.execute(statement)
        self._statements[name] = statement

    def note_user_query(self) -> None:
        """Note that a query of the user's runs, which may change settings."""
        self._may_be_changed = True

    async def restore(self) -> None:
        """Undo what a user's query may have set for the session: path, role, or any other setting.

        It is one simple query. RESET ALL restores the settings with which the session began.
        """
        if self._may_be_changed:
            settings = ["RESET ALL", "RESET ROLE", self._driver.setup.rstrip("; "), *self._statements.values()]
            await self._driver.execute("; ".join(settings))
            self._may_be_changed = False
