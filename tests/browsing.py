"""A real Chromium that looks at the dashboard: what it meets on the way, what axe finds, and how it looks."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .authorization_server import HOST
from .conftest import LIMIT, HostProcess

__all__ = ["DESKTOP", "PHONE", "Visit", "browser", "visiting"]

DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
NARROWEST = {"width": 360, "height": 740}
WORST = ("serious", "critical")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a window. Where there is none the test is skipped, and says so."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="there is no Playwright here: pip install playwright"
    )
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium, or scripts/packages as root")
    options = ["--disable-gpu", "--disable-dev-shm-usage", f"--host-resolver-rules=MAP {HOST} 127.0.0.1"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=options)
        yield chromium
        chromium.close()


class Visit:
    """A page of the dashboard in a browser, and what went wrong in it."""

    def __init__(self, page: Any, host: HostProcess, folder: Path, expected: set[str]) -> None:
        self.page = page
        self.host = host
        self.origin = f"http://127.0.0.1:{host.port}"
        self.folder = folder
        self.errors: list[str] = []
        self.expected = expected
        self.elsewhere: list[str] = []
        page.set_default_timeout(LIMIT * 1000)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in self.expected):
            self.errors.append(message.text)

    def _request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.elsewhere.append(request.url)

    def begin(self) -> None:
        """Load the dashboard, and mark the page: another load would lose the mark."""
        self.page.goto(f"{self.origin}/")
        self.page.evaluate("window.theSamePage = true")

    def go(self, path: str, title: str) -> None:
        """To a page by its address, as a link would; wait until it shows ``title``."""
        self.page.evaluate("path => { location.hash = path }", f"#{path}")
        self.wait_for_title(title)

    def wait_for_title(self, title: str) -> None:
        self.page.locator("h1", has_text=title).first.wait_for()

    def click(self, name: str, role: str = "button", **options: Any) -> None:
        self.page.get_by_role(role, name=name, **options).first.click()

    def fill(self, label: str, text: str) -> None:
        self.page.get_by_label(label).first.fill(text)

    def see(self, text: str, inside: str = "main") -> None:
        """Wait until ``text`` is there to be read."""
        self.page.locator(inside).get_by_text(text).first.wait_for()

    def gone(self, text: str, inside: str = "main") -> None:
        """Wait until ``text`` is there no more."""
        self.page.locator(inside).get_by_text(text).first.wait_for(state="detached")

    def look(self, name: str) -> None:
        """Take its pictures, light and dark, on a desktop and on a phone; axe must find nothing that is serious, and a
        narrow screen nothing to scroll sideways to."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        self.page.mouse.move(0, 0)
        self.page.evaluate("window.scrollTo(0, 0)")
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            for size, viewport in (("phone", PHONE), ("desktop", DESKTOP)):
                self.page.set_viewport_size(viewport)
                self.page.screenshot(path=str(self.folder / f"{name}-{size}-{scheme}.png"), full_page=True)
            found = axe.run(self.page).response["violations"]
            bad = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in WORST]
            assert not bad, (name, scheme, bad)
        self.page.set_viewport_size(NARROWEST)
        assert self.page.evaluate("document.documentElement.scrollWidth") <= NARROWEST["width"], name
        self.page.set_viewport_size(DESKTOP)
        self.page.emulate_media(color_scheme="light")

    def check(self) -> None:
        """Nothing has gone wrong, nothing came from elsewhere, and it is the page that was loaded first."""
        assert self.errors == []
        assert self.elsewhere == []
        assert self.page.evaluate("window.theSamePage === true")


@contextlib.contextmanager
def visiting(chromium: Any, host: HostProcess, folder: Path, *expected: str) -> Iterator[Visit]:
    """A visit to ``host`` by a browser of its own; pictures go to HAYHOST_TEST_SCREENSHOTS, else ``folder``.

    The browser's messages that have a part that is ``expected`` are no errors.
    """
    pictures = Path(os.environ.get("HAYHOST_TEST_SCREENSHOTS") or folder)
    pictures.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(viewport=DESKTOP, ignore_https_errors=True, reduced_motion="reduce")
    try:
        visit = Visit(context.new_page(), host, pictures, {*expected})
        visit.begin()
        yield visit
        visit.check()
    finally:
        context.close()
