"""What is said of each K without labels, and which one is suggested."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.benchmark.choose_k import Judgment, judge, markdown, suggestion


@pytest.fixture
def images(tmp_path: Any, silent_progress: Any) -> Artifact:
    """Three groups of twenty rows each, in order."""
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(8)[:3], 20, axis=0) + rng.normal(0, 0.05, (60, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)

    def write(writer: ArtifactWriter) -> None:
        for part in np.split(rows, [25, 50]):
            writer.add_part(pa.table({"embedding": matrix_column(part)}))

    store = Store(str(tmp_path), silent_progress)
    return store.run_stage("rows", version=1, options={}, inputs=[], write=write)


def test_groups_that_every_seed_finds_are_preferred(images: Artifact):
    group = np.repeat([0, 1, 2], 20).astype(np.int32)
    true = judge(3, [group, (group + 1) % 3], images)
    assert true.agreement == pytest.approx(1)
    assert true.silhouette > 0.9
    assert true.entropy == pytest.approx(1)
    assert true.n_empty == 0
    halves = [np.where(np.arange(60) % 2 == i, group + 3, group).astype(np.int32) for i in (0, 1)]
    rng = np.random.default_rng(0)
    six = judge(6, [halves[0], (group + 3 * rng.integers(2, size=60)).astype(np.int32)], images)
    assert six.agreement is not None
    assert six.agreement < 0.8
    assert six.silhouette < 0.2
    assert suggestion([six, true]).startswith("take --n-clusters 3: other seeds find")


def judgment(n_clusters: int, agreement: float | None, **others: float) -> Judgment:
    values: dict[str, float] = {"silhouette": 0.1, "entropy": 0.9, "n_empty": 0, **others}
    return Judgment(n_clusters=n_clusters, agreement=agreement, **values)


def test_a_suggestion_says_why():
    found = [judgment(10, 0.7), judgment(20, 0.9), judgment(30, 0.95, entropy=0.2)]
    assert suggestion(found) == (
        "take --n-clusters 20: other seeds find its clusters again best: they agree by 0.900 "
        "(0.700 for 10); 1 collapsed and stay out"
    )
    one_seed = [judgment(10, None, silhouette=0.3), judgment(20, None)]
    assert suggestion(one_seed) == (
        "take --n-clusters 10: its silhouette, 0.300, is the highest (0.100 for 20)"
    )
    assert "| 20 |  | 0.100 | 0.900 | 0 |" in markdown(one_seed)
