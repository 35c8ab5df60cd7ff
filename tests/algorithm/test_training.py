"""Epochs: which rows a step sees, what is said of the clusters, and products in bf16."""

import math
from pathlib import Path

import pytest
import torch

from tac_ray.algorithm.head import TacHeads
from tac_ray.algorithm.losses import TacLoss
from tac_ray.algorithm.sampling import epoch_neighbors, epoch_rows
from tac_ray.algorithm.training import (
    ClusterSizes,
    TrainingRows,
    _RecordedStep,
    train_epoch,
    troubles,
)

N, WIDTH, N_NEIGHBORS, BATCH, K = 70, 32, 3, 16, 4
CPU = torch.device("cpu")


def training_rows() -> TrainingRows:
    """Rows in K groups, whose neighbors are of the group."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(2, K, WIDTH, generator=generator)
    group = torch.arange(N) % K
    noise = torch.randn(2, N, WIDTH, generator=generator) / 4
    images, texts = torch.nn.functional.normalize(centers[:, group] + noise, dim=2).half()
    mates = torch.stack([torch.roll(torch.arange(N), -K * (i + 1)) for i in range(N_NEIGHBORS)], 1)
    return TrainingRows(
        images=images,
        texts=texts,
        image_neighbors=mates.int(),
        text_neighbors=mates.flip(1).int(),
    )


def batches(rows: TrainingRows, *, rank=0, n_workers=1, epoch=0, device=CPU):
    return rows.batches(
        batch_size=BATCH, seed=5, epoch=epoch, rank=rank, n_workers=n_workers, device=device
    )


def train(
    products: torch.dtype, epochs: int = 6, device: torch.device = CPU
) -> tuple[TacHeads, list[dict[str, float]]]:
    heads = TacHeads(WIDTH, K, seed=0).to(device)
    there = {name: rows.to(device) for name, rows in vars(training_rows()).items()}
    rows = TrainingRows(**there)
    optimizer = torch.optim.Adam(
        heads.parameters(), lr=1e-2, fused=True, capturable=device.type == "cuda"
    )
    sizes = ClusterSizes(N, K, device)
    loss = TacLoss(temperature=0.5, balance_weight=5.0)
    metrics = []
    for epoch in range(epochs):
        steps = batches(rows, epoch=epoch, device=device)
        metrics.append(train_epoch(heads, optimizer, loss, steps, sizes, products=products))
    return heads.cpu(), metrics


def test_a_step_has_its_rows_and_the_drawn_neighbor_of_each():
    rows = training_rows()
    steps = epoch_rows(N, batch_size=BATCH, seed=5, epoch=2)
    draws = epoch_neighbors(N, N_NEIGHBORS, seed=5, epoch=2)
    found = list(batches(rows, epoch=2))
    assert len(found) == len(steps) == N // BATCH
    for batch, step in zip(found, steps, strict=True):
        assert torch.equal(batch.rows, step)
        assert batch.image.dtype == batch.text.dtype == torch.float32
        for seen, modality, neighbors, drawn in (
            (batch.image, rows.images, rows.image_neighbors, draws[0]),
            (batch.text, rows.texts, rows.text_neighbors, draws[1]),
        ):
            assert torch.equal(seen[:, 0], modality[step].float())
            mates = [int(neighbors[row, drawn[row]]) for row in step]
            assert torch.equal(seen[:, 1], modality[mates].float())


def test_workers_share_a_step():
    whole = list(batches(training_rows()))
    shares = [list(batches(training_rows(), rank=rank, n_workers=3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for mine, theirs in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(mine, torch.cat(theirs))


def test_rows_in_a_file_are_gathered_as_those_in_memory(tmp_path: Path):
    rows = training_rows()
    mapped = {}
    for name, column in vars(rows).items():
        path = tmp_path / name
        path.write_bytes(column.contiguous().numpy().tobytes())
        flat = torch.from_file(str(path), True, column.numel(), dtype=column.dtype)
        mapped[name] = flat.view(column.shape)
    for mine, theirs in zip(batches(rows), batches(TrainingRows(**mapped)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_training_finds_the_groups_and_says_how_it_went():
    heads, metrics = train(torch.float32)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[0]["changed"] == 1
    assert metrics[-1]["changed"] < 0.2
    assert metrics[-1]["n_empty"] == 0
    assert metrics[-1]["entropy"] == pytest.approx(math.log(K), abs=0.1)
    probs = heads.eval().image(training_rows().images.float())
    clusters = probs.argmax(dim=1)
    assert all(len(set(clusters[group::K].tolist())) == 1 for group in range(K))
    assert troubles(metrics, K) == []


def test_products_in_bf16_train_nearly_as_those_in_fp32():
    exact, exact_metrics = train(torch.float32)
    rounded, rounded_metrics = train(torch.bfloat16)
    images = training_rows().images.float()
    probs, others = exact.eval().image(images), rounded.eval().image(images)
    assert rounded_metrics[-1]["loss"] == pytest.approx(exact_metrics[-1]["loss"], rel=3e-2)
    assert torch.equal(probs.argmax(dim=1), others.argmax(dim=1))
    assert not torch.equal(probs, others)
    assert all(value.dtype == torch.float32 for value in rounded.parameters())


@pytest.mark.gpu
def test_a_recorded_step_trains_as_one_that_is_launched_anew(monkeypatch: pytest.MonkeyPatch):
    _, cpu_metrics = train(torch.float32, epochs=2)
    trained = {}
    for n_before in (1, 1000):
        monkeypatch.setattr(_RecordedStep, "N_BEFORE", n_before)
        trained[n_before] = train(torch.float32, epochs=2, device=torch.device("cuda"))
    (recorded, metrics), (launched, launched_metrics) = trained.values()
    assert metrics == [pytest.approx(line, rel=1e-4) for line in launched_metrics]
    losses = [line["loss"] for line in metrics]
    assert losses == pytest.approx([line["loss"] for line in cpu_metrics], rel=1e-3)
    for name, weights in recorded.state_dict().items():
        torch.testing.assert_close(weights, launched.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_cluster_sizes_tell_of_changes_and_of_empty_clusters():
    sizes = ClusterSizes(6, 3, CPU)
    one_hot = torch.eye(3)

    def epoch(rows: list[int], clusters: list[int]) -> dict[str, float]:
        sizes.see(torch.tensor(rows), one_hot[clusters])
        return sizes.end_epoch()

    first = epoch([0, 1, 2, 3], [0, 0, 1, 1])
    assert first == {"entropy": pytest.approx(math.log(2)), "n_empty": 1, "changed": 1.0}
    # Of rows 1, 2, 3 one has moved; 0 was not seen and keeps its cluster; 4 is new.
    second = epoch([1, 2, 3, 4], [0, 2, 1, 2])
    assert second["changed"] == pytest.approx(1 / 3)
    assert second["n_empty"] == 0
    assert sizes.cluster.tolist() == [0, 0, 2, 1, 2, -1]


def line(**figures: float) -> dict[str, float]:
    return {"loss": -1.0, "entropy": math.log(10), "n_empty": 0, **figures}


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"loss": -2.0}, []),
        ({"loss": -2.0, "n_empty": 1}, []),
        ({"loss": -2.0, "entropy": 0.4 * math.log(10)}, ["collapsed", "--balance-weight"]),
        ({"loss": -2.0, "n_empty": 3}, ["3 of 10 clusters are empty"]),
        ({"loss": -0.5}, ["did not improve", "--learning-rate"]),
    ],
)
def test_troubles_are_told_with_what_to_change(last: dict[str, float], words: list[str]):
    found = troubles([line(), line(**last)], 10)
    assert len(found) == (1 if words else 0)
    assert all(word in found[0] for word in words)
