"""Any number of workers, with uneven shares of the rows, gives the same losses and gradients.

Four processes start once and play 1, 2 and 4 workers in turn; the twin is this process, which has
no process group.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tac_ray.algorithm.distributed import all_reduce_sums, n_workers
from tac_ray.algorithm.head import TacHeads
from tac_ray.algorithm.losses import TacLoss

WIDTH, K, N_ROWS, N_STEPS = 6, 4, 13, 2
WORKERS = (1, 2, 4)
LOSSES = {
    "published": TacLoss(temperature=0.5, balance_weight=5.0),
    "paper": TacLoss(
        temperature=0.5, balance_weight=5.0, distillation_form="paper", confidence_form="paper"
    ),
}
TOLERANCE = 1e-10
KINDS = (torch.float32, torch.float64)
Result = dict[str, Any]


def step_inputs(step: int) -> Tensor:
    """Anchors and neighbors of a step, (4, N_ROWS, WIDTH), different from row to row."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(4, N_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    # Rows drift, so that the statistics of a share are far from those of the whole.
    return rows + torch.arange(N_ROWS, dtype=torch.float64)[:, None] / 3


def train(form: str, rank: int, world: int) -> Result:
    """Some steps on this worker's rows: losses, gradients and the batch norms' buffers.

    Also the probabilities that the image head, in evaluation, gives the worker's rows.
    """
    heads = TacHeads(WIDTH, K, seed=0).double()
    share = torch.arange(N_ROWS).tensor_split(world)[rank]
    steps = []
    for step in range(N_STEPS):
        heads.zero_grad()
        image, text, *neighbors = step_inputs(step)[:, share]
        pairs = zip((image, text), neighbors, strict=True)
        terms = LOSSES[form](*heads(*(torch.stack(pair, dim=1) for pair in pairs)))
        terms["loss"].backward()
        gradients = {name: value.grad.clone() for name, value in heads.named_parameters()}
        steps.append({"terms": {n: t.detach() for n, t in terms.items()}, "gradients": gradients})
    heads.eval()
    with torch.no_grad():
        probs = heads.image(step_inputs(0)[0, share])
    return {"steps": steps, "probs": probs, "buffers": dict(heads.named_buffers())}


