"""New ids for the clusters of a run, by those of an earlier run over some of the same images."""

import dataclasses
import json
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tac_ray.algorithm.matching import Matching, match
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.stages.parts import map_parts

MATCHING_FILE = "matching.json"


def match_clusters(store: Store, assignment: Artifact, earlier: Artifact) -> Artifact:
    """Find the clusters of an earlier run again.

    Args:
        store: where artifacts lie.
        assignment: artifact of assign_clusters of this run.
        earlier: the same of the earlier run; images are the same if uri and member are.

    Returns:
        `matching.json`: `Matching`, and the earlier names of the clusters that are kept.

    Raises:
        ValueError: the runs have no image in common, or the earlier one has more clusters.

    Cost: peak memory of the driver 36 bytes an image of either run.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(len(assignment.manifest.parts) + len(earlier.manifest.parts), "parts")
        (later_key, later), (earlier_key, before) = (
            _clusters(writer, artifact) for artifact in (assignment, earlier)
        )
        _, i, j = np.intersect1d(later_key, earlier_key, return_indices=True)
        if not len(i):
            raise ValueError(
                "the run to match has no image in common with this one; give --match-run a run "
                "over the same folder or bucket"
            )
        names = earlier.folder.read_table("names.parquet").to_pylist()
        shared = np.zeros((_n_clusters(assignment), len(names)), dtype=np.int64)
        np.add.at(shared, (later[i], before[j]), 1)
        matching = match(shared)
        kept = {
            str(id): {key: names[id][key] for key in ("name", "runners_up")} for id in matching.kept
        }
        about: dict[str, Any] = {
            **dataclasses.asdict(matching),
            "new_id": matching.new_id.tolist(),
            "n_images": len(i),
            "names": kept,
        }
        writer.add_file(MATCHING_FILE, json.dumps(about, indent=1).encode())
        writer.progress.say(_in_words(matching, len(i)))

    return store.run_stage(
        "match_clusters", version=1, options={}, inputs=[assignment, earlier], write=write
    )


def read_matching(artifact: Artifact) -> dict[str, Any]:
    """What `match_clusters` wrote."""
    return json.loads(artifact.folder.read(MATCHING_FILE))  # type: ignore[no-any-return]


def _n_clusters(assignment: Artifact) -> int:
    return assignment.folder.read_table("names.parquet").num_rows


def _clusters(
    writer: ArtifactWriter, assignment: Artifact
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """A key and the cluster of every image."""
    found = []
    parts = ((assignment.folder, part.name) for part in assignment.manifest.parts)
    for part in map_parts(_clusters_of_part, parts):
        found.append(part)
        writer.progress.advance()
    key, cluster = (np.concatenate(column) for column in zip(*found, strict=True))
    return key, cluster


def _clusters_of_part(folder: Folder, name: str) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    table = folder.read_table(name, ["uri", "member", "cluster_id"])
    places = zip(table["uri"].to_pylist(), table["member"].to_pylist(), strict=True)
    hashes = (blake2b(f"{uri}\n{member}".encode(), digest_size=8) for uri, member in places)
    key = np.frombuffer(b"".join(found.digest() for found in hashes), dtype=np.uint64)
    return key, table["cluster_id"].to_numpy()


def _in_words(matching: Matching, n_images: int) -> str:
    def ids(clusters: list[int]) -> str:
        return f"{len(clusters)} ({', '.join(map(str, clusters))})" if clusters else "none"

    lines = [
        f"matched by {n_images:,} images: {len(matching.kept)} clusters keep their id and name, "
        f"new: {ids(matching.new)}, gone: {ids(matching.gone)}"
    ]
    lines += [f"cluster {old} was split into {ids(into)}" for old, into in matching.split.items()]
    lines += [f"cluster {id} is merged of {ids(old)}" for id, old in matching.merged.items()]
    return "\n".join(lines)
