"""Which graphs cannot be cut."""

import pytest

from tac_ray.config import CutGraphConfig
from tac_ray.stages.cut_graph import check_graph


def test_a_graph_needs_more_rows_than_clusters():
    check_graph(CutGraphConfig(), 51, 50)
    with pytest.raises(ValueError, match="n_images=50 should be > n_clusters=50"):
        check_graph(CutGraphConfig(), 50, 50)
    # Those of the sample count.
    with pytest.raises(ValueError, match=r"n_images=40 should be > .* raise --max-graph-rows"):
        check_graph(CutGraphConfig(max_graph_rows=40), 1000, 50)
