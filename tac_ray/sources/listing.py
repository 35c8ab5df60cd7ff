"""What a place holds: a folder or prefix of images, tar shards, Parquet tables, a list of uris.

Everything here runs in Ray tasks and leaves its rows in files, so that no process holds the
listing of a large bucket.
"""

import os
import posixpath
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
from fsspec import AbstractFileSystem

from tac_ray.artifacts.storage import Folder, filesystem, is_local, local_uri, table_bytes
from tac_ray.sources.keys import Bucket, Key, KeyRange
from tac_ray.sources.tables import TableRow, table_rows, vectors_in

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TAR, PARQUET, NPY, TEXT = ".tar", ".parquet", ".npy", ".txt"
"""What files end in that hold or name images."""

PIECE_ROWS = 16_384
"""Rows of a file of the listing before it is put in order."""
MAX_LABELS = 100_000
"""More names than this are not taken for classes."""
STATS_IN_FLIGHT = 32


class Row(NamedTuple):
    """One image."""

    uri: str
    member: str | None = None
    """Name inside a tar, or row of a Parquet file."""
    offset: int | None = None
    """First byte inside a tar."""
    size: int | None = None
    etag: str | None = None
    label: str | None = None
    """What the source itself says: a `.cls` or `.txt` beside it in a tar, a `label` column."""
    folder: str | None = None
    """First folder below the place, if the image lies in one."""
    is_deeper: bool = False
    """Whether it lies in a folder of that folder."""


