"""Rows that were found: the best of several lists, and the parts that hold them.

Imports neither torch nor FAISS, so that workers that only merge and write start in a second.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tac_ray.artifacts.manifest import Part, write_part
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.storage import Folder

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Similarity and row of the best rows of some queries, each (m, n)."""


def sort_key(similarity: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Whole numbers that are smaller for a larger similarity, and equal for equal ones."""
    bits = (similarity + np.float32(0)).view(np.uint32)  # -0 is 0
    return np.where(bits >> 31 == 1, bits, ~bits & np.uint32(0x7FFFFFFF))


def merge_top(found: Iterable[Found], n: int) -> Found:
    """The best `n` of several result lists: larger similarity first, ties by row number.

    Similarity and row become one number that sorts as the pair does; rows are below 2^32.
    """
    lists = list(found)
    place = sort_key(np.concatenate([s for s, _ in lists], axis=1))
    row = np.concatenate([r for _, r in lists], axis=1)
    keys = place.astype(np.uint64) << np.uint64(32) | row.astype(np.uint64)
    if n < keys.shape[1]:
        keys = np.partition(keys, n, axis=1)[:, :n]
    keys = np.sort(keys, axis=1)
    place = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(place >> 31 == 1, place, ~place & np.uint32(0x7FFFFFFF))
    return bits.view(np.float32), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def write_neighbors(
    folder: Folder,
    part: int,
    first_row: int,
    n: int,
    exclude: str,
    similarity: NDArray[np.float32],
    row: NDArray[np.int64],
) -> Part:
    """Write the neighbors of a part: of its n + 1 best rows, all but itself.

    Args:
        folder: where the part goes.
        part: its number.
        first_row: global number of its first row.
        n: neighbors of a row.
        exclude: "row" leaves out the row itself; "first_column" drops the best hit.
        similarity: of the best rows, (m, n + 1).
        row: their global numbers, (m, n + 1).
    """
    if exclude == "row":
        itself = row == (first_row + np.arange(len(row)))[:, None]
        # A row that is not among its own best hits (duplicates before it) drops the last one.
        itself[~itself.any(axis=1), -1] = True
    else:
        itself = np.zeros(row.shape, dtype=bool)
        itself[:, 0] = True
    table = pa.table(
        {
            "neighbor_row": matrix_column(row[~itself].reshape(len(row), n)),
            "similarity": matrix_column(similarity[~itself].reshape(len(row), n)),
        }
    )
    return write_part(folder, part, table)
