"""Which images there are, where their bytes lie and, where the place says so, their labels."""

import posixpath
import uuid
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import IMAGES
from tac_ray.artifacts.storage import Folder, absolute, is_local
from tac_ray.artifacts.store import ArtifactWriter, Store, hash_of
from tac_ray.sources.keys import Bucket
from tac_ray.sources.listing import (
    IMAGE_EXTENSIONS,
    MAX_LABELS,
    NPY,
    PARQUET,
    TAR,
    TEXT,
    Container,
    Piece,
    Place,
    list_folder,
    list_keys,
    list_rows,
    list_tar,
    list_uris,
    list_vectors,
    look_at,
)
from tac_ray.sources.tables import columns_in, vectors_in
from tac_ray.stages.parts import map_parts

PART_ROWS = 65_536
MOST_LISTERS = 16
"""Tasks that list a bucket together; each has 16 calls in flight."""
Labels = Literal["auto", "folder", "none"]


def list_images(store: Store, images: str, *, labels: Labels) -> Artifact:
    """List a place, anew in every run since it may have grown.

    Args:
        store: where artifacts lie.
        images: a folder or prefix of images, of tar shards (WebDataset), of Parquet tables with a
            column of uris, of image bytes or of embeddings, or of .npy parts of embeddings; or one
            such file, or a text file with a uri a line.
        labels: where labels come from. auto: what tars and tables say, else class folders.

    Returns:
        Images in the order of their uris, members of a tar and rows of a table in the order they
        have there, lists in their own. Its fingerprint is that of the content, so an unchanged
        place gives the same artifact. Where embeddings were found, the fact `vectors` names them.

    Raises:
        FileNotFoundError: no such place.
        ValueError: no image in it, or `labels="folder"` and an image outside of any folder.

    Cost: N / 1,000 calls on S3, up to 256 in flight; a stat a file on disk; one pass over tars;
    the columns of uris and labels of tables. Memory: 16 runs of 16,384 rows a task, nothing on the
    driver but the names of files.
    """
    staging = Folder(Folder(store.path).join(f"listing-{uuid.uuid4().hex[:8]}"))
    root = absolute(images)
    try:
        place, vectors = _find_images(staging, root)
        column = _label_column(place.pieces, labels, root)
        cuts = list(_cut(place.pieces))
        hashes = list(map_parts(_hash_part, ((staging, *cut, column) for cut in cuts)))

        def write(writer: ArtifactWriter) -> None:
            tasks = ((writer.folder, staging, i, *cut, column) for i, cut in enumerate(cuts))
            writer.parts += map_parts(_write_part, tasks)
            writer.facts["n_other_files"] = sum(place.others.values())
            named = [getattr(piece, f"{column}s") for piece in place.pieces] if column else []
            writer.facts["labels"] = sorted(frozenset().union(*named))
            if vectors:
                writer.facts["vectors"] = vectors

        return store.run_stage(
            "list_images", version=2, options={}, inputs=[*hashes, hash_of(vectors)], write=write
        )
    finally:
        staging.remove()


def check_place(images: str) -> None:
    """Refuse a local place that is not there, before anything is started.

    Raises:
        FileNotFoundError: no such folder or file.
    """
    root = absolute(images)
    if is_local(root):
        try:
            look_at(root)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no folder or file {root}; check --images") from error


def _find_images(staging: Folder, root: str) -> tuple[Place, list[dict[str, Any]]]:
    """The rows of a place, and the files of embeddings if that is what it holds."""
    if posixpath.splitext(root)[1].lower() in (TAR, PARQUET, NPY, TEXT):
        try:
            place = Place(containers=[ray.get(ray.remote(num_cpus=0.5)(look_at).remote(root))])
        except RayTaskError as error:
            raise FileNotFoundError(f"no file {root}; check --images") from error
    else:
        place = Place()
        for found in _search(staging, root):
            place.add(found)
        place.pieces.sort(key=lambda piece: piece.first)
        place.containers.sort()
    kinds: dict[str, list[Container]] = {}
    for container in place.containers:
        kinds.setdefault(posixpath.splitext(container.uri)[1].lower(), []).append(container)
    tars, tables, parts = kinds.get(TAR, []), kinds.get(PARQUET, []), kinds.get(NPY, [])
    vectors: list[dict[str, Any]] = []
    more: Iterator[Place] = iter(())
    if place.pieces or tars:
        more = map_parts(list_tar, ((staging, tar) for tar in tars))
        place.others.update({PARQUET: len(tables), NPY: len(parts)})
    elif TEXT in kinds:
        more = map_parts(list_uris, [(staging, kinds[TEXT][0])])
    elif parts or tables:
        columns = (
            None if parts else ray.get(ray.remote(num_cpus=0.5)(columns_in).remote(tables[0].uri))
        )
        if columns is None or columns.vector:
            sources = parts or tables
            metadata = _beside(parts, tables) if parts else [None] * len(tables)
            found = map_parts(vectors_in, ((source.uri,) for source in sources))
            vectors = [{"uri": v.uri, "n": v.n, "d": v.d} for v in found]
            tasks = ((staging, s, m) for s, m in zip(sources, metadata, strict=True))
            more = map_parts(list_vectors, tasks)
        elif columns.image:
            more = map_parts(list_rows, ((staging, table) for table in tables))
        elif columns.uri:
            more = map_parts(list_uris, ((staging, table) for table in tables))
        else:
            raise ValueError(
                f"{tables[0].uri} has no column of uris, of image bytes or of embeddings; name a "
                "text column `uri`"
            )
    for i, found in enumerate(more):
        n = sum(piece.rows for piece in found.pieces)
        if vectors and n != vectors[i]["n"]:
            raise ValueError(
                f"{vectors[i]['uri']} holds {vectors[i]['n']:,} embeddings and its metadata {n:,} "
                "rows; they should be as many"
            )
        place.add(found)
    if not place.pieces:
        _refuse_empty(place, root)
    return place, vectors


