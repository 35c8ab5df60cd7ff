"""Parquet tables of images, uris or embeddings, and .npy parts of embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import filesystem

URI_COLUMNS = ("uri", "url", "path", "image_path", "file_name", "key")
"""Names of a column that says where an image is, the first that is there."""
LABEL_COLUMN = "label"
_NPY_HEADER_BYTES = 4096


class TableRow(NamedTuple):
    """What a table says of an image beside its bytes or its embedding."""

    number: int
    uri: str | None
    label: str | None


@dataclass(frozen=True)
class Columns:
    """Which columns of a Parquet table mean what; None where there is none."""

    uri: str | None
    image: str | None
    """Bytes of image files; `name.bytes` where it is a struct that has them (datasets do so)."""
    vector: str | None
    label: str | None

    @classmethod
    def of(cls, schema: pa.Schema, where: str) -> "Columns":
        """Tell the columns by their types, and those of text by their names.

        Raises:
            ValueError: two columns of bytes or two of vectors.
        """
        images, vectors = [], []
        for column in schema:
            kind = column.type
            if _is_bytes(kind):
                images.append(column.name)
            elif pa.types.is_struct(kind) and any(
                f.name == "bytes" and _is_bytes(f.type) for f in kind
            ):
                images.append(f"{column.name}.bytes")
            elif (
                pa.types.is_fixed_size_list(kind)
                or pa.types.is_list(kind)
                or pa.types.is_large_list(kind)
            ) and pa.types.is_floating(kind.value_type):
                vectors.append(column.name)
        for found, what in ((images, "bytes"), (vectors, "vectors")):
            if len(found) > 1:
                raise ValueError(
                    f"{where} has {len(found)} columns of {what} ({', '.join(found)}) and should "
                    "have one; write a table with the one that is meant"
                )
        uris = [name for name in URI_COLUMNS if name in schema.names]
        return cls(
            uri=uris[0] if uris else None,
            image=images[0] if images else None,
            vector=vectors[0] if vectors else None,
            label=LABEL_COLUMN if LABEL_COLUMN in schema.names else None,
        )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def columns_in(uri: str) -> Columns:
    """The columns of a Parquet file.

    Raises:
        ValueError: it is not Parquet, or its columns do not tell what they are.
    """
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        try:
            schema = pq.read_schema(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{uri} is not a Parquet file ({error}); remove it") from error
    return Columns.of(schema, uri)


def table_rows(uri: str) -> Iterator[TableRow]:
    """Number, uri and label of every row of a Parquet file; reads no other columns."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        columns = Columns.of(table.schema_arrow, uri)
        wanted = [name for name in (columns.uri, columns.label) if name is not None]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            uris = batch[columns.uri].to_pylist() if columns.uri else [None] * len(batch)
            labels = batch[columns.label].to_pylist() if columns.label else [None] * len(batch)
            for found, label in zip(uris, labels, strict=True):
                yield TableRow(number, found, None if label is None else str(label))
                number += 1


@dataclass(frozen=True)
class Vectors:
    """Embeddings in one file: n of width d."""

    uri: str
    n: int
    d: int

    def read(self, first: int, last: int) -> NDArray[Any]:
        """Rows `first` up to before `last`, (last - first, d) in the file's own type."""
        fs, path = filesystem(self.uri)
        with fs.open(path, "rb") as file:
            if self.uri.endswith(".npy"):
                _, dtype = _npy_header(file, self.uri)
                file.seek(first * self.d * dtype.itemsize, 1)
                data: Any = file.read((last - first) * self.d * dtype.itemsize)
                return np.frombuffer(data, dtype).reshape(-1, self.d)
            table = pq.ParquetFile(file)
            column = Columns.of(table.schema_arrow, self.uri).vector
            batches, start = [], 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                low, high = max(first - start, 0), min(last - start, rows)
                if low < high:
                    found = table.read_row_group(group, columns=[column])[column]
                    batches.append(_dense(found.slice(low, high - low), self.d))
                start += rows
            return np.concatenate(batches)


def vectors_in(uri: str) -> Vectors:
    """How many embeddings a file holds, and how wide.

    Raises:
        ValueError: a .npy file that is not a matrix of floats in rows.
    """
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        if uri.endswith(".npy"):
            (n, d), _ = _npy_header(file, uri)
            return Vectors(uri, n, d)
        table = pq.ParquetFile(file)
        column = Columns.of(table.schema_arrow, uri).vector
        kind = table.schema_arrow.field(column).type
        if pa.types.is_fixed_size_list(kind):
            return Vectors(uri, table.metadata.num_rows, kind.list_size)
        first = next(table.iter_batches(batch_size=1, columns=[column]), None)
        width = 0 if first is None or first[0][0].as_py() is None else len(first[0][0])
        return Vectors(uri, table.metadata.num_rows, width)


def _npy_header(file: Any, uri: str) -> tuple[tuple[int, int], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, by_columns, dtype = reader(file, max_header_size=_NPY_HEADER_BYTES)
    except ValueError as error:
        raise ValueError(f"{uri} is not a .npy file ({error}); remove it") from error
    if len(shape) != 2 or by_columns or dtype.kind != "f":
        raise ValueError(
            f"{uri} holds {dtype} of shape {shape} and should hold floats of shape (n, d) in rows; "
            "save it with numpy.save after .astype and .copy"
        )
    return shape, dtype


def _dense(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    """Lists of floats as a matrix; a list that is missing or of another length becomes NaN."""
    if pa.types.is_fixed_size_list(column.type) and not column.null_count:
        return matrix(column)
    rows = np.full((len(column), width), np.nan, dtype=np.float32)
    for row, values in zip(rows, column, strict=True):
        if values.is_valid and len(values) == width:
            row[:] = values.values.to_numpy(zero_copy_only=False)
    return rows