def fifty_steps(rank: int, world: int, kind: torch.dtype) -> Tensor:
    """What the image head says of all rows after fifty steps of training."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(2, 5, 16, generator=generator)
    rows = centers[:, torch.arange(500) % 5] + torch.randn(2, 500, 16, generator=generator)
    heads = TacHeads(16, 5, seed=0).to(kind)
    model: torch.nn.Module = heads
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(heads, broadcast_buffers=False)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3, fused=True)
    for step in range(50):
        picked = torch.randint(500, (64, 2), generator=generator)
        picked[:, 1] = (picked[:, 0] + 5 * (1 + step)) % 500
        images, texts = rows[:, picked.tensor_split(world)[rank]].to(kind)
        optimizer.zero_grad()
        LOSSES["published"](*model(images, texts))["loss"].backward()
        optimizer.step()
    return heads.eval().image(rows[0].to(kind)).detach()


def reduce_squares(rank: int) -> Result:
    """Sum over workers of the squares of (rank + 1, 2 rank + 2), weighted, and its gradient."""
    local = torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1)
    local.requires_grad_()
    total, count = all_reduce_sums(local.square(), torch.ones(1, 1, dtype=torch.float64))
    assert count.shape == (1, 1)
    (total * torch.tensor([1.0, 10.0]) * count).sum().backward()
    assert local.grad is not None
    return {"local": local.detach(), "total": total.detach(), "gradient": local.grad}


def work(rank: int, folder: str) -> None:
    """What each process does: for each number of workers, its part if it has one."""
    torch.set_num_threads(1)
    for world in WORKERS:
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        result = {form: train(form, rank, world) for form in LOSSES}
        result |= {"n_workers": n_workers(), "reduce": reduce_squares(rank)}
        result |= {"fifty": {kind: fifty_steps(rank, world, kind) for kind in KINDS}}
        torch.save(result, f"{folder}/result{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """Results by number of workers, then by rank."""
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        # Processes find this module under the name pytest gives it.
        patch.syspath_prepend(Path(__file__).parents[2])
        mp.get_context("forkserver").set_forkserver_preload(
            ["tac_ray.algorithm.head", "tac_ray.algorithm.losses"]
        )
        mp.start_processes(work, (str(folder),), nprocs=max(WORKERS), start_method="forkserver")
    return {
        world: [torch.load(folder / f"result{world}-{rank}.pt") for rank in range(world)]
        for world in WORKERS
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """What one process without a process group computes."""
    assert not dist.is_initialized()
    return {form: train(form, 0, 1) for form in LOSSES}


def test_one_process_without_a_group_is_one_worker():
    assert n_workers() == 1
    local = torch.tensor([1.0, 2.0])
    assert torch.equal(all_reduce_sums(local)[0], local)


def test_shares_are_uneven():
    for world in (2, 4):
        assert len({len(share) for share in torch.arange(N_ROWS).tensor_split(world)}) > 1


@pytest.mark.parametrize("world", WORKERS)
def test_all_reduce_adds_values_and_gradients_over_workers(
    workers: dict[int, list[Result]], world: int
):
    reduced = [result["reduce"] for result in workers[world]]
    total = sum(result["local"].square() for result in reduced)
    for result in reduced:
        torch.testing.assert_close(result["total"], total)
        # Every worker has the same sum, so the gradient counts once for each of them.
        once = 2 * result["local"] * torch.tensor([1.0, 10.0]) * world
        torch.testing.assert_close(result["gradient"], world * once)
    assert [result["n_workers"] for result in workers[world]] == [world] * world


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("world", WORKERS)
def test_every_worker_has_the_loss_of_one_process(
    workers: dict[int, list[Result]], alone: dict[str, Result], world: int, form: str
):
    for result in workers[world]:
        for step, expected in zip(result[form]["steps"], alone[form]["steps"], strict=True):
            assert set(step["terms"]) == {"loss", "distillation", "confidence", "balance"}
            torch.testing.assert_close(step["terms"], expected["terms"], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("world", WORKERS)
def test_mean_gradients_over_workers_are_those_of_one_process(
    workers: dict[int, list[Result]], alone: dict[str, Result], world: int, form: str
):
    for step, expected in enumerate(alone[form]["steps"]):
        largest = max(value.abs().max() for value in expected["gradients"].values())
        for name, gradient in expected["gradients"].items():
            ranks = [result[form]["steps"][step]["gradients"][name] for result in workers[world]]
            mean = torch.stack(ranks).mean(dim=0)
            # The bias before a batch norm has no gradient but rounding.
            scale = largest if name.endswith("0.bias") else gradient.abs().max()
            assert scale > 0
            assert (mean - gradient).abs().max() <= TOLERANCE * scale, name


@pytest.mark.parametrize("world", WORKERS)
def test_running_statistics_are_those_of_one_process(
    workers: dict[int, list[Result]], alone: dict[str, Result], world: int
):
    expected = alone["published"]["buffers"]
    assert {name for name in expected if "running" in name} == {
        f"{head}.1.running_{moment}" for head in ("image", "text") for moment in ("mean", "var")
    }
    assert expected["image.1.num_batches_tracked"] == 2 * N_STEPS
    for result in workers[world]:
        torch.testing.assert_close(
            result["published"]["buffers"], expected, rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize("world", WORKERS)
def test_in_evaluation_every_row_has_the_answer_of_one_process(
    workers: dict[int, list[Result]], alone: dict[str, Result], world: int
):
    probs = torch.cat([result["published"]["probs"] for result in workers[world]])
    torch.testing.assert_close(probs, alone["published"]["probs"], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("world", WORKERS)
def test_fifty_steps_are_the_same_training_run(workers: dict[int, list[Result]], world: int):
    assert not dist.is_initialized()
    for kind in KINDS:
        expected = fifty_steps(0, 1, kind)
        assert len(expected.argmax(dim=1).unique()) > 1
        for result in workers[world]:
            found = result["fifty"][kind]
            if kind == torch.float64:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
            else:
                assert (found - expected).abs().max() < 5e-3
                same = found.argmax(dim=1) == expected.argmax(dim=1)
                assert same.double().mean() >= 0.999
