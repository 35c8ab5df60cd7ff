"""Which rows each table has, with which options and numbers."""

import dataclasses

from tac_ray.benchmark.rows import (
    FIGURE_5,
    Case,
    centroid_rows,
    encoder_rows,
    figure_5_rows,
    loss_rows,
    main_rows,
    n_clusters_rows,
)
from tac_ray.config import EncoderConfig, TacConfig, best, reference

REFERENCE = reference(images="", n_clusters=2, out="/out")
BEST = best(images="", n_clusters=2, out="/out")


def on(case: Case, name: str, **encoder: str) -> Case:
    data = dataclasses.replace(case.dataset, name=name, n_centroids=65)
    return Case(dataset=data, encoder=EncoderConfig(**encoder))  # type: ignore[arg-type]


def test_the_main_table(case: Case):
    rows = main_rows(on(case, "DTD"), REFERENCE, BEST)
    assert [(row.title, row.paper and row.paper[1]) for row in rows] == [
        ("k-means on embeddings", 42.6),
        ("zero-shot (class names)", 43.1),
        ("SCAN", 46.4),
        ("SIC", 45.9),
        ("TAC without training", 45.9),
        ("TAC", 50.1),
        ("TAC with class names as nouns", 48.0),
        ("best", None),
    ]
    assert all(row.config.select_nouns.n_centroids == 65 for row in rows[:-1])
    assert (rows[-1].config, rows[-1].method) == (BEST, BEST.answer)
    nameless = dataclasses.replace(case.dataset, class_names={})
    fewer = main_rows(dataclasses.replace(case, dataset=nameless), REFERENCE, BEST)
    assert len(fewer) == len(rows) - 2
    other = main_rows(on(case, "DTD", model="ViT-B-16-quickgelu"), REFERENCE, BEST)
    assert not any(row.paper for row in other)


def test_a_number_of_centroids_that_was_asked_for_stays(case: Case):
    select = dataclasses.replace(REFERENCE.select_nouns, n_centroids=7)
    asked = dataclasses.replace(REFERENCE, select_nouns=select)
    rows = main_rows(on(case, "DTD"), asked, BEST)
    assert rows[0].config.select_nouns.n_centroids == 7


def test_table_4_varies_what_finds_the_centroids(case: Case):
    rows = centroid_rows(on(case, "ImageNet-Dogs"), REFERENCE, BEST)
    assert len({row.title for row in rows}) == len(rows) == 10
    spectral = next(row for row in rows if row.title == "TAC, spectral")
    assert spectral.config.select_nouns.centroid_method == "spectral"
    assert spectral.paper == (79.2, 83.1, 70.8)


def test_table_5_leaves_out_terms(case: Case):
    rows = {row.title: row for row in loss_rows(on(case, "UCF-101"), REFERENCE, BEST)}
    assert len(rows) == 7
    heads = rows["L_Dis + L_Bal"].config.train_heads
    weights = (heads.distillation_weight, heads.confidence_weight, heads.balance_weight)
    assert weights == (1, 0, 5)
    assert rows["L_Dis + L_Bal"].paper == (70.5, 45.1, 34.5)
    assert rows["L_Dis + L_Con + L_Bal"].config.train_heads == REFERENCE.train_heads


def test_table_6_knows_the_papers_encoders(case: Case):
    rows = encoder_rows(on(case, "UCF-101", model="RN50-quickgelu"), REFERENCE, BEST)
    assert [row.paper and row.paper[1] for row in rows] == [53.5, 55.7, 59.9, 60.6]
    others = encoder_rows(on(case, "UCF-101", pretrained="laion2b"), REFERENCE, BEST)
    assert not any(row.paper for row in others)


def test_figure_5_varies_one_option_at_a_time(case: Case):
    rows = figure_5_rows(on(case, "UCF-101"), REFERENCE, BEST)
    assert {row.setting[0] for row in rows if row.setting} == set(FIGURE_5)
    assert len({row.title for row in rows}) == len(rows)
    for row in rows:
        assert row.setting
        option, value = row.setting
        assert _options(row.config)[option] == value
        base = dict(_options(REFERENCE), n_centroids=65)
        changed = {name for name, now in _options(row.config).items() if base[name] != now}
        assert changed <= {option, *(["n_centroids"] if option == "images_per_centroid" else [])}


def _options(config: TacConfig) -> dict[str, object]:
    stages = ("select_nouns", "build_counterparts", "find_neighbors", "train_heads")
    return {
        name: value
        for stage in stages
        for name, value in dataclasses.asdict(getattr(config, stage)).items()
    }


def test_rows_of_several_numbers_of_clusters(case: Case):
    rows = n_clusters_rows((5, 7))(case, REFERENCE, BEST)
    assert [(row.title, row.n_clusters) for row in rows] == [("5 clusters", 5), ("7 clusters", 7)]
    assert {row.graph_share for row in rows} == {0.8}
