"""A quiet session of Ray, for benchmarks: standard output is for the figures."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
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


class WorkersMemory(threading.Thread):
    """The most memory that a worker of Ray had while this was entered, GB.

    Its own: neither files nor the object store, which workers map, are counted.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self.peak_gb = 0.0

    def __enter__(self) -> "WorkersMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        """Look once a second, which takes a hundredth of a core."""
        while not self._done.wait(1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it ended while it was looked at
                    if process.name().startswith("ray::"):
                        memory = process.memory_info()
                        self.peak_gb = max(self.peak_gb, (memory.rss - memory.shared) / 1e9)
