"""The graph of a sample, and its clusters told of all images by a head."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix, matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import CutGraphConfig, FindNeighborsConfig, FitHeadConfig
from tac_ray.index.group import ShardGroup
from tac_ray.stages.cut_graph import cut_graph
from tac_ray.stages.find_neighbors import find_neighbors
from tac_ray.stages.fit_head import fit_head, load_head
from tac_ray.stages.sample_rows import sample_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

N, WIDTH, K, PARTS = 3000, 16, 4, 3
GROUP = np.random.default_rng(1).integers(K, size=N)


@pytest.fixture
def store(tmp_path: Path, silent_progress: Any) -> Store:
    return Store(str(tmp_path), silent_progress)


def collection(store: Store, kind: str, *, spread: float, standing: float) -> Artifact:
    """Rows in K groups."""
    rng = np.random.default_rng(len(kind))
    middles = rng.standard_normal((K, WIDTH))
    rows = middles[GROUP] + spread * rng.standard_normal((N, WIDTH))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def write(writer: ArtifactWriter) -> None:
        for ids in np.array_split(np.arange(N), PARTS):
            columns = {
                "image_id": ids,
                "embedding": matrix_column(rows[ids].astype(np.float16)),
                "standing": np.full(len(ids), standing, dtype=np.float32),
            }
            writer.add_part(pa.table(columns), plain=True)

    return store.run_stage(kind, version=1, options={}, inputs=[], write=write)


def nouns(store: Store) -> Artifact:
    """A hundred of them, about nothing."""
    rows = np.random.default_rng(9).standard_normal((100, WIDTH)).astype(np.float16)

    def write(writer: ArtifactWriter) -> None:
        writer.add_part(pa.table({"embedding": matrix_column(rows)}))

    return store.run_stage("nouns", version=1, options={}, inputs=[], write=write)


def test_clusters_of_a_samples_graph_are_told_of_all_rows(store: Store):
    images = collection(store, "images", spread=0.6, standing=0)
    texts = collection(store, "texts", spread=0.6, standing=9)
    samples = [
        sample_rows(store, rows, n_rows=1200, seed=0, title=kind)
        for kind, rows in (("image", images), ("text", texts))
    ]
    drawn = [sample.column("image_id").to_numpy() for sample in samples]
    assert drawn[0].tolist() == drawn[1].tolist() == sorted(set(drawn[0].tolist()))
    assert samples[0].part_rows == [400, 400, 400]

    config = FindNeighborsConfig()
    with ShardGroup(2) as index:
        neighbors = [
            find_neighbors(store, config, index, sample, seed=0, title="") for sample in samples
        ]
    clusters = cut_graph(store, CutGraphConfig(), *samples, *neighbors, nouns(store), n_clusters=K)
    assert clusters.part_rows == samples[0].part_rows
    assert clusters.facts["text_weight"] == clusters.facts["share_in_words"] == 1
    head = fit_head(store, FitHeadConfig(), samples[0], clusters, n_clusters=K, seed=0)
    assert head.facts["agreement"] > 0.97

    embedding = torch.tensor(matrix(images.column("embedding"))).float()
    with torch.inference_mode():
        told = load_head(head)(embedding).argmax(dim=1).numpy()
    counts = np.zeros((K, K), dtype=int)
    np.add.at(counts, (told, GROUP), 1)
    assert counts.max(axis=1).sum() > 0.97 * N
    assert (counts.max(axis=0) > 0.9 * np.bincount(GROUP)).all()


def test_words_that_fit_no_image_have_no_edges(store: Store):
    images = collection(store, "images", spread=0.6, standing=0)
    texts = collection(store, "texts", spread=0.6, standing=0)
    with ShardGroup(1) as index:
        neighbors = [
            find_neighbors(store, FindNeighborsConfig(), index, rows, seed=0, title="")
            for rows in (images, texts)
        ]

    def facts(config: CutGraphConfig) -> dict[str, Any]:
        return cut_graph(store, config, images, texts, *neighbors, nouns(store), n_clusters=K).facts

    assert facts(CutGraphConfig())["text_weight"] == 0
    assert facts(CutGraphConfig(text_edges="all"))["text_weight"] == 1
    assert facts(CutGraphConfig(text_edges="none"))["text_weight"] == 0
    by_words = CutGraphConfig(edge_weight="overlap")
    assert facts(by_words)["eigenvalue"] != facts(CutGraphConfig())["eigenvalue"]


def test_every_part_is_in_a_sample(store: Store):
    def write(writer: ArtifactWriter) -> None:
        for rows in (1000, 1000, 1):
            writer.add_part(pa.table({"image_id": np.arange(rows)}))

    images = store.run_stage("images", version=1, options={}, inputs=[], write=write)
    assert sample_rows(store, images, n_rows=100, seed=0, title="").part_rows == [50, 49, 1]
    with pytest.raises(ValueError, match=r"n_rows=2 should be >= n_parts=3.*--max-graph-rows"):
        sample_rows(store, images, n_rows=2, seed=0, title="image")