_ROW_TYPES = (
    *(pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string(), pa.string()),
    pa.bool_(),
)
LISTED = pa.schema(list(zip(Row._fields, _ROW_TYPES, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file of rows, sorted, and what is to be known of them together."""

    name: str
    rows: int
    first: str
    """Uri of the first row."""
    n_in_folder: int
    n_deeper: int
    n_labeled: int
    folders: frozenset[str]
    """At most MAX_LABELS + 1 of them, like `labels`."""
    labels: frozenset[str]


class Container(NamedTuple):
    """A file that holds or names images."""

    uri: str
    size: int
    etag: str


@dataclass(kw_only=True)
class Place:
    """What was found: rows of images, and files that hold more."""

    pieces: list[Piece] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    """Other files by what they end in."""

    def add(self, other: "Place") -> None:
        """Take over what another task found."""
        self.pieces += other.pieces
        self.containers += other.containers
        for suffix, n in other.others.items():
            self.others[suffix] = self.others.get(suffix, 0) + n


def stage_rows(staging: Folder, rows: Iterable[Row]) -> list[Piece]:
    """Write sorted rows to files of at most PIECE_ROWS."""
    pieces, left = [], iter(rows)
    while block := list(islice(left, PIECE_ROWS)):
        table = pa.table(
            [pa.array(c, t) for c, t in zip(zip(*block, strict=True), _ROW_TYPES, strict=True)],
            schema=LISTED,
        )
        name = f"{uuid.uuid4().hex}.parquet"
        staging.write(name, table_bytes(table))
        pieces.append(
            Piece(
                name=name,
                rows=len(block),
                first=block[0].uri,
                n_in_folder=len(block) - table["folder"].null_count,
                n_deeper=sum(row.is_deeper for row in block),
                n_labeled=len(block) - table["label"].null_count,
                folders=_some(table["folder"]),
                labels=_some(table["label"]),
            )
        )
    return pieces


def _some(column: pa.ChunkedArray) -> frozenset[str]:
    return frozenset(column.drop_null().unique()[: MAX_LABELS + 1].to_pylist())


def list_folder(staging: Folder, root: str) -> Place:
    """Images and containers below a local folder, or below a prefix of any store but S3."""
    fs, path = filesystem(root)
    return _sort_out(staging, root, _walk(path) if is_local(root) else _find(fs, path))


def list_keys(staging: Folder, root: str, keys: KeyRange) -> Place:
    """Images and containers of a range of keys on S3."""
    bucket = Bucket.at(root)

    def read(pages: Iterator[Sequence[Key]]) -> Place:
        found = (
            (f"s3://{bucket.name}/{key['Key']}", int(key["Size"]), str(key["ETag"]).strip('"'))
            for page in pages
            for key in page
            if not key["Key"].endswith("/")
        )
        return _sort_out(staging, root, found)

    place = Place()
    for run in bucket.consume(keys, read):
        place.add(run)
    return place


_File = tuple[str, int | None, str | None]
"""Uri, size, etag; without the last two where the file could not be looked at."""


def _sort_out(staging: Folder, root: str, found: Iterable[_File]) -> Place:
    """Rows of the images to files, the rest to where it belongs."""
    place = Place()

    def images() -> Iterator[Row]:
        for uri, size, etag in found:
            suffix = posixpath.splitext(uri)[1].lower()
            if suffix in IMAGE_EXTENSIONS:
                yield Row(uri, size=size, etag=etag, **_folder_of(uri[len(root) + 1 :]))
            elif suffix in (TAR, PARQUET, NPY) and size is not None and etag is not None:
                place.containers.append(Container(uri, size, etag))
            else:
                place.others[suffix] = place.others.get(suffix, 0) + 1

    place.pieces = stage_rows(staging, images())
    return place


def _folder_of(relative: str) -> dict[str, Any]:
    parts = relative.split("/")
    return {"folder": parts[0] if len(parts) > 1 else None, "is_deeper": len(parts) > 2}


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[_File]:
    """Files below a local folder in the order of their paths; links are followed once."""
    info = Path(folder).stat()
    here = (info.st_dev, info.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        listed = [(entry.name + "/" * entry.is_dir(), entry) for entry in entries]
    for name, entry in sorted(listed, key=lambda pair: pair[0]):
        if name.endswith("/"):
            yield from _walk(entry.path, above | {here})
            continue
        try:
            found = entry.stat()
        except OSError:  # a broken link is an image that cannot be read, not one less
            yield local_uri(entry.path), None, None
        else:
            yield local_uri(entry.path), found.st_size, f"{found.st_size}-{found.st_mtime_ns}"


def _find(fs: AbstractFileSystem, path: str) -> Iterator[_File]:
    found: dict[str, dict[str, Any]] = fs.find(path, detail=True)  # type: ignore[assignment]
    for name, info in sorted(found.items()):
        yield fs.unstrip_protocol(name), int(info["size"]), _etag(info)


def look_at(uri: str) -> Container:
    """Size and etag of one file.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        found = Path(path).stat()
        return Container(uri, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")
    info: dict[str, Any] = fs.info(path)  # type: ignore[assignment]
    return Container(uri, int(info["size"]), _etag(info))


def _etag(info: dict[str, Any]) -> str:
    known = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    changed = info.get("mtime") or info.get("LastModified") or info.get("updated")
    return str(known or f"{info['size']}-{changed}").strip('"')


def list_tar(staging: Folder, tar: Container) -> Place:
    """Images of a tar shard, with the place of their bytes; labels from `.cls` or `.txt`.

    Files of one sample share their name up to the first dot of its last part (WebDataset). Costs
    one pass over the tar.

    Raises:
        ValueError: it is not a tar, or ends too early.
    """
    fs, path = filesystem(tar.uri)
    place = Place()

    def images() -> Iterator[Row]:
        sample, waiting, label = "", [], {}
        with (
            fs.open(path, "rb") as file,
            tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as members,
        ):
            for member in members:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, rest = name.partition(".")
                if f"{folder}/{stem}" != sample:
                    yield from _labeled(waiting, label)
                    sample, waiting, label = f"{folder}/{stem}", [], {}
                suffix = posixpath.splitext(name)[1].lower()
                if suffix in IMAGE_EXTENSIONS:
                    waiting.append(
                        Row(
                            tar.uri,
                            member=member.name,
                            offset=member.offset_data,
                            size=member.size,
                            etag=tar.etag,
                            **_folder_of(member.name),
                        )
                    )
                elif rest in ("cls", "txt") and member.size <= _MAX_LABEL_BYTES:
                    content = members.extractfile(member)
                    assert content is not None  # it is a file
                    label[rest] = content.read().decode(errors="replace").strip()
                else:
                    place.others[suffix] = place.others.get(suffix, 0) + 1
            yield from _labeled(waiting, label)

    try:
        place.pieces = stage_rows(staging, images())
    except tarfile.TarError as error:
        raise ValueError(
            f"{tar.uri} is not a whole tar ({error}); remove it or write it again"
        ) from error
    return place


_MAX_LABEL_BYTES = 1000
"""Longer texts are captions, not classes."""


def _labeled(rows: list[Row], label: dict[str, str]) -> Iterator[Row]:
    found = label.get("cls", label.get("txt"))
    return (row._replace(label=found) for row in rows)


def list_uris(staging: Folder, source: Container) -> Place:
    """Images named in a text file, a uri a line, or in a uri column of a Parquet file.

    They stay in the order of the list. Each is looked at for its size and etag, STATS_IN_FLIGHT at
    a time; one that is not there stays in the list and fails when it is read.
    """
    base = posixpath.dirname(source.uri)

    def look(named: TableRow) -> Row:
        uri = named.uri or ""
        if "://" not in uri and not uri.startswith("/"):
            uri = f"{base}/{uri}"
        try:
            found = look_at(uri)
        except Exception:  # the download says what is wrong, and the row is kept
            return Row(uri, label=named.label)
        return Row(uri, size=found.size, etag=found.etag, label=named.label)

    with ThreadPoolExecutor(STATS_IN_FLIGHT) as callers:

        def rows() -> Iterator[Row]:
            named = _lines(source.uri) if source.uri.endswith(TEXT) else table_rows(source.uri)
            while block := list(islice(named, 32 * STATS_IN_FLIGHT)):
                yield from callers.map(look, block)

        return Place(pieces=stage_rows(staging, rows()))


def _lines(uri: str) -> Iterator[TableRow]:
    fs, path = filesystem(uri)
    with fs.open(path, "r", encoding="utf-8") as file:
        for i, line in enumerate(cast(Iterator[str], file)):
            if line.strip():
                yield TableRow(i, line.strip(), None)


def list_rows(staging: Folder, source: Container) -> Place:
    """Images in a bytes column of a Parquet file: a row each."""
    rows = (
        Row(source.uri, member=str(row.number), etag=source.etag, label=row.label)
        for row in table_rows(source.uri)
    )
    return Place(pieces=stage_rows(staging, rows))


def list_vectors(staging: Folder, vectors: Container, metadata: Container | None) -> Place:
    """Images whose embeddings are there already, in the order of the embeddings.

    Uri and label are those that `metadata` (or the Parquet file of the embeddings itself) says;
    without a uri column a row names what there is, file and row.
    """
    if metadata is None and vectors.uri.endswith(NPY):
        named: Iterable[TableRow] = (
            TableRow(i, None, None) for i in range(vectors_in(vectors.uri).n)
        )
    else:
        named = table_rows((metadata or vectors).uri)
    rows = (
        Row(
            row.uri or vectors.uri,
            member=None if row.uri else str(row.number),
            etag=vectors.etag,
            label=row.label,
        )
        for row in named
    )
    return Place(pieces=stage_rows(staging, rows))
