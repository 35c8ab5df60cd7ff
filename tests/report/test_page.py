"""The page as a document; tests/report/test_browser.py opens it."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tac_ray.report.page as page_module
from tac_ray.report.page import render_page, write_page
from tests.report.conftest import RunFactory, write_pictures

pytestmark = pytest.mark.integration
MARKUP = '"><img src=x onerror=alert(1)>'


class Tags(HTMLParser):
    """Elements of a document, its text, and the content of its data block."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._in_data = "", "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data
        else:
            self.text += data


def test_markup_from_outside_is_text(make_run: RunFactory, tmp_path: Path):
    uris = write_pictures(tmp_path / "images", ["a.jpg", MARKUP.replace("/", "") + ".jpg"])
    failure = {"image_id": 9, "uri": f"{MARKUP}.png", "step": "decode", "error": f"bad {MARKUP}"}
    run = make_run(
        uris,
        [MARKUP, "</script><script>alert(2)</script>"],
        labels=[MARKUP, "plain"],
        nouns=["<b>bold</b>"],
        failures=[failure],
        images=f"photos/{MARKUP}",
    )
    html = render_page(run)
    found = Tags(html)
    assert "img" not in [tag for tag, _ in found.tags]
    assert [attrs.get("type") for tag, attrs in found.tags if tag == "script"] == [
        "application/json",
        None,
    ]
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    data = json.loads(found.data)
    assert data["clusters"][0]["name"] == MARKUP
    assert found.text.count(MARKUP) >= 4  # folder, label, confusion, failure


def test_failures_are_counted_by_reason_whatever_their_numbers(
    make_run: RunFactory, tmp_path: Path
):
    uris = write_pictures(tmp_path / "images", ["a.jpg", "b.jpg"])
    truncated = [
        {"image_id": i, "uri": f"{i}.jpg", "step": "decode", "error": f"truncated ({i} bytes)"}
        for i in range(7)
    ]
    other = {"image_id": 8, "uri": "8.jpg", "step": "download", "error": "FileNotFoundError: no"}
    text = " ".join(
        Tags(render_page(make_run(uris, ["x", "y"], failures=[*truncated, other]))).text.split()
    )
    assert "2 clustered, 8 not read" in text
    assert "decode truncated (N bytes) 7 0.jpg" in text
    assert "download FileNotFoundError: no 1 8.jpg" in text


def test_labels_of_imagenet_are_readable(make_run: RunFactory, tmp_path: Path):
    uris = write_pictures(tmp_path / "images", ["a.jpg", "b.jpg"])
    run = make_run(uris, ["x", "y"], labels=["n01440764", "n99999999"])
    text = Tags(render_page(run)).text
    assert "tench (n01440764)" in text
    assert "n99999999" in text


def test_the_matrix_gives_way_to_a_list_when_it_is_large(
    make_run: RunFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uris = write_pictures(tmp_path / "images", [f"{i}.jpg" for i in range(9)])
    run = make_run(uris, ["x", "y", "z"], labels=list("abcabcabc"))
    assert "Confusion matrix" in render_page(run)
    monkeypatch.setattr(page_module, "MAX_MATRIX", 2)
    html = render_page(run)
    assert "Confusion matrix" not in html
    assert "Largest confusions" in html


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"finished": False}, "not finished"), ({"artifacts": {}}, "has no pictures")],
)
def test_a_run_without_its_end_has_no_page(
    make_run: RunFactory, tmp_path: Path, change: dict[str, Any], reason: str
):
    uris = write_pictures(tmp_path / "images", ["a.jpg", "b.jpg"])
    run = dataclasses.replace(make_run(uris, ["x", "y"]), **change)
    with pytest.raises(FileNotFoundError, match=reason):
        write_page(run)
    assert not (tmp_path / "run" / "page").exists()


def test_the_page_goes_where_it_is_wanted(make_run: RunFactory, tmp_path: Path):
    uris = write_pictures(tmp_path / "images", ["a.jpg", "b.jpg"])
    run = make_run(uris, ["x", "y"])
    kept = tmp_path / "mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert write_page(run, str(kept.parent)) == str(kept.parent / "index.html")
    names = sorted(p.name for p in kept.parent.rglob("*") if p.is_file())
    assert names == ["00000.jpg", "00001.jpg", "index.html", "notes.txt"]
    assert write_page(run) == str(tmp_path / "run" / "page" / "index.html")
