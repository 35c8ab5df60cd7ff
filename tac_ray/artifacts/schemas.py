"""Columns of the artifacts and the way from an embedding column to an array."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

IMAGES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("label", pa.string()),
    ]
)
FAILURES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("step", pa.string()),
        ("error", pa.string()),
    ]
)
SELECTED_NOUNS = pa.schema(
    [
        ("noun_id", pa.int64()),
        ("noun", pa.string()),
        ("centroid_id", pa.int32()),
        ("confidence", pa.float32()),
    ]
)
CLUSTERS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("cluster_id", pa.int32()),
        ("probability", pa.float32()),
        ("next_cluster_id", pa.int32()),
        ("next_probability", pa.float32()),
        ("cluster_name", pa.string()),
    ]
)
CLUSTER_NAMES = pa.schema(
    [
        ("cluster_id", pa.int32()),
        ("name", pa.string()),
        ("runners_up", pa.list_(pa.string())),
        ("size", pa.int64()),
        ("mean_probability", pa.float32()),
    ]
)
PICTURES = pa.schema(
    [
        ("cluster_id", pa.int32()),
        ("kind", pa.int8()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("probability", pa.float32()),
        ("next_cluster_id", pa.int32()),
        ("next_probability", pa.float32()),
    ]
)


def matrix_column(rows: NDArray[Any]) -> pa.FixedSizeListArray:
    """An (n, d) array as a column of fixed-size lists, in the array's own type."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1])


def matrix(column: pa.ChunkedArray | pa.FixedSizeListArray) -> NDArray[Any]:
    """A column of fixed-size lists as an (n, d) array, without a copy where it can be."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # no rows at all
            column = column.chunk(0)
    width = column.type.list_size
    start = column.offset * width
    values = column.values.slice(start, len(column) * width)
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width)
