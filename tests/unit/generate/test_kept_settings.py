"""Settings that the user's queries cannot change for later statements."""

from outbox.generate.kept_settings import KeptSettings


class Driver:
    """Connection that notes what is executed."""

    setup = "SET search_path = trusted; "

    def __init__(self):
        self.executed = []

    async def execute(self, statement):
        self.executed.append(statement)


async def test_settings_are_restored_once_after_each_query_of_the_users_and_the_last_value_counts():
    driver = Driver()
    kept = KeptSettings(driver)
    await kept.keep("TimeZone", "Asia/Tokyo")
    await kept.keep("TimeZone", "it's")
    await kept.restore()
    assert len(driver.executed) == 2
    kept.note_user_query()
    await kept.restore()
    await kept.restore()
    timezone = "SELECT pg_catalog.set_config('TimeZone', 'it''s', false)"
    assert driver.executed[2:] == [f"RESET ALL; RESET ROLE; SET search_path = trusted; {timezone}"]
