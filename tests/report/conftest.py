"""A finished run made by hand: real images and artifacts, no encoder and no training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tac_ray.artifacts.run import Run
from tac_ray.artifacts.schemas import CLUSTER_NAMES, CLUSTERS, FAILURES, IMAGES
from tac_ray.artifacts.storage import Folder, table_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import best
from tac_ray.report.pictures import report
from tac_ray.stages.evaluate import evaluate, read_scores

RunFactory = Callable[..., Run]


def write_pictures(folder: Path, names: list[str], seed: int = 0) -> list[str]:
    """Small pictures of one color each; their paths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        color = tuple(int(c) for c in rng.integers(40, 216, 3))
        Image.new("RGB", (48, 40), color).save(folder / name, "JPEG")
    return [str(folder / name) for name in names]


@pytest.fixture
def make_run(ray_cluster: None, tmp_path: Path, silent_progress: Any) -> RunFactory:
    """Makes a run over `uris`, assigned at random from a seed."""

    def make(
        uris: list[str],
        names: list[str],
        *,
        labels: list[str] | None = None,
        failures: list[dict[str, Any]] | None = None,
        nouns: list[str] | None = None,
        images: str = "photos",
        seed: int = 0,
    ) -> Run:
        store, rng = (
            Store(str(tmp_path / "artifacts"), silent_progress),
            np.random.default_rng(seed),
        )
        n, k = len(uris), len(names)
        cluster = np.concatenate([np.arange(k), rng.integers(0, k, n - k)]).astype(np.int32)
        probability = rng.uniform(0.5, 1, n).astype(np.float32)
        assigned = pa.table(
            [
                pa.array(np.arange(n)),
                pa.array(uris),
                pa.nulls(n, pa.string()),
                pa.array(cluster),
                pa.array(probability),
                pa.array((cluster + 1) % k),
                pa.array(1 - probability),
                pa.array([names[c] for c in cluster]),
            ],
            schema=CLUSTERS,
        )
        sizes = np.bincount(cluster, minlength=k)
        means = np.bincount(cluster, probability, k) / sizes
        columns = [np.arange(k), names, [nouns or ["thing"]] * k, sizes, means]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, CLUSTER_NAMES, strict=True)]
        names_file = table_bytes(pa.table(arrays, schema=CLUSTER_NAMES))
        listed = [range(n), uris, *[[None] * n] * 4, labels or [None] * n]
        listing = pa.table(
            [pa.array(c, f.type) for c, f in zip(listed, IMAGES, strict=True)], schema=IMAGES
        )

        def write_listing(writer: ArtifactWriter) -> None:
            writer.add_part(listing)
            writer.facts["labels"] = sorted(set(labels or []))

        def write_images(writer: ArtifactWriter) -> None:
            writer.add_part(pa.table({"image_id": np.arange(n)}))
            failed = pa.Table.from_pylist(failures or [], schema=FAILURES)
            writer.add_file("failures.parquet", table_bytes(failed))

        def write_assignment(writer: ArtifactWriter) -> None:
            for start in range(0, n, 30_000):
                writer.add_part(assigned.slice(start, 30_000))
            writer.add_file("names.parquet", names_file)

        made = {
            stage: store.run_stage(stage, version=1, options={}, inputs=[], write=write)
            for stage, write in (
                ("list_images", write_listing),
                ("embed_images", write_images),
                ("assign_clusters", write_assignment),
            )
        }
        assignment = made["assign_clusters:tac"] = made.pop("assign_clusters")
        made["report"] = report(store, assignment, made["list_images"])
        scores = {}
        if labels:
            made["evaluate"] = evaluate(
                store,
                {"all": (made["list_images"], {"tac": assignment})},
                n_clusters=k,
                protocol={"tac": "heads"},
                seed=0,
            )
            scores = read_scores(made["evaluate"])
        config = best(
            images=images, n_clusters=k, out=str(tmp_path / "run"), methods=("kmeans", "tac")
        )
        run = Run(
            out=config.out,
            config=dataclasses.asdict(config),
            question={},
            artifacts={step: artifact.folder.path for step, artifact in made.items()},
            seconds=dict.fromkeys(made, 1.5),
            scores=scores,
            finished=True,
        )
        Folder(run.out).write("names.parquet", names_file)
        run.write()
        return run

    return make
