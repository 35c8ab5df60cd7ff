"""A quiet session of Ray, for benchmarks: standard output is for the figures."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data

from tac_ray.artifacts.manifest import Artifact


class Silent:
    """A progress that shows nothing."""

    def start(self, title: str, total: int | None, unit: str) -> None:
        """Say nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Say nothing."""

    def finish(self, title: str, artifact: Artifact) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""


@contextmanager
def ray_session(n_cpus: int | None = None) -> Iterator[None]:
    """Ray on this machine, its lines kept out of the output; one that runs already is used."""
    started = not ray.is_initialized()
    if started:
        ray.init("local", num_cpus=n_cpus, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        if started:
            ray.shutdown()
