"""Which nouns a run keeps, by each of the three scores."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tac_ray.algorithm.nouns import gradient_scores, top_nouns_per_centroid
from tac_ray.algorithm.transport import SCORE_TEMPERATURE, transport_prices, transport_scores
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix, matrix_column
from tac_ray.artifacts.storage import array_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import SelectNounsConfig
from tac_ray.stages import select_nouns as stage
from tac_ray.stages.select_nouns import select_nouns
from tests.conftest import SilentProgress

WIDTH, N_NOUNS = 8, 60
SIZES = [30, 6, 0, 3]
"""Images of each centroid; two rows are left out."""


def unit_rows(n: int, *, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def store(tmp_path: Path, silent_progress: SilentProgress) -> Store:
    return Store(str(tmp_path), silent_progress)


@pytest.fixture
def nouns(store: Store) -> Artifact:
    def write(writer: ArtifactWriter) -> None:
        embedding = unit_rows(N_NOUNS, seed=0).astype(np.float16)
        for first in range(0, N_NOUNS, 25):
            rows = embedding[first : first + 25]
            names = [f"noun {first + i}" for i in range(len(rows))]
            writer.add_part(pa.table({"noun": names, "embedding": matrix_column(rows)}))

    return store.run_stage("embed_nouns", version=1, options={}, inputs=["nouns"], write=write)


@pytest.fixture
def centroids(store: Store) -> Artifact:
    def write(writer: ArtifactWriter) -> None:
        ids = np.concatenate([np.repeat(np.arange(4), SIZES), [-1, -1]]).astype(np.int32)
        for part in np.array_split(ids, 3):
            writer.add_part(pa.table({"centroid_id": part}))
        writer.add_file("centroids.npy", array_bytes(unit_rows(4, seed=1)))

    return store.run_stage("find_centroids", version=1, options={}, inputs=["rows"], write=write)


def expected(score: str, nouns: Artifact) -> tuple[list[int], list[float]]:
    embedding = torch.tensor(matrix(nouns.column("embedding")))
    directions = torch.tensor(unit_rows(4, seed=1))
    if score == "gradient":
        centroid_id, scores = gradient_scores(embedding, directions)
    else:
        mass = torch.tensor([30, 6, 1, 3])  # a centroid without images counts as of one
        prices = transport_prices(embedding, directions, mass, temperature=SCORE_TEMPERATURE)
        centroid_id, scores = transport_scores(embedding, directions, prices)
    selected = top_nouns_per_centroid(centroid_id, scores, nouns_per_centroid=3)
    return selected.tolist(), scores[selected].tolist()


@pytest.mark.parametrize("score", ["gradient", "transport"])
def test_nouns_are_selected_by_the_score_that_was_asked_for(
    store: Store,
    nouns: Artifact,
    centroids: Artifact,
    score: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(stage, "BATCH_NOUNS", 7)
    config = SelectNounsConfig(nouns_per_centroid=3, noun_score=score)  # type: ignore[arg-type]
    found = select_nouns(store, config, centroids, nouns)
    noun_id, scores = expected(score, nouns)
    assert found.column("noun_id").to_pylist() == noun_id
    assert found.column("noun").to_pylist() == [f"noun {i}" for i in noun_id]
    assert found.column("confidence").to_pylist() == pytest.approx(scores, abs=1e-6)
    assert found.manifest.options["noun_score"] == score


def test_the_three_scores_keep_other_nouns(store: Store, nouns: Artifact, centroids: Artifact):
    kept = []
    for score in ("confidence", "gradient", "transport"):
        config = SelectNounsConfig(nouns_per_centroid=3, noun_score=score)
        kept.append(select_nouns(store, config, centroids, nouns).column("noun_id").to_pylist())
    assert kept[0] != kept[1]
    assert kept[0] != kept[2]


def test_the_score_of_before_leaves_the_fingerprint_of_before(
    store: Store, nouns: Artifact, centroids: Artifact
):
    found = select_nouns(store, SelectNounsConfig(), centroids, nouns)
    assert found.manifest.options == {"nouns_per_centroid": 5, "selection_precision": "float32"}
