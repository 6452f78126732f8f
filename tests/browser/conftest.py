"""A real Chromium for the tests that look at pages as people do: Debian's, driven by Playwright, without a download."""

import asyncio
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from playwright.async_api import async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
async def chromium():
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        await browser.close()


@pytest.fixture
def axe():
    """The path of axe-core, as a Python package brings it."""
    return Path(str(files("axe_playwright_python") / "axe.min.js"))


async def violations(page, axe):
    """What axe-core finds wrong on a page as it is shown now, each with the first element that it names.

    On a copy of it in the same browser context, since the page itself may run nothing.
    """
    copy = await page.context.new_page()
    await copy.set_content(await page.content())
    await copy.evaluate(axe.read_text())
    async with asyncio.timeout(30):
        found = await copy.evaluate("axe.run()")
    await copy.close()
    return [(one["id"], one["nodes"][0]["html"], one["nodes"][0]["failureSummary"]) for one in found["violations"]]