def _search(staging: Folder, root: str) -> Iterator[Place]:
    """List a folder in one task, and a bucket in as many as there are cores."""
    if not root.startswith("s3://"):
        return map_parts(list_folder, [(staging, root)])
    n_tasks = min(MOST_LISTERS, int(ray.cluster_resources().get("CPU", 1)))
    ranges = Bucket.at(root).ranges(n_tasks)
    return map_parts(list_keys, ((staging, root, keys) for keys in ranges))


def _beside(parts: list[Container], tables: list[Container]) -> list[Any]:
    """The metadata of each .npy part: as many Parquet files, in the same order, or none."""
    if tables and len(tables) != len(parts):
        raise ValueError(
            f"{len(parts)} .npy parts and {len(tables)} Parquet files of metadata; there should be "
            "one for each, or none"
        )
    return list(tables) or [None] * len(parts)


def _refuse_empty(place: Place, root: str) -> None:
    if not place.others:
        raise ValueError(f"{root} holds no files; --images needs a folder or prefix of images")
    kinds = sorted(place.others.items(), key=lambda kind: -kind[1])[:3]
    most = ", ".join(suffix or "no suffix" for suffix, _ in kinds)
    raise ValueError(
        f"{root} holds {sum(place.others.values())} files ({most}) and no image; images end in "
        f"{', '.join(sorted(IMAGE_EXTENSIONS))}, shards in {TAR}, tables in {PARQUET} or {NPY}"
    )


def _label_column(pieces: list[Piece], labels: Labels, root: str) -> str | None:
    """The column that holds the labels: what the source says, the class folders, or none."""
    n = sum(piece.rows for piece in pieces)
    if labels == "none":
        return None
    if labels == "folder":
        outside = n - sum(piece.n_in_folder for piece in pieces)
        if outside:
            raise ValueError(
                f"{outside} of {n} images lie in {root} itself, outside of any class "
                "folder; move them or use --labels none"
            )
        return "folder"
    said: frozenset[str] = frozenset().union(*(piece.labels for piece in pieces))
    # Texts that hardly ever repeat are captions.
    if sum(p.n_labeled for p in pieces) == n and 1 < len(said) <= min(MAX_LABELS, n // 2):
        return "label"
    folders: frozenset[str] = frozenset().union(*(piece.folders for piece in pieces))
    one_deep = all(p.n_in_folder == p.rows and p.n_deeper == 0 for p in pieces)
    return "folder" if one_deep and 1 < len(folders) <= MAX_LABELS else None


def _cut(pieces: list[Piece]) -> Iterator[tuple[list[str], int, int, int]]:
    """Equal parts: the files that hold one's rows, rows to skip in the first, rows, first id."""
    ends = list(accumulate(piece.rows for piece in pieces))
    first = 0
    for start in range(0, ends[-1], PART_ROWS):
        stop = min(start + PART_ROWS, ends[-1])
        while ends[first] <= start:
            first += 1
        last = first
        while ends[last] < stop:
            last += 1
        names = [piece.name for piece in pieces[first : last + 1]]
        yield names, start - (ends[first] - pieces[first].rows), stop - start, start


def _part(
    staging: Folder, names: list[str], skip: int, rows: int, start: int, label: str | None
) -> pa.Table:
    table = pa.concat_tables(staging.read_table(name) for name in names).slice(skip, rows)
    labels = table[label] if label else pa.nulls(rows, pa.string())
    table = table.set_column(table.schema.get_field_index("label"), "label", labels)
    ids = pa.array(range(start, start + rows), pa.int64())
    return table.append_column("image_id", ids).select(IMAGES.names).cast(IMAGES)


def _hash_part(staging: Folder, *cut: Any) -> str:
    return hash_of(_part(staging, *cut).to_pydict())


def _write_part(folder: Folder, staging: Folder, index: int, *cut: Any) -> Part:
    return write_part(folder, index, _part(staging, *cut))
