"""How well clusters agree with labels: ACC, NMI, ARI on each split."""

import json
from typing import Any

import numpy as np

from tac_ray.algorithm.metrics import contingency, match_clusters, scores
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.store import ArtifactWriter, Store

Assignments = dict[str, Artifact]


def evaluate(
    store: Store,
    splits: dict[str, tuple[Artifact, Assignments]],
    *,
    n_clusters: int,
    protocol: dict[str, str],
    seed: int,
) -> Artifact:
    """Compare assignments with the labels of their listing.

    Args:
        store: where artifacts lie.
        splits: name of a split -> its listing and its assignments by method.
        n_clusters: K.
        protocol: what each method was fitted on and is scored on, in words.
        seed: of the run, for the record.

    Returns:
        `metrics.json`: split -> method -> ACC, NMI, ARI, confusion (clusters x labels, counts),
        the labels, and the label matched to each cluster.

    Cost: one pass over the cluster ids; memory 5 bytes an image.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(sum(len(a) for _, a in splits.values()), "tables")
        found: dict[str, Any] = {}
        for split, (listing, assignments) in splits.items():
            names = listing.facts["labels"]
            label_id = np.searchsorted(names, listing.column("label").to_numpy())
            found[split] = {}
            for method, assignment in assignments.items():
                table = np.zeros((n_clusters, len(names)), dtype=np.int64)
                for rows in assignment.tables(["image_id", "cluster_id"]):
                    table += contingency(
                        rows["cluster_id"].to_numpy(),
                        label_id[rows["image_id"].to_numpy()],
                        n_clusters,
                        len(names),
                    )
                found[split][method] = {
                    **scores(table),
                    "protocol": protocol[method],
                    "labels": names,
                    "matched_label": match_clusters(table).tolist(),
                    "confusion": table.tolist(),
                }
                writer.progress.advance()
        document = {"seed": seed, "splits": found}
        writer.add_file("metrics.json", json.dumps(document, indent=1).encode())

    return store.run_stage(
        "evaluate",
        version=1,
        options={"n_clusters": n_clusters, "protocol": protocol, "seed": seed},
        inputs=[a for listing, of in splits.values() for a in (listing, *of.values())],
        write=write,
    )


def read_scores(evaluation: Artifact) -> dict[str, dict[str, dict[str, float]]]:
    """Split -> method -> ACC, NMI, ARI."""
    document = json.loads(evaluation.folder.read("metrics.json"))
    return {
        split: {
            method: {name: found[name] for name in ("acc", "nmi", "ari")}
            for method, found in methods.items()
        }
        for split, methods in document["splits"].items()
    }
