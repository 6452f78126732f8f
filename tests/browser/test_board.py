"""The board as people see it: Chromium, a real relay, a real mail server. Light, dark and on a phone."""

from contextlib import asynccontextmanager

from playwright.async_api import expect

from outbox.sandbox.smtp_sink import Cut, Stage
from tests.support.web_client import link_of, opened, settled_web

TOKEN = "an-operators-token-of-32-letters"
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}


@asynccontextmanager
async def signed_in(fleet, chromium, look):
    """A page on the board, signed in; whatever it complains about fails the test."""
    fleet.report = settled_web(board_token=f'"{TOKEN}"')
    _, server = await opened(fleet)
    context = await chromium.new_context(base_url=f"http://127.0.0.1:{server.port}", **LOOKS[look])
    page, complaints = await context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
    await page.goto("/")
    await page.get_by_label("Your name").fill("Anna")
    await page.get_by_label("Token").fill(TOKEN)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    yield page
    assert complaints == []


async def weekly(fleet, people=3):
    """An edition that is made, of which a server cut off what goes to the first."""
    await fleet.hire(people)

    def script(at, visit):
        return Cut() if at is Stage.DOT and visit.recipients[-1:] == ["p1@example.com"] else None

    fleet.sink.script = script
    assert (await fleet.run("generate")).code == 0


async def test_an_operator_resolves_a_doubt_and_the_board_turns_green_by_itself(fleet, chromium):
    await weekly(fleet)
    async with signed_in(fleet, chromium, "light") as board:
        verdict = board.get_by_role("region", name="Verdict")
        await expect(verdict).to_contain_text("No relay is alive")
        await board.evaluate("window.untouched = true")
        await fleet.relay()
        await expect(verdict).to_contain_text("1 email is in doubt")
        await expect(verdict.locator(".dot")).to_have_class("dot bad")

        desk = await board.context.new_page()
        await desk.goto("/")
        await desk.get_by_role("link", name="Decide").click()
        await desk.get_by_role("row", name="p1@example.com").get_by_role("link").click()
        await expect(desk.get_by_text("Its story")).to_be_visible()
        await expect(desk.frame_locator("iframe").get_by_role("heading").first).to_be_visible()
        await desk.get_by_role("button", name="It arrived").click()
        await expect(desk.get_by_role("listitem").filter(has_text="p1@example.com")).to_have_count(1)
        await desk.get_by_label("Why").fill("the mail server's log has it")
        await desk.get_by_role("button", name="It arrived").click()
        await expect(desk.get_by_text("1 said to have arrived.")).to_be_visible()

        await expect(verdict).to_contain_text("All is well")
        await expect(verdict.locator(".dot")).to_have_class("dot good")
        await expect(board.get_by_text("3 made, 3 sent")).to_be_visible(timeout=15_000)
        await expect(board).to_have_title("All is well · outbox")
        assert await board.evaluate("window.untouched"), "without a reload"
    assert await fleet.states() == {"sent": 3}


async def faults(page, look):
    """What axe-core finds wrong with a page as it is shown now, and whether it is too wide for its window."""
    await page.emulate_media(color_scheme=look["color_scheme"])
    await page.set_viewport_size(look["viewport"])
    found = await page.evaluate("axe.run({resultTypes: ['violations']})")
    said = [(one["id"], node["html"], node["failureSummary"]) for one in found["violations"] for node in one["nodes"]]
    wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return said + ([("too wide", wide, "")] if wide > 0 else [])


async def test_every_page_can_be_used_by_everybody(fleet, chromium, axe):
    await weekly(fleet)
    assert (await fleet.run("relay", "--until-empty")).code == 0
    assert (await fleet.run("pause", "--why", "the figures are wrong")).code == 0
    await fleet.put_emails(60)
    found = {}
    async with signed_in(fleet, chromium, "light") as page:

        async def look_at(name):
            await page.evaluate(axe.read_text())
            for look, how in LOOKS.items():
                found[f"{name}, {look}"] = await faults(page, how)

        await expect(page.get_by_text("3 made, 2 sent")).to_be_visible()
        await look_at("overview")
        for path in ("editions", "editions/1", "emails", "emails?state=dead", "pauses", "decisions", "emails/1"):
            await page.goto(f"/{path}")
            await look_at(path)
        await page.get_by_role("button", name="Let it be").click()
        await look_at("confirm")
        await page.get_by_label("Why").fill("enough")
        await page.get_by_role("button", name="Let it be").click()
        await look_at("decided")
    assert {name: said for name, said in found.items() if said} == {}


async def test_the_link_of_this_run_leads_to_the_board_and_leaves_no_token_behind(fleet, chromium):
    process, server = await opened(fleet)
    link = f"http://127.0.0.1:{server.port}{link_of(process)}"
    elsewhere = f'<a href="{link}">the link, in a chat</a>'
    for follows in (False, True):
        context = await chromium.new_context()
        page, asked = await context.new_page(), []
        page.on("request", lambda request, asked=asked: asked.append(request))
        if follows:  # a page of another site: along its redirect a strict cookie would not be sent
            await page.route(
                "http://chat.example/", lambda route: route.fulfill(body=elsewhere, content_type="text/html")
            )
            await page.goto("http://chat.example/")
            await page.get_by_role("link").click()
        else:
            await page.goto(link)
        await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        assert page.url == f"http://127.0.0.1:{server.port}/"
        for request in asked:
            assert "token=" not in (await request.all_headers()).get("referer", "")
        await page.go_back()
        assert "token=" not in page.url
        await page.goto(f"http://127.0.0.1:{server.port}/emails")
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        await context.close()
