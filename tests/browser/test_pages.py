"""From the email to the page, as a reader goes: light, dark, on a phone, on paper, and read aloud."""

import email
import email.policy

from tests.browser.conftest import violations
from tests.support.web_client import opened, settled_web

TOKEN = "an-operators-token-of-32-letters"
EVIL = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\">"


LOOKS = [("light", 1200, "rgb(243, 245, 248)"), ("dark", 1200, "rgb(20, 23, 28)"), ("light", 375, "rgb(243, 245, 248)")]


async def mailed(fleet, browser):
    """The HTML of the latest edition's email, whose link leads to the running pages."""
    fleet.settings = fleet._settings().replace("https://reports.example.com", f"http://127.0.0.1:{browser.port}")
    await fleet.hire(1)
    for period in ("2026-W40", "2026-W41"):
        assert (await fleet.run("generate", "--period", period)).code == 0
    assert (await fleet.run("relay", "--until-empty")).code == 0
    parsed = [email.message_from_bytes(one.message, policy=email.policy.default) for one in fleet.sink.accepted]
    (latest,) = [one for one in parsed if "11 October" in one["Subject"]]
    return latest.get_body(("html",)).get_content()


async def test_the_link_in_the_mail_leads_to_a_page_that_all_can_read(fleet, chromium, axe):
    fleet.report = settled_web(history="true")
    fleet.data = "select day::date, done, done * 1234.5 as worth from progress where person_id = cast(:key as int)"
    _, browser = await opened(fleet)
    html = await mailed(fleet, browser)
    for scheme, width, ground in LOOKS:
        context = await chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = await context.new_page()
        faults = []
        page.on("console", lambda said, faults=faults: faults.append(said.text))
        page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
        await page.set_content(html)
        await page.click("a[href*='/r/']")
        await page.wait_for_url("**/r/*")
        assert await page.text_content("h1") == "Progress"
        assert await page.is_visible("nav.outbox-history svg")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        assert await violations(page, axe) == []
        assert faults == []
        async with page.expect_navigation():
            await page.click("nav.outbox-history a")
        assert await page.text_content("h1") == "Progress"
        assert await page.query_selector("nav.outbox-history") is None
        await page.emulate_media(media="print")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert (await page.pdf()).startswith(b"%PDF")
        await context.close()


async def test_what_a_report_says_runs_no_script_in_a_browser(fleet, chromium):
    await fleet.hire(1)
    assert (await fleet.run("generate", "--period", "2026-W40")).code == 0
    token = await fleet.connection.fetchval("SELECT token FROM outbox.report")
    await fleet.connection.execute("UPDATE outbox.report SET html = '<title>fine</title>' || $1", EVIL)
    _, browser = await opened(fleet)
    page = await chromium.new_page()
    await page.goto(f"http://127.0.0.1:{browser.port}/r/{token}", wait_until="load")
    assert await page.title() == "fine"
    assert await page.evaluate("self.origin") == "null"


async def test_our_own_pages_are_styled_under_their_policy_and_can_be_read_by_all(fleet, chromium, axe):
    fleet.report = settled_web(board_token=f'"{TOKEN}"')
    _, browser = await opened(fleet)
    for scheme, width, ground in LOOKS:
        context = await chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = await context.new_page()
        faults = []
        page.on("console", lambda said, faults=faults: faults.append(said.text))
        await page.goto(f"http://127.0.0.1:{browser.port}/u/{'x' * 22}")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        assert await violations(page, axe) == []
        assert faults == []
        await page.goto(f"http://127.0.0.1:{browser.port}/")
        assert await violations(page, axe) == []
        await page.fill("#name", "Anna")
        await page.fill("#token", TOKEN)
        await page.click("button")
        await page.wait_for_selector("header.top")
        assert await violations(page, axe) == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        await page.click("text=Sign out")
        await page.wait_for_selector("#token")
        await context.close()
