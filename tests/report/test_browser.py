"""The page in headless Chromium, from disk."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tac_ray.report.page import write_page
from tests.browser import Watched, needs_chromium
from tests.report.conftest import RunFactory, write_pictures

MARKUP = '"><img src=x onerror=alert(1)>'
NAMES = ["tench", "English springer", "church", MARKUP]

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture
def index(make_run: RunFactory, tmp_path: Path) -> str:
    files = [f"{MARKUP.replace('/', '')}{i}.jpg" for i in range(60)]
    uris = write_pictures(tmp_path / "images", files)
    labels = [f"label {MARKUP}" if i % 2 else "other" for i in range(60)]
    return write_page(make_run(uris, NAMES, labels=labels, nouns=["<i>noun</i>", "fish"]))


@pytest.fixture
def tab(browser: Browser, index: str) -> Iterator[Watched]:
    watched = Watched(browser.new_page())
    watched.open(index)
    yield watched
    watched.close(Path(index).parent)


def test_clusters_are_there_with_pictures_and_markup_is_text(tab: Watched):
    assert sorted(tab.shown()) == sorted(NAMES)
    assert tab.page.locator("img").count() == 0
    expect(tab.page.locator(".nouns li").first).to_have_text("<i>noun</i>")
    tile = tab.page.locator("button.tile").first
    expect(tile).to_have_attribute("style", re.compile(r"sheets/0000\d\.jpg"))
    assert MARKUP.replace("/", "") in (tile.get_attribute("title") or "")
    assert any(url.endswith(".jpg") for url in tab.requests)


def test_sorting_by_mouse_and_by_keyboard(tab: Watched):
    page = tab.page
    sizes = [int(text) for text in page.locator("article .size").all_inner_texts()]
    assert sizes == sorted(sizes, reverse=True)
    page.get_by_text("name", exact=True).click()
    assert tab.shown() == sorted(NAMES, key=lambda name: name.strip('">').lower())
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_label("confidence")).to_be_checked()
    # Not as rendered: cards out of sight are not.
    facts = page.locator("article .facts").all_text_contents()
    means = [float(text.split("%")[0].split()[-1]) for text in facts]
    assert means == sorted(means, reverse=True)


def test_search_by_keyboard(tab: Watched):
    page = tab.page
    page.keyboard.press("/")
    page.keyboard.type("SPRING")
    assert tab.shown() == ["English springer"]
    expect(page.locator("#count")).to_have_text("1 of 4")
    page.keyboard.press("Control+A")
    page.keyboard.type("fish")  # another noun of every cluster
    assert len(tab.shown()) == 4
    page.keyboard.press("Enter")
    page.keyboard.type("zzz")
    assert tab.shown() == []


def test_a_picture_opens_and_leads_to_the_next_cluster(tab: Watched):
    page = tab.page
    page.locator("button.tile").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog.locator(".uri")).to_contain_text(f"images/{MARKUP.replace('/', '')}")
    following = dialog.get_by_role("link").inner_text()
    dialog.get_by_role("link").click()
    expect(dialog).to_be_hidden()
    assert page.locator("article:target h2").inner_text() == following
    page.keyboard.press("Escape")


def test_scores_and_confusion_are_shown(tab: Watched):
    assert "ACC" in tab.page.locator("#scores").inner_text()
    cells = tab.page.locator(".matrix td").all_inner_texts()
    assert sum(int(cell) for cell in cells if cell) == 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, index: str, scheme: str):
    size = {"width": 360, "height": 740}
    watched = Watched(browser.new_page(viewport=size, color_scheme=scheme, is_mobile=True))
    page = watched.open(index)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", paper)[:3]) / 3
    assert (brightness > 128) == (scheme == "light")
    watched.close(Path(index).parent)


@pytest.mark.slow
def test_a_thousand_clusters_open_at_once(browser: Browser, make_run: RunFactory, tmp_path: Path):
    files = [f"{i:032x}.jpg" for i in range(50)]
    uris = write_pictures(tmp_path / "images" / "2023-11" / "camera-07", files) * 2_000
    names = [f"noun of cluster {i}" for i in range(1_000)]
    labels = [f"label {i % 1_000}" for i in range(len(uris))]
    nouns = ["some noun", "another noun", "a third noun", "and a fourth noun"]
    index = write_page(make_run(uris, names, labels=labels, nouns=nouns))
    assert Path(index).stat().st_size < 5e6
    watched = Watched(browser.new_page())
    start = time.monotonic()
    page = watched.open(index)
    expect(page.locator("article")).to_have_count(1_000)
    assert time.monotonic() - start < 2
    seen = [url for url in watched.requests if url.endswith(".jpg")]
    assert 0 < len(seen) < 50
    watched.close(Path(index).parent)
