"""All shards together: actors that own the rows of one or two aligned artifacts."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from tac_ray.artifacts.manifest import Artifact, Part
from tac_ray.artifacts.storage import Folder
from tac_ray.cluster import Workers
from tac_ray.index.found import Found, merge_top, write_neighbors
from tac_ray.index.lists import JoinPlan
from tac_ray.index.shard import PartSource, Pass, Shard

REBUILDS = 5
"""Times that a step is repeated for shards that were lost in it; then something is wrong with the
step itself, such as memory that does not suffice."""
SEARCHES_IN_FLIGHT = 3
"""Parts whose neighbors are searched or written at a time: shards do not wait for storage."""


def part_sources(artifacts: list[Artifact]) -> list[PartSource]:
    """The parts of aligned artifacts, side by side.

    Raises:
        ValueError: the artifacts are not aligned.
    """
    rows = [artifact.part_rows for artifact in artifacts]
    if any(other != rows[0] for other in rows):
        raise ValueError(f"artifacts have parts of {rows} rows and should be aligned")
    starts = np.cumsum([0, *rows[0]])
    return [
        PartSource(
            index=i,
            first_row=int(starts[i]),
            n_rows=rows[0][i],
            columns=tuple((a.folder.path, a.manifest.parts[i]) for a in artifacts),
        )
        for i in range(len(rows[0]))
    ]


def _share_out(sources: list[PartSource], n_shares: int) -> list[list[PartSource]]:
    """Neighboring sources together, in shares of about equally many rows."""
    ends = np.cumsum([source.n_rows for source in sources])
    middles = ends - [source.n_rows / 2 for source in sources]
    share = (middles * n_shares / ends[-1]).astype(int)
    return [
        [source for source, mine in zip(sources, share, strict=True) if mine == i]
        for i in range(n_shares)
    ]


class ShardGroup:
    """Shard actors, started at the first `load` and kept until `close`.

    Rows go from storage to the shards and never through the driver. Shards hold runs of
    neighboring segments of parts; results do not depend on how many there are.

    A shard that is lost is built again from its parts, and what it was told since the last pass
    that compared everything is told again, so that it goes on with the bits it had; the other
    shards keep what they have.
    """

    def __init__(self, n_shards: int | None = None, n_gpus: int | None = None) -> None:
        self._n_shards, self._n_gpus = n_shards, n_gpus
        self._shards: list[Any] = []
        self._held: list[list[PartSource]] = []
        self._told: list[tuple[str, tuple[Any, ...]]] = []
        self._loaded: list[str] | None = None
        self.sources: list[PartSource] = []
        """The parts that are held."""
        self.on_gpu = False
        """Whether the shards compute on GPUs; known once they are loaded."""
        self._memory_gb = 0.0

    def __enter__(self) -> "ShardGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(source.n_rows for source in self.sources)

    @property
    def width(self) -> int:
        """d, the width of the rows."""
        return self.rows(np.array([0])).shape[1]

    @property
    def peak_memory_gb(self) -> float:
        """Memory of the largest shard, now or when it was asked for before."""
        self._memory_gb = max([self._memory_gb, *self._call("memory_gb")])
        return self._memory_gb

    def load(self, artifacts: list[Artifact]) -> None:
        """Hold the rows of aligned artifacts, side by side."""
        fingerprints = [artifact.fingerprint for artifact in artifacts]
        if fingerprints == self._loaded:
            self.use_rows(None)
            return
        self._start()
        self._loaded = None
        self.sources = part_sources(artifacts)
        segments = [segment for source in self.sources for segment in source.segments()]
        self._held = _share_out(segments, len(self._shards))
        self._told = []
        self._call_each("load", [(held,) for held in self._held])
        self._loaded = fingerprints

    def use_rows(self, rows: NDArray[np.int64] | None) -> None:
        """Let `assign` see only these sorted rows; None for all."""
        reference = None if rows is None else ray.put(rows)
        self._call("use_rows", reference)
        self._told = [("use_rows", (reference,))]

    def assign(self, centroids: NDArray[np.float32], depth: int | None = None) -> Pass:
        """Give every row its nearest centroid.

        Args:
            centroids: unit norm, (k, d).
            depth: coordinates a pruned pass looks at first; None compares everything.

        Cost: 2 N k d operations over all shards; 8 k d bytes from each to the driver.
        """
        reference = ray.put(centroids)
        passes = self._call("assign", reference, depth)
        if depth is None:
            self._told = [told for told in self._told if told[0] == "use_rows"]
        self._told.append(("assign", (reference, depth)))
        return reduce(Pass.plus, passes)

    def assignment(self) -> list[NDArray[np.int32]]:
        """Centroid of every row at the last `assign`, which saw all; a part at a time."""
        ids = np.concatenate([run for shard in self._call("assignment") for run in shard])
        return np.split(ids, np.cumsum([source.n_rows for source in self.sources])[:-1])

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of sorted global rows, (n, d) float32."""
        return np.concatenate([found for found in self._call("rows", rows) if found.size])

    def search(self, rows: NDArray[np.int64], n: int) -> Found:
        """The `n` most similar rows of all for each of some sorted rows; itself is among them."""
        queries = ray.put(self.rows(rows).astype(np.float16))
        return merge_top(self._call("search", queries, n), n)

    def write_neighbors(self, folder: Folder, n: int, *, exclude: str) -> Iterator[Part]:
        """Write the `n` nearest rows of every row, part by part, aligned with the sources.

        Args:
            folder: where the parts go.
            n: neighbors of a row.
            exclude: "row" leaves out the row itself; "first_column" drops the best hit.

        Yields:
            The parts, in order, as they are written.
        """

        def begin(source: PartSource) -> Any:
            found = [shard.search.remote(source, n + 1) for shard in self._shards]
            return _write_found.remote(folder, source.index, source.first_row, n, exclude, *found)

        def finish(source: PartSource, writing: Any) -> Part:
            for _ in range(REBUILDS):
                try:
                    return ray.get(writing)
                except (RayActorError, RayTaskError) as error:
                    if not _is_lost(error):
                        raise
                    self._call("memory_gb")  # any call builds what is lost
                    writing = begin(source)
            return ray.get(writing)

        running: deque[tuple[PartSource, Any]] = deque()
        for source in self.sources:
            if len(running) == SEARCHES_IN_FLIGHT:
                yield finish(*running.popleft())
            running.append((source, begin(source)))
        while running:
            yield finish(*running.popleft())

    def join_neighbors(
        self,
        folder: Folder,
        plan: JoinPlan,
        n: int,
        *,
        exclude: str,
        on_rows: Callable[[int], None],
    ) -> list[Part]:
        """Write neighbors of every row among the rows of its lists, aligned with the sources.

        Rows go to their lists once, through Ray's object store, which writes to disk what memory
        cannot hold. If a shard is lost, the join is begun again.

        Args:
            folder: where the parts go.
            plan: which lists meet.
            n: neighbors of a row.
            exclude: as in `write_neighbors`.
            on_rows: told how many more rows have their neighbors.

        Cost: see `Shard.join`. In the object stores of all nodes 2 N d bytes of rows, as many again
        while they are brought to their lists, and 12 N (n + 1) of what was found.
        """
        n_told = 0

        def on_group(group: int, n_rows: int) -> None:
            nonlocal n_told
            if group == n_told:
                n_told += 1
                on_rows(n_rows)

        for _ in range(REBUILDS):
            try:
                return self._join(folder, plan, n, exclude, on_group)
            except (RayActorError, RayTaskError, ObjectLostError) as error:
                if not _is_lost(error):
                    raise
                self._call("memory_gb")  # any call builds what is lost
        return self._join(folder, plan, n, exclude, on_group)

    def _join(
        self,
        folder: Folder,
        plan: JoinPlan,
        n: int,
        exclude: str,
        on_group: Callable[[int, int], None],
    ) -> list[Part]:
        shards, n_groups = self._shards, plan.n_groups
        runs = [run for run in _share_out(self.sources, len(shards)) if run]
        first_rows = [run[0].first_row for run in runs]
        shared = ray.put(plan)

        def several(method: Any, n_answers: int, *arguments: Any) -> list[Any]:
            answers = method.options(num_returns=n_answers).remote(*arguments)
            return answers if n_answers > 1 else [answers]

        pieces = [several(shard.to_groups, n_groups, shared) for shard in shards]
        turns = [shards[group % len(shards)] for group in range(n_groups)]
        groups = [
            shard.gather.remote(*mine)
            for shard, mine in zip(turns, zip(*pieces, strict=True), strict=True)
        ]
        del pieces
        found = [
            several(shard.join, 1 + len(runs), group, groups, shared, n + 1, first_rows)
            for group, shard in enumerate(turns)
        ]
        n_joined, *found = zip(*found, strict=True)
        writing = [
            shard.write_joined.remote(folder, run, n, exclude, *mine)
            for shard, run, mine in zip(shards, runs, found, strict=False)
        ]
        del groups, found
        try:
            for group, n_rows in enumerate(n_joined):
                on_group(group, ray.get(n_rows))
            return [part for run in ray.get(writing) for part in run]
        except (RayActorError, RayTaskError, ObjectLostError):
            for joining in n_joined:  # what waits on the other shards is of no use
                ray.cancel(joining)
            raise

    def close(self) -> None:
        """End the actors and give back what they hold."""
        for shard in self._shards:
            ray.kill(shard)
        self._shards, self._loaded, self.sources = [], None, []

    def _start(self) -> None:
        if self._shards:
            return
        workers = Workers.over_cluster(self._n_shards, self._n_gpus)
        self.on_gpu = workers.num_gpus > 0
        self._actor = ray.remote(Shard).options(
            num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, scheduling_strategy="SPREAD"
        )
        self._each = (workers.n_threads, self.on_gpu)
        self._shards = [self._actor.remote(*self._each) for _ in range(workers.n)]

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """What each shard answers."""
        return self._call_each(method, [arguments] * len(self._shards))

    def _call_each(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        calls = [(i, method, mine) for i, mine in enumerate(arguments)]
        begun = [self._begin(*call) for call in calls]
        return [self._finish(answer, *call) for answer, call in zip(begun, calls, strict=True)]

    def _begin(self, shard: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._shards[shard], method).remote(*arguments)

    def _finish(self, answer: Any, shard: int, method: str, arguments: tuple[Any, ...]) -> Any:
        """The answer; from a new shard in place of this one if it was lost."""
        for attempt in range(REBUILDS + 1):
            try:
                if attempt:
                    self._rebuild(shard)
                    answer = self._begin(shard, method, arguments)
                return ray.get(answer)
            except RayActorError:
                if attempt == REBUILDS:
                    raise
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise error.cause from error
                raise
        raise AssertionError

    def _rebuild(self, shard: int) -> None:
        self._shards[shard] = self._actor.remote(*self._each)
        if self._loaded is not None:
            ray.get(self._begin(shard, "load", (self._held[shard],)))
            for method, arguments in self._told:
                ray.get(self._begin(shard, method, arguments))


def _is_lost(error: Exception) -> bool:
    """Whether a step failed because a shard, or what one had found, is gone."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(cause, RayActorError | ObjectLostError)


@ray.remote(num_cpus=0.5)
def _write_found(
    folder: Folder, part: int, first_row: int, n: int, exclude: str, *found: Found
) -> Part:
    similarity, row = merge_top(found, n + 1)
    return write_neighbors(folder, part, first_row, n, exclude, similarity, row)
