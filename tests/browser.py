"""A headless Chromium that watches what a page does."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian package chromium)"
)


class Watched:
    """A tab that remembers what a page should not do: errors, dialogs, requests elsewhere."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.wrong: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.wrong.append(f"failed {request.url}"))
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: self.wrong.append(dialog.message))

    def open(self, index: str) -> Page:
        """Load the page from disk."""
        self.page.goto(Path(index).as_uri())
        return self.page

    def shown(self) -> list[str]:
        """Names of the clusters that are shown, in order."""
        return self.page.locator("article:visible h2").all_text_contents()

    def close(self, folder: Path) -> None:
        """Close the tab and complain about what it remembers."""
        self.page.close()
        assert self.wrong == []
        assert [url for url in self.requests if not url.startswith(folder.as_uri())] == []


def look_through(watched: Watched, index: Path, names: list[str]) -> None:
    """What a person does first with a page whose clusters have these names."""
    page = watched.open(str(index))
    assert sorted(watched.shown()) == sorted(names)
    sizes = page.locator("article .size").all_text_contents()
    assert [int(size.replace(",", "")) for size in sizes] == sorted(
        (int(size.replace(",", "")) for size in sizes), reverse=True
    )
    page.get_by_text("name", exact=True).click()
    assert watched.shown() == sorted(names, key=str.lower)
    page.keyboard.press("/")
    page.keyboard.type(names[0])
    assert names[0] in watched.shown()
    assert "ACC" in page.locator("#scores").inner_text()
    watched.close(index.parent)
