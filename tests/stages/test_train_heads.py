"""Where the rows of a training lie."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import TrainHeadsConfig
from tac_ray.stages.train_heads import (
    HeadTraining,
    check_batch,
    load_rows,
    room_bytes,
    train_heads_together,
)

N, WIDTH, N_NEIGHBORS = 90, 8, 4
N_BYTES = N * (2 * 2 * WIDTH + 2 * 4 * N_NEIGHBORS)
CPU = torch.device("cpu")


@pytest.fixture
def training(tmp_path: Any, silent_progress: Any) -> HeadTraining:
    rng = np.random.default_rng(0)
    columns = {
        "images": ("embedding", rng.standard_normal((N, WIDTH)).astype(np.float16)),
        "counterparts": ("embedding", rng.standard_normal((N, WIDTH)).astype(np.float16)),
        "image_neighbors": ("neighbor_row", rng.integers(N, size=(N, N_NEIGHBORS))),
        "text_neighbors": ("neighbor_row", rng.integers(N, size=(N, N_NEIGHBORS))),
    }

    def artifact(stage: str, name: str, rows: np.ndarray) -> Any:
        def write(writer: ArtifactWriter) -> None:
            for part in np.split(rows, [40, 70]):
                writer.add_part(pa.table({name: matrix_column(part)}), plain=True)

        store = Store(str(tmp_path), silent_progress)
        return store.run_stage(stage, version=1, options={}, inputs=[], write=write)

    made = {stage: artifact(stage, *column) for stage, column in columns.items()}
    return HeadTraining(config=TrainHeadsConfig(), n_clusters=3, seed=0, **made)


def test_rows_that_fit_lie_in_memory_and_others_in_files(training: HeadTraining):
    held, mapped = load_rows(training, CPU, N_BYTES), load_rows(training, CPU, N_BYTES - 1)
    for name, column in vars(held).items():
        assert torch.equal(column, getattr(mapped, name))
        assert column.untyped_storage().filename is None
        assert getattr(mapped, name).untyped_storage().filename is not None
    assert held.images.dtype == held.texts.dtype == torch.float16
    assert held.image_neighbors.dtype == held.text_neighbors.dtype == torch.int32
    assert held.images.shape == (N, WIDTH)
    assert not torch.equal(held.images, held.texts)


def test_workers_of_one_machine_share_its_memory():
    assert room_bytes(CPU, 4) == pytest.approx(room_bytes(CPU, 1) / 4, rel=0.2)


def test_a_batch_that_cannot_be_is_refused():
    config = TrainHeadsConfig(batch_size=64, batch_over_n="refuse")
    with pytest.raises(ValueError, match="batch_size=64 should be <= n_images=50"):
        check_batch(config, 50)
    with pytest.raises(ValueError, match=r"batch_size=6 should be >= 2 x n_workers=4"):
        check_batch(TrainHeadsConfig(batch_size=6, n_workers=4), 50)


def test_what_the_heads_depend_on_knows_neither_workers_nor_checkpoints(training: HeadTraining):
    def options(**changes: Any) -> dict[str, Any]:
        config = dataclasses.replace(training.config, **changes)
        return dataclasses.replace(training, config=config).options

    assert options(n_workers=4, checkpoint_every=1, batch_over_n="refuse") == options()
    assert options(balance_weight=1.0) != options()


def test_later_options_leave_the_heads_of_before_alone(training: HeadTraining):
    assert set(training.options) == {
        "epochs",
        "batch_size",
        "distillation_temperature",
        "balance_weight",
        "learning_rate",
        "beta1",
        "beta2",
        "distillation_form",
        "confidence_form",
        "products",
        "stable_below",
        "n_clusters",
        "seed",
    }
    config = dataclasses.replace(training.config, confidence_weight=0.0)
    assert dataclasses.replace(training, config=config).options["confidence_weight"] == 0


def test_a_baseline_depends_on_what_it_sees(training: HeadTraining):
    scan = dataclasses.replace(training, objective="scan")
    assert scan.inputs == [training.images, training.image_neighbors]
    assert scan.options["objective"] == "scan"
    assert "distillation_temperature" not in scan.options
    unseen = dataclasses.replace(scan, counterparts=None, text_neighbors=None)
    assert load_rows(unseen, CPU, N_BYTES).texts is None


def test_heads_trained_together_share_their_workers(training: HeadTraining, silent_progress: Any):
    fewer = dataclasses.replace(training, config=TrainHeadsConfig(n_workers=2))
    more = dataclasses.replace(training, config=TrainHeadsConfig(n_workers=3))
    with pytest.raises(ValueError, match=r"n_workers=2, 3 should be the same .*one --n-workers"):
        train_heads_together(Store("", silent_progress), [fewer, more], n_gpus=1)
