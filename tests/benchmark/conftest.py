"""Measurements that nobody had to make."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tac_ray.artifacts.manifest import Artifact, Manifest
from tac_ray.artifacts.storage import Folder
from tac_ray.benchmark.datasets import Dataset
from tac_ray.benchmark.measure import Measurement
from tac_ray.benchmark.rows import Case, Row
from tac_ray.config import EncoderConfig, reference

MeasurementFactory = Callable[..., Measurement]


@pytest.fixture
def case() -> Case:
    data = Dataset(name="DTD", train="/dtd", test="/test", n_clusters=47, class_names={"a": "a"})
    return Case(dataset=data, encoder=EncoderConfig())


@pytest.fixture
def measured(case: Case) -> MeasurementFactory:
    """Makes a measurement of a title, a seed and an accuracy; NMI and ARI follow it."""
    config = reference(images="", n_clusters=2, out="/out")

    def make(title: str, seed: int, acc: float | None, **changes: Any) -> Measurement:
        facts = {} if acc is None else {"acc": acc, "nmi": acc / 2, "ari": acc / 4}
        manifest = Manifest(
            stage="score_clusters",
            version=1,
            fingerprint="",
            options={},
            inputs=[],
            parts=[],
            facts=facts,
            seconds=0,
            peak_memory_gb=0,
            versions={},
        )
        nothing = Artifact(Folder("/nowhere"), manifest)
        row = Row(title=title, method="tac", config=config, n_clusters=47)
        of_row = {f.name for f in dataclasses.fields(Row)}
        row = dataclasses.replace(row, **{n: v for n, v in changes.items() if n in of_row})
        rest = {name: value for name, value in changes.items() if name not in of_row}
        values: dict[str, Any] = {"split": "test", "protocol": "fitted on train", "case": case}
        return Measurement(
            row=row, seed=seed, images=nothing, scored=nothing, seconds=seed, **{**values, **rest}
        )

    return make
