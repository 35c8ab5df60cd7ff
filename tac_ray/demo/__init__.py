"""The demo: pictures and an encoder small enough to ship, through the same pipeline as any run."""

import csv
import json
from pathlib import Path

import numpy as np

from tac_ray.artifacts.run import Run
from tac_ray.config import EmbedNounsConfig, EncoderConfig, TacConfig, best

_HERE = Path(__file__).parent
IMAGES = _HERE / "images"
ENCODER = _HERE / "encoder"


def demo_config(out: str) -> TacConfig:
    """The demo's run: its classes as the number of clusters, nouns for things one can see."""
    return best(
        images=str(IMAGES),
        n_clusters=sum(folder.is_dir() for folder in IMAGES.iterdir()),
        out=out,
        encoder=EncoderConfig(model=f"local-dir:{ENCODER}"),
        embed_nouns=EmbedNounsConfig(nouns="short"),
    )


def accuracy_by_glyph(run: Run) -> dict[str, dict[str, float]]:
    """Method -> ACC over pictures of glyphs the encoder saw in training, and of unseen ones.

    Clusters are matched to classes over all pictures.
    """
    with (_HERE / "glyphs.csv").open(encoding="utf-8") as file:
        seen = {row["code_point"]: row["seen"] == "true" for row in csv.DictReader(file)}
    splits = json.loads(run.artifact("evaluate").folder.read("metrics.json"))["splits"]
    accuracy = {}
    for method, found in splits["all"].items():
        clusters = run.artifact(f"assign_clusters:{method}").column
        paths = [Path(uri) for uri in clusters("uri").to_pylist()]
        matched = [found["labels"][label] for label in found["matched_label"]]
        right = np.array(
            [
                matched[cluster] == path.parent.name
                for cluster, path in zip(clusters("cluster_id").to_pylist(), paths, strict=True)
            ]
        )
        was_seen = np.array([seen[path.name.split("-")[0].upper()] for path in paths])
        accuracy[method] = {
            "seen": float(right[was_seen].mean()),
            "unseen": float(right[~was_seen].mean()),
        }
    return accuracy
