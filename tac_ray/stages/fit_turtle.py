"""Clusters that linear maps tell apart in images and in words at once (TURTLE)."""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tac_ray.algorithm.turtle import LinearHead, fit_linear_heads, mean_probs
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.stages.alone import run_alone

SPACES = ("text", "image")
"""In the order of [t~, v]."""


def fit_turtle(
    store: Store, images: Artifact, counterparts: Artifact, *, n_clusters: int, seed: int
) -> Artifact:
    """Fit a linear head on images and one on their text counterparts that agree.

    Args:
        store: where artifacts lie.
        images: artifact of embed_images, or a sample of its rows.
        counterparts: artifact of build_counterparts, or the same sample of it.
        n_clusters: K.
        seed: of the weights and the batches.

    Returns:
        `turtle.safetensors`, `turtle.json` (width, K).

    Cost: see `fit_linear_heads`, on one worker that holds 4 n d bytes.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(1, "fits")
        found = run_alone(_fit, images, counterparts, n_clusters, seed)
        writer.progress.advance()
        writer.add_file("turtle.safetensors", save_tensors(found.weights))
        about = {"width": len(found.weights["image.mean"]), "n_clusters": n_clusters}
        writer.add_file("turtle.json", json.dumps(about).encode())
        writer.note_memory(found.memory_gb)

    return store.run_stage(
        "fit_turtle",
        version=1,
        options={"n_clusters": n_clusters, "seed": seed},
        inputs=[images, counterparts],
        write=write,
    )


def load_turtle(artifact: Artifact) -> Callable[[Tensor], Tensor]:
    """What gives cluster_probs (n, K) to rows of [t~, v], (n, 2 d)."""
    about = json.loads(artifact.folder.read("turtle.json"))
    weights = load_tensors(artifact.folder.read("turtle.safetensors"))
    heads = []
    for space in SPACES:
        mean = torch.zeros(about["width"])
        head = LinearHead(mean, about["n_clusters"], generator=torch.Generator())
        of = {name: t for name, t in weights.items() if name.startswith(f"{space}.")}
        head.load_state_dict({name.removeprefix(f"{space}."): t for name, t in of.items()})
        heads.append(head)
    return lambda rows: mean_probs(heads, rows.chunk(len(SPACES), dim=1))


class _Fitted(NamedTuple):
    weights: dict[str, Tensor]
    memory_gb: float


def _fit(images: Artifact, counterparts: Artifact, n_clusters: int, seed: int) -> _Fitted:
    spaces = [torch.tensor(matrix(a.column("embedding"))) for a in (counterparts, images)]
    heads = fit_linear_heads(spaces, n_clusters, seed=seed)
    weights = {
        f"{space}.{name}": tensor.contiguous()
        for space, head in zip(SPACES, heads, strict=True)
        for name, tensor in head.state_dict().items()
    }
    return _Fitted(weights, own_memory_gb())
