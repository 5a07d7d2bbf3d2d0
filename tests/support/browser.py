"""A page of a real headless Chromium, for tests of what vlmslim shows in a browser."""

import os
import shutil
from collections.abc import Iterator

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """The system's Chromium, started once; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install "vlmslim[dev]"')
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH: apt install chromium")
    with playwright.sync_playwright() as driver:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses to run as root
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator:
    """A new page that sees no other site. An error on its console fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.route(lambda url: not _local(url), lambda route: route.abort())
    context.set_default_timeout(120_000)  # milliseconds: machines of a test may be busy
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.errors = errors
    yield page
    context.close()
    assert not errors, errors


def _local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:", "about:", "http://127.0.0.1", "ws://127.0.0.1"))
