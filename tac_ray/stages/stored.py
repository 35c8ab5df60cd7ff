"""What a store of embeddings holds of a listing, and its rows in the order of the listing.

Imports no torch, so that workers that only look things up start in a second.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray import ObjectRef

from tac_ray.artifacts.embeddings import IDENTITY, EmbeddingStore, Index, image_keys
from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.storage import Folder
from tac_ray.sources.reading import WHERE
from tac_ray.stages.parts import map_parts

LOOKUP_CPUS = 0.5


def extend_index(
    embeddings: EmbeddingStore, names: list[str], before: ObjectRef[Index]
) -> ObjectRef[Index]:
    """The index of a store with more files in it, in the cluster's memory."""
    return ray.remote(num_cpus=LOOKUP_CPUS)(Index.extended).remote(before, embeddings, names)


def count_stored(images: Artifact, index: ObjectRef[Index]) -> list[int]:
    """How many images of each part of the listing a store holds."""
    parts = ((images.folder, part.name, [index]) for part in images.manifest.parts)
    return list(map_parts(_count_stored_in, parts))


def read_lacking(
    batch: pa.Table, listing: Folder, index: list[ObjectRef[Index]]
) -> Iterator[pa.Table]:
    """The rows of parts of a listing whose embeddings a store does not hold.

    Args:
        batch: `part`, names of parts of `listing`.
        listing: folder of the artifact of list_images.
        index: of the store; in a list, so that Ray hands on the reference.

    Returns:
        Per part, `image_id` and what `read_images` needs.
    """
    found = ray.get(index[0])
    for name in batch["part"].to_pylist():
        listed = listing.read_table(name, ["image_id", *WHERE])
        yield listed.filter(pa.array(found.find(image_keys(listed)) < 0))


def seal_stored(
    folder: Folder,
    part_rows: int,
    images: Artifact,
    embeddings: EmbeddingStore,
    index: ObjectRef[Index],
) -> list[Part]:
    """The stored rows of a listing in its order, in equal parts of at most `part_rows`."""
    names = [part.name for part in images.manifest.parts]
    ends = np.array(list(accumulate(count_stored(images, index))))
    cuts = np.linspace(0, ends[-1], -(-int(ends[-1]) // part_rows) + 1).astype(int)
    tasks = []
    for number, (start, stop) in enumerate(pairwise(cuts.tolist())):
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        skip = start - (ends[first - 1] if first else 0)
        mine = names[first : last + 1]
        tasks.append((folder, number, images.folder, mine, skip, stop - start, embeddings, [index]))
    return list(map_parts(_seal_part, tasks))


def _count_stored_in(listing: Folder, name: str, index: list[ObjectRef[Index]]) -> int:
    return int((_stored(listing, name, ray.get(index[0]))[1] >= 0).sum())


def _stored(
    listing: Folder, name: str, index: Index
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image ids of a part of a listing, and where the index has each."""
    table = listing.read_table(name, ["image_id", *IDENTITY])
    return table["image_id"].to_numpy(), index.find(image_keys(table))


def _seal_part(
    folder: Folder,
    number: int,
    listing: Folder,
    names: list[str],
    skip: int,
    rows: int,
    embeddings: EmbeddingStore,
    index: list[ObjectRef[Index]],
) -> Part:
    found = ray.get(index[0])
    ids, positions = zip(*(_stored(listing, name, found) for name in names), strict=True)
    image_id, position = np.concatenate(ids), np.concatenate(positions)
    mine = np.flatnonzero(position >= 0)[skip : skip + rows]
    embedding = embeddings.read(found.places(position[mine]))
    table = pa.table({"image_id": image_id[mine], "embedding": matrix_column(embedding)})
    return write_part(folder, number, table, plain=True)
