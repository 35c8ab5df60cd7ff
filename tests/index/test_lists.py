"""A join of lists in one process against all pairs."""

import numpy as np
import pytest
import torch

from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.index import lists
from tac_ray.index.lists import JoinPlan, ListedRows, Lists, gathered, join_group, places_of_groups

N, WIDTH, N_LISTS, N_BEST = 400, 12, 5, 6


def listed(rows: np.ndarray, n_groups: int = 1) -> tuple[Lists, np.ndarray]:
    """Lists that hold these rows, without Ray, each row joined with all of them."""
    centroids = rows[:N_LISTS].astype(np.float32)
    of_row = (rows.astype(np.float32) @ centroids.T).argmax(axis=1).astype(np.int32)
    group = (np.arange(N_LISTS) % n_groups).astype(np.int32)
    plan = JoinPlan(centroids, of_row, group, N_LISTS)
    found = Lists([], plan, torch.device("cpu"))
    numbers = np.arange(N)
    for i, places in enumerate(places_of_groups(numbers, plan)):
        halves = np.array_split(places, 2)
        found._held[i] = gathered(ListedRows(rows[h], numbers[h], of_row[h]) for h in halves)
    return found, numbers


def all_pairs(rows: np.ndarray) -> np.ndarray:
    """Best rows of each, ties by row."""
    similarity = rows.astype(np.float64) @ rows.T.astype(np.float64)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :N_BEST]


def joined(rows: np.ndarray, n_groups: int = 1) -> np.ndarray:
    found, _ = listed(rows, n_groups)
    best = np.zeros((N, N_BEST), dtype=np.int64)
    for group in range(n_groups):
        own = found.group(group)
        similarity, mine = join_group(own, found, N_BEST, map)
        assert (np.diff(similarity, axis=1) <= 0).all()
        best[own.row] = mine
    return best


def rows_with_copies() -> np.ndarray:
    """Whole numbers, whose products are exact; most rows have copies."""
    rng = np.random.default_rng(0)
    distinct = rng.integers(-2, 3, (40, WIDTH)) / 4
    return distinct[rng.integers(40, size=N) * rng.integers(2, size=N)].astype(np.float16)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_all_lists_together_hold_the_best_rows(n_groups):
    rng = np.random.default_rng(0)
    rows = normalize_rows(rng.standard_normal((N, WIDTH))).astype(np.float16)
    assert (joined(rows, n_groups) == all_pairs(rows)).mean() > 0.999
    rows = rows_with_copies()
    np.testing.assert_array_equal(joined(rows, n_groups), all_pairs(rows))


def test_many_equal_rows_are_selected_from_a_few_at_a_time(monkeypatch):
    rows = rows_with_copies()
    selected = []
    select = lists._Candidates.select

    def counted(self):
        selected.append(self._n_found)
        select(self)

    monkeypatch.setattr(lists._Candidates, "select", counted)
    monkeypatch.setattr(lists, "LIST_ROWS", 7)
    monkeypatch.setattr(lists, "MOST_CANDIDATES", 1000)
    np.testing.assert_array_equal(joined(rows), all_pairs(rows))
    assert len(selected) > 4
    assert max(selected) < 1000 + 7 * N
