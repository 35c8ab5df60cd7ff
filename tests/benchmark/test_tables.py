"""Mean and deviation over seeds, Markdown, and where the paper's numbers stand."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest

from tac_ray.benchmark.figure import figure_5
from tac_ray.benchmark.rows import Case
from tac_ray.benchmark.tables import Spread, as_json, lines, markdown
from tests.benchmark.conftest import MeasurementFactory


def test_spread_is_that_of_a_sample():
    spread = Spread.of([60.0, 62.0, 67.0])
    assert spread.mean == 63
    assert spread.deviation == pytest.approx((13.0) ** 0.5)
    assert str(spread) == "63.0 ± 3.6"
    assert str(Spread.of([63.0])) == "63.0"


def test_lines_join_seeds_and_keep_splits_and_protocols_apart(measured: MeasurementFactory):
    found = lines(
        [
            measured("TAC", 0, 0.5, paper=(62.1, 50.1, 34.4)),
            measured("TAC", 1, 0.6, paper=(62.1, 50.1, 34.4)),
            measured("TAC", 0, 0.7, split="train", paper=(62.1, 50.1, 34.4)),
            measured("k-means", 0, 0.4, method="kmeans", paper=(1, 2, 3)),
            measured(
                "k-means", 0, 0.3, method="kmeans", protocol="fitted on test", paper=(1, 2, 3)
            ),
            measured("unlabeled", 0, None),
        ]
    )
    assert [(line.title, line.where, line.seeds) for line in found] == [
        ("TAC", "test, fitted on train", (0, 1)),
        ("TAC", "train", (0,)),
        ("k-means", "test, fitted on train", (0,)),
        ("k-means", "test, fitted on test", (0,)),
    ]
    assert found[0].scores["acc"].mean == pytest.approx(55)
    assert found[0].scores["nmi"].mean == pytest.approx(27.5)
    # Of the heads the paper scores test, of k-means test as it was fitted on it.
    assert [line.paper is not None for line in found] == [True, False, False, True]
    (first, *_) = as_json(found)
    assert json.loads(json.dumps(first))["paper"] == {"nmi": 62.1, "acc": 50.1, "ari": 34.4}


def test_markdown_has_a_table_a_case(measured: MeasurementFactory, case: Case):
    text = markdown(
        lines(
            [measured("TAC", s, acc, paper=(62.1, 50.1, 34.4)) for s, acc in ((0, 0.5), (1, 0.6))]
        )
    )
    assert text.splitlines() == [
        "## DTD, ViT-B-32-quickgelu",
        "",
        "| row | images | NMI | ACC | ARI | paper NMI, ACC, ARI | seconds | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| TAC | test, fitted on train | 27.5 ± 3.5 | 55.0 ± 7.1 | 13.8 ± 1.8 | 62.1, 50.1, 34.4 "
        "| 0.5 | 2 |",
    ]


def test_markdown_of_several_cases_begins_with_all_of_them(
    measured: MeasurementFactory, case: Case
):
    other = dataclasses.replace(case, dataset=dataclasses.replace(case.dataset, name="a|b"))
    text = markdown(
        lines([measured("TAC", 0, 0.5), measured("k", 0, 0.6), measured("TAC", 0, 0.7, case=other)])
    )
    assert text.splitlines()[:6] == [
        "## ACC of all cases",
        "",
        "| row | images | DTD, ViT-B-32-quickgelu | a\\|b, ViT-B-32-quickgelu |",
        "| --- | ---: | ---: | ---: |",
        "| TAC | test, fitted on train | 50.0 | 70.0 |",
        "| k | test, fitted on train | 60.0 |  |",
    ]
    assert text.count("## ") == 3


def test_figure_5_draws_the_scored_split(measured: MeasurementFactory):
    values = [
        measured(f"TAC, n neighbors {n}", seed, acc + n / 1000, setting=("n_neighbors", n), split=s)
        for n in (10, 20, 50)
        for seed in (0, 1)
        for s, acc in (("train", 0.7), ("test", 0.5))
    ]
    image = figure_5("<DTD>", lines(values))
    root = ElementTree.fromstring(image)
    name = "{http://www.w3.org/2000/svg}"
    points = [title.text for title in root.iter(f"{name}title")]
    assert points == ["10: 51.0 ± 0.0", "20: 52.0 ± 0.0", "50: 55.0 ± 0.0"]
    assert "ACC, &lt;DTD&gt;" in image
