"""What a run says of itself to Prometheus."""

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from tac_ray.artifacts.store import Store
from tac_ray.config import TrainHeadsConfig
from tac_ray.progress import ConsoleProgress
from tac_ray.stages.train_heads import train_heads
from tests.integration.train_job import K, inputs

pytestmark = pytest.mark.integration


def scraped() -> dict[str, float]:
    """Every sample that the nodes of the cluster export, by name and tags of ours."""
    found = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            match = re.match(r"(ray_tac_ray_\w+)\{(.*)\} (\S+)$", line)
            if match:
                tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                found[f"{match[1]} {tags.get('stage', '')} {tags.get('unit', '')}".strip()] = float(
                    match[3]
                )
    return found


def test_stages_are_counted_for_prometheus(ray_cluster: None, tmp_path: Path):
    config = TrainHeadsConfig(epochs=1, batch_size=256)
    store = Store(str(tmp_path), ConsoleProgress())
    heads = train_heads(store, config, *inputs(str(tmp_path)), n_clusters=K, seed=0)
    (metrics,) = heads.folder.read("metrics.jsonl").splitlines()
    # A stage of a name that no other test counts.
    progress = ConsoleProgress()
    progress.start("counted", 10, "images")
    progress.advance(3)
    progress.advance(4)
    progress.finish("counted", heads)
    found: dict[str, Any] = {}
    deadline = time.monotonic() + 40
    # Gauges come and go.
    while not {"ray_tac_ray_stage_seconds_total counted", "ray_tac_ray_heads_loss"} <= found.keys():
        assert time.monotonic() < deadline, found
        time.sleep(1)
        found |= scraped()
    assert found["ray_tac_ray_units_done_total counted images"] == 7
    assert found["ray_tac_ray_units_per_second counted images"] > 0
    assert found["ray_tac_ray_stage_seconds_total counted"] == pytest.approx(heads.manifest.seconds)
    assert found["ray_tac_ray_heads_loss"] == pytest.approx(json.loads(metrics)["loss"])
