"""Names of clusters of which some keep theirs."""

import numpy as np
import pyarrow as pa
import scipy.sparse

from tac_ray.stages.assign_clusters import _ClusterSums, _names

NOUNS = pa.table({"noun": ["dog", "puppy", "car", "sea"]})


def sums(weights: list[list[float]]) -> _ClusterSums:
    sizes = np.full(len(weights), 10)
    return _ClusterSums(scipy.sparse.csr_array(np.array(weights)), sizes, np.ones(len(weights)))


def test_no_new_cluster_takes_a_name_that_is_kept():
    # The old dogs have fallen apart into puppies, which keep id 0, and dogs.
    weights = [[3.0, 6, 0, 0], [0, 0, 9, 0], [8, 1, 0, 0]]
    assert _names(sums(weights), NOUNS, {})[0] == ["puppy", "car", "dog"]
    kept = {
        0: {"name": "dog", "runners_up": ["sea"]},
        1: {"name": "automobile", "runners_up": []},
    }
    names, runners_up = _names(sums(weights), NOUNS, kept)
    assert names[:2] == ["dog", "automobile"]
    assert runners_up[0] == ["sea"]
    assert len(set(names)) == 3
    assert "dog" not in runners_up[2]
