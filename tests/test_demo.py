"""The demo: what ships, and what it finds."""

import csv
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import tac_ray.demo as demo
from tac_ray.artifacts.run import Run
from tests.browser import Watched, look_through, needs_chromium
from tests.integration.conftest import tac_ray

HERE = Path(demo.__file__).parent


def glyphs() -> list[dict[str, str]]:
    with (HERE / "glyphs.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_is_small_enough_to_ship():
    pictures = list(demo.IMAGES.glob("*/*.jpg"))
    assert 1_000 <= len(pictures) <= 2_000
    assert sum(path.stat().st_size for path in pictures) < 8e6
    assert sum(path.stat().st_size for path in demo.ENCODER.iterdir()) < 12e6


def test_every_picture_shows_a_listed_glyph_in_the_folder_of_its_class():
    listed = {(row["class"], row["code_point"]) for row in glyphs()}
    shown = {
        (path.parent.name, path.name.split("-")[0].upper()) for path in demo.IMAGES.glob("*/*.jpg")
    }
    assert shown == listed


def test_a_fifth_of_each_class_was_never_seen_by_the_encoder():
    for name in {row["class"] for row in glyphs()}:
        seen = [row["seen"] == "true" for row in glyphs() if row["class"] == name]
        assert seen.count(False) >= 0.2 * len(seen)
        assert seen.count(True) > 0


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo prints."""
    process = tac_ray("demo", "--out", str(tmp_path_factory.mktemp("demo") / "run"))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def page(printed: str) -> Path:
    return Path(printed.strip().splitlines()[-1].removeprefix("open "))


@pytest.mark.integration
def test_the_demo_finds_its_classes(printed: str):
    rows = [line.split() for line in printed.splitlines() if line.startswith("all  ")]
    accuracy = [float(row[-3]) for row in rows]
    assert len(accuracy) == 3  # k-means on embeddings, TAC without training, the graph
    assert max(accuracy[1:]) > accuracy[0] > 50


@pytest.mark.browser
@needs_chromium
def test_the_page_of_the_demo_opens(printed: str, browser: Browser):
    names = Run.load(str(page(printed).parents[1])).names["name"].to_pylist()
    look_through(Watched(browser.new_page()), page(printed), names)
