"""The stage `report`: which pictures stand for a cluster, and sheets of them."""

import io
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tac_ray.artifacts.manifest import Artifact, Part, describe
from tac_ray.artifacts.schemas import PICTURES
from tac_ray.artifacts.storage import Folder, table_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.encoders.decode import decode_image
from tac_ray.sources.reading import WHERE, read_images
from tac_ray.stages.parts import map_parts

KINDS = ("most confident", "least confident", "nearest to the next cluster")
PER_KIND = 4
"""Pictures of each kind; a sheet has a row for each kind."""
SIDE = 128
"""Pixels of a picture's side on a sheet."""
SHEETS_PER_TASK = 8


def report(store: Store, assignment: Artifact, images: Artifact) -> Artifact:
    """Choose the pictures of every cluster and draw them on a sheet each.

    Args:
        store: where artifacts lie.
        assignment: artifact of assign_clusters.
        images: artifact of list_images that it assigns; says where the bytes of an image lie.

    Returns:
        `pictures.parquet`, a row a picture in the order of the sheets; `sheets/NNNNN.jpg`, for
        cluster NNNNN: a row of PER_KIND pictures for each of KINDS, gray where there is none or
        where an image could no longer be read (fact `n_unread`).

    Cost: one pass over the assignment, then reads 12 K images. Peak memory a worker: one part, or
    64 MB of files on their way; the driver holds 36 K rows.
    """

    def write(writer: ArtifactWriter) -> None:
        names = assignment.folder.read_table("names.parquet")
        n_clusters = names.num_rows
        writer.start(n_clusters, "clusters")
        parts = ((assignment.folder, part.name) for part in assignment.manifest.parts)
        candidates = pa.concat_tables(map_parts(_candidates, parts))
        pictures = choose_pictures(candidates)
        writer.add_file("pictures.parquet", table_bytes(pictures), pictures.num_rows)
        image_id, cluster_id = (pictures[name].to_numpy() for name in ("image_id", "cluster_id"))
        listed = ((images.folder, part.name, image_id) for part in images.manifest.parts)
        places = pa.concat_tables(map_parts(_places, listed))
        places = places.take(np.searchsorted(places["image_id"].to_numpy(), image_id))
        tasks = []
        for start in range(0, n_clusters, SHEETS_PER_TASK):
            clusters = range(start, min(start + SHEETS_PER_TASK, n_clusters))
            rows = (cluster_id >= clusters.start) & (cluster_id < clusters.stop)
            mine = pictures.filter(rows), places.filter(rows)
            tasks.append((writer.folder, clusters, *mine))
        n_unread = 0
        for sheets, unread, memory_gb in map_parts(_draw_sheets, tasks):
            writer.files += sheets
            n_unread += unread
            writer.note_memory(memory_gb)
            writer.progress.advance(len(sheets))
        writer.facts["n_unread"] = n_unread

    return store.run_stage(
        "report", version=2, options={}, inputs=[assignment, images], write=write
    )


def choose_pictures(rows: pa.Table) -> pa.Table:
    """The pictures of every cluster: PER_KIND of each of KINDS, no image twice.

    Args:
        rows: of assign_clusters, at least the first 3 PER_KIND of each cluster by each kind.

    Returns:
        Table PICTURES, sorted by cluster, kind and rank. A cluster with fewer images has fewer
        pictures; equal images stand in the order of their `image_id`.
    """
    left = rows.sort_by("image_id")
    chosen = []
    for kind in range(len(KINDS)):
        picked = _first_of_each_cluster(left, kind, PER_KIND)
        chosen.append(
            left.take(picked).append_column("kind", pa.array([kind] * len(picked), pa.int8()))
        )
        others = np.setdiff1d(np.arange(left.num_rows), picked)
        left = left.take(others)
    table = pa.concat_tables(chosen)
    order = np.lexsort((table["kind"].to_numpy(), table["cluster_id"].to_numpy()))
    return table.take(order).select(PICTURES.names).cast(PICTURES)


def _first_of_each_cluster(rows: pa.Table, kind: int, n: int) -> NDArray[np.int64]:
    """Indices of the first `n` rows of each cluster by `kind`, sorted by cluster and rank."""
    probability = rows["probability"].to_numpy()
    margin = probability - rows["next_probability"].to_numpy()
    key = (-probability, probability, margin)[kind]
    cluster_id = rows["cluster_id"].to_numpy()
    order = np.lexsort((rows["image_id"].to_numpy(), key, cluster_id))
    grouped = cluster_id[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return order[rank < n]


def _candidates(folder: Folder, name: str) -> pa.Table:
    """The rows of a part that can become pictures."""
    rows = folder.read_table(name)
    # A picture may be taken by an earlier kind, so each kind brings enough for all.
    enough = len(KINDS) * PER_KIND
    picked = [_first_of_each_cluster(rows, kind, enough) for kind in range(len(KINDS))]
    return rows.take(np.unique(np.concatenate(picked)))


def _places(listing: Folder, name: str, image_id: NDArray[np.int64]) -> pa.Table:
    """Where the bytes of those of the images lie that are in a part of the listing."""
    rows = listing.read_table(name, ["image_id", *WHERE])
    return rows.filter(np.isin(rows["image_id"].to_numpy(), image_id))


def _draw_sheets(
    folder: Folder, clusters: Iterable[int], pictures: pa.Table, places: pa.Table
) -> tuple[list[Part], int, float]:
    tiles: list[Image.Image | None] = [None] * places.num_rows
    for row, data, _, _ in read_images(places):
        if data is not None:
            tiles[row] = _tile(data)
    sheets = []
    cluster_id, kinds = pictures["cluster_id"].to_numpy(), pictures["kind"].to_pylist()
    for cluster in clusters:
        rows = np.flatnonzero(cluster_id == cluster)
        name = sheet_name(cluster)
        data = draw_sheet([tiles[row] for row in rows], [kinds[row] for row in rows])
        folder.write(name, data)
        sheets.append(describe(name, data))
    return sheets, tiles.count(None), own_memory_gb()


def sheet_name(cluster: int) -> str:
    """File of a cluster's sheet, the same in the artifact and in the page's folder."""
    return f"sheets/{cluster:05d}.jpg"


def draw_sheet(tiles: list[Image.Image | None], kinds: list[int]) -> bytes:
    """A JPEG of the tiles, a row a kind; None leaves its place gray."""
    sheet = Image.new("RGB", (PER_KIND * SIDE, len(KINDS) * SIDE), (128, 128, 128))
    for i, (tile, kind) in enumerate(zip(tiles, kinds, strict=True)):
        if tile is not None:
            sheet.paste(tile, ((i - kinds.index(kind)) * SIDE, kind * SIDE))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _tile(data: bytes) -> Image.Image | None:
    """A square picture of an image; None if it is an image no longer."""
    try:
        return Image.fromarray(decode_image(data, _square))
    except ValueError:
        return None


def _square(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC)
