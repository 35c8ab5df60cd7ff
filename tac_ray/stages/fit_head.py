"""An image head that tells the clusters of a graph, for images that were not in it."""

import json
from typing import NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional

from tac_ray.algorithm.head import ClusterHead
from tac_ray.algorithm.sampling import epoch_rows
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.cluster import Cluster
from tac_ray.config import FitHeadConfig
from tac_ray.stages.alone import run_alone

FEWEST_STEPS = 150
"""Steps that a fit has at least, by more epochs: the running statistics of the batch norm, which
the head tells clusters by, lag some tens of steps behind."""
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.99)
"""Adam's, as of the heads that are trained against each other."""


def fit_head(
    store: Store,
    config: FitHeadConfig,
    images: Artifact,
    clusters: Artifact,
    *,
    n_clusters: int,
    seed: int,
    n_gpus: int | None = None,
) -> Artifact:
    """Fit a head to clusters by cross-entropy, in a few epochs.

    Args:
        store: where artifacts lie.
        config: epochs and batch.
        images: artifact of embed_images, or a sample of its rows.
        clusters: artifact of cut_graph over `images`.
        n_clusters: K.
        seed: of the weights and the order of rows.
        n_gpus: GPUs that the cluster may grow to; default those it has.

    Returns:
        `head.safetensors`; `head.json` (width, K); `metrics.jsonl`, of every epoch: loss and the
        share of rows to which the head gave their cluster.

    Cost: 6 n d (d + K) operations an epoch, on one worker that holds 8 n d bytes.
    """
    batch_size = min(config.head_batch_size, images.n_rows)
    epochs = max(config.head_epochs, -(-FEWEST_STEPS // (images.n_rows // batch_size)))

    def write(writer: ArtifactWriter) -> None:
        writer.start(epochs, "epochs")
        told = images, clusters, n_clusters, epochs, batch_size, seed
        num_gpus = 1 if Cluster.connected(n_gpus).n_gpus else 0
        found = run_alone(_fit, *told, num_gpus=num_gpus)
        writer.progress.advance(epochs)
        writer.add_file("head.safetensors", save_tensors(found.head))
        about = {"width": found.head["0.weight"].shape[1], "n_clusters": n_clusters}
        writer.add_file("head.json", json.dumps(about).encode())
        lines = "".join(json.dumps(line) + "\n" for line in found.metrics)
        writer.add_file("metrics.jsonl", lines.encode())
        writer.facts |= {"agreement": round(found.metrics[-1]["agreement"], 4)}
        writer.note_memory(found.memory_gb)

    return store.run_stage(
        "fit_head",
        version=1,
        options={
            "epochs": epochs,
            "batch_size": batch_size,
            "n_clusters": n_clusters,
            "seed": seed,
        },
        inputs=[images, clusters],
        write=write,
    )


def load_head(artifact: Artifact) -> ClusterHead:
    """The fitted head in evaluation mode, on the CPU."""
    about = json.loads(artifact.folder.read("head.json"))
    head = ClusterHead(about["width"], about["n_clusters"], generator=torch.Generator())
    head.load_state_dict(load_tensors(artifact.folder.read("head.safetensors")))
    return head.eval()


class _Fitted(NamedTuple):
    head: dict[str, Tensor]
    metrics: list[dict[str, float]]
    memory_gb: float


def _fit(
    images: Artifact, clusters: Artifact, n_clusters: int, epochs: int, batch_size: int, seed: int
) -> _Fitted:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In float64: training enlarges rounding, and that of float32 depends on the number of cores.
    embedding = torch.tensor(matrix(images.column("embedding"))).to(device).double()
    cluster_id = torch.tensor(clusters.column("cluster_id").to_numpy()).to(device).long()
    n, width = embedding.shape
    generator = torch.Generator().manual_seed(seed)
    head = ClusterHead(width, n_clusters, generator=generator).to(device).double()
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)
    metrics = []
    for epoch in range(epochs):
        loss, agreed = torch.zeros((), device=device), torch.zeros((), device=device)
        steps = epoch_rows(n, batch_size=batch_size, seed=seed, epoch=epoch).to(device)
        for rows in steps:
            probs = head(embedding[rows])
            tiny = torch.finfo(probs.dtype).tiny
            step_loss = functional.nll_loss(probs.clamp_min(tiny).log(), cluster_id[rows])
            optimizer.zero_grad()
            step_loss.backward()
            optimizer.step()
            loss += step_loss.detach()
            agreed += (probs.argmax(dim=1) == cluster_id[rows]).float().mean()
        means = {"loss": loss.item() / len(steps), "agreement": agreed.item() / len(steps)}
        metrics.append({"epoch": epoch + 1, **means})
    weights = {
        name: tensor.cpu().contiguous() for name, tensor in head.float().state_dict().items()
    }
    return _Fitted(weights, metrics, own_memory_gb())
