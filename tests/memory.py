"""How much memory processes of a test need."""

import threading
from contextlib import suppress

import psutil


class PeakMemory(threading.Thread):
    """The most memory that a process and each worker of Ray below it have alone, in MB.

    Neither files nor the object store count, of which a process maps what it happens to touch.
    """

    def __init__(self, root: psutil.Process, worker: str = "ray::") -> None:
        super().__init__(daemon=True)
        self.root, self.worker, self.done = root, worker, threading.Event()
        self.root_mb = 0.0
        self.worker_mb: dict[int, float] = {}

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        while not self.done.wait(0.1):
            for process in [self.root, *self.root.children(recursive=True)]:
                with suppress(psutil.Error):  # it ended while it was looked at
                    self._look(process)

    def _look(self, process: psutil.Process) -> None:
        memory = process.memory_info()
        mb = (memory.rss - memory.shared) / 1e6
        if process == self.root:
            self.root_mb = max(self.root_mb, mb)
        elif process.name().startswith(self.worker):
            self.worker_mb[process.pid] = max(self.worker_mb.get(process.pid, 0.0), mb)

    @property
    def largest_mb(self) -> float:
        """Of the worker that had most."""
        return max(self.worker_mb.values())
