"""Images to sealed parts of embeddings, streamed through Ray Data.

listing -> what the store lacks -> read and decode on CPU -> encode on actors -> store -> sealed
parts. Ray Data hands batches on in any order; sealing puts them into the order of the listing and
cuts equal parts, so the artifact depends neither on how many workers ran nor on which run embedded
what.
"""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray import ObjectRef
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning
from ray.util.metrics import Counter

from tac_ray.artifacts.embeddings import KEY_BYTES, EmbeddingStore, Index, image_keys
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import FAILURES
from tac_ray.artifacts.storage import table_bytes
from tac_ray.artifacts.store import ArtifactWriter, Progress, Store, hash_of, own_memory_gb
from tac_ray.cluster import Workers
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.encoders.decode import Crop, decode_image
from tac_ray.encoders.decode_gpu import GpuDecoder, device_crop
from tac_ray.sources.reading import READS_IN_FLIGHT, read_images
from tac_ray.stages.stored import count_stored, extend_index, read_lacking, seal_stored

BATCH_ROWS = 256
"""Images a Ray Data block: 40 MB of pixels at 224 x 224."""
DECODE_CPUS = 0.5
RESTARTS = 5
"""Times that an encoder is started again: then not its node fails but itself, for lack of
memory for example."""
FEW = 1000
"""Stop when none of so many images could be read."""


def embed_images(
    store: Store,
    config: EmbedImagesConfig,
    spec: EncoderSpec,
    encoder: Encoder,
    images: Artifact,
    *,
    n_gpus: int | None = None,
) -> Artifact:
    """Embed every image of a listing that the store does not hold yet, and seal the listing's rows.

    Args:
        store: where artifacts and embeddings lie.
        config: part size, batch size, workers, how many failures to bear.
        spec: what the actors load.
        encoder: the same, loaded in the driver for its fingerprint and its crop.
        images: artifact of list_images.
        n_gpus: GPUs that the cluster may grow to; default those it has.

    Returns:
        `image_id` int64 and `embedding` float16 of unit norm, sorted by `image_id`; images that
        cannot be read are in `failures.parquet`, and are tried again by the next run. Facts: what
        was new, reused and failed, and how fast each step was.

    Raises:
        ValueError: no image can be read, or more than `max_failures` of them cannot; or the GPU
            should decode for an encoder whose crop it cannot do.

    Cost: one forward pass a new image; sealing reads the listing's embeddings once. Peak memory a
    worker: the model and about five blocks of BATCH_ROWS images, 64 MB of files on their way; the
    store's index is 24 bytes an embedding in Ray's object store; the driver holds failures alone.
    """
    asked: dict[str, Any] = {"version": 3, "options": config}
    inputs = [images, encoder.image_fingerprint]
    # All failures are tried again, so only an artifact without any is known to be what comes out.
    complete = store.reuse("embed_images", inputs=inputs, **asked)
    if complete is not None:
        return complete
    if spec.decode_on_gpu:
        device_crop(encoder.crop)  # refuses here what the actors could not do
    begun = time.perf_counter()
    embeddings = EmbeddingStore.of(store.path, encoder.image_fingerprint)
    index, n_lacking = ray.put(Index.empty()), images.n_rows
    stored = embeddings.names()
    if stored:
        index = extend_index(embeddings, stored, index)
        n_lacking -= sum(count_stored(images, index))
    store.progress.start("embed_images", n_lacking, "images")
    filled = _Filled()
    if n_lacking:
        _fill(filled, store.progress, config, spec, encoder, images, embeddings, index, n_gpus)
        index = extend_index(embeddings, filled.names, index)
    failures = filled.failures()
    _check_failures(filled.failed, images.n_rows, images.n_rows, config.max_failures)

    def write(writer: ArtifactWriter) -> None:
        writer.parts += seal_stored(writer.folder, config.part_rows, images, embeddings, index)
        writer.add_file("failures.parquet", table_bytes(failures), failures.num_rows)
        writer.facts["precision"] = spec.precision
        writer.facts["n_new"] = n_lacking - failures.num_rows
        writer.facts["n_reused"] = images.n_rows - n_lacking
        writer.facts["n_failed"] = failures.num_rows
        writer.facts |= filled.speed(begun)
        writer.note_memory(filled.memory_gb)

    if failures.num_rows:
        inputs.append(hash_of(failures["image_id"].to_pylist()))
    return store.run_stage("embed_images", inputs=inputs, write=write, begun=begun, **asked)


class LoadImages:
    """Read a batch of images, and decode them; a bad one becomes an error, not an exception."""

    def __init__(self, crop: Crop | None, size: tuple[int, int]) -> None:
        """How to decode.

        Args:
            crop: the encoder's resize and crop; None leaves decoding to the encoder's device.
            size: height and width of the pixels.
        """
        self._crop = crop
        self._shape = (*size, 3)

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        """`image_id`, `key` and `uri` of the batch, `pixels` or `file`, and what each took."""
        n = batch.num_rows
        pixels = np.zeros((n if self._crop else 0, *self._shape), dtype=np.uint8)
        files = [b""] * n
        step, error = [""] * n, [""] * n
        read_s, decode_s = np.zeros(n), np.zeros(n)
        for row, data, failed, seconds in read_images(batch):
            read_s[row] = seconds
            if data is None:
                step[row], error[row] = "download", failed
                continue
            if self._crop is None:
                files[row] = data
                continue
            start = time.perf_counter()
            try:
                pixels[row] = decode_image(data, self._crop)
            except ValueError as reason:
                step[row], error[row] = "decode", str(reason)
            decode_s[row] = time.perf_counter() - start
        return {
            "image_id": batch["image_id"].to_numpy(),
            # As bytes in rows, since strings of bytes lose the zeros they end with on the way.
            "key": image_keys(batch).view(np.uint8).reshape(n, KEY_BYTES),
            "uri": batch["uri"].to_pylist(),
            **({"pixels": pixels} if self._crop else {"file": np.array(files, dtype=object)}),
            "step": step,
            "error": error,
            "read_s": read_s,
            "decode_s": decode_s,
        }


class EncodePixels:
    """One encoder on one device; adds what it embeds to the store and reports it."""

    def __init__(
        self,
        spec: EncoderSpec,
        batch_size: int | None,
        n_threads: int,
        embeddings: EmbeddingStore,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        self._encoder = spec.load("cuda" if on_gpu else "cpu")
        self._decoder = GpuDecoder(self._encoder) if spec.decode_on_gpu else None
        self._batch_size = batch_size or (256 if on_gpu else 16)
        # On CPU a pass a thread: threads that share a pass wait for each other in every layer,
        # the longer the more often decoding takes one of their cores.
        self._at_once = BATCH_ROWS if on_gpu else self._batch_size
        self._passes = ThreadPoolExecutor(
            1 if on_gpu else n_threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        self._embeddings = embeddings

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Store the embeddings of a batch; one row of report."""
        decode_s = float(batch["decode_s"].sum())
        if self._decoder is not None:
            batch, seconds = self._passes.submit(self._decode, batch, self._decoder).result()
            decode_s += seconds
        began = time.time()
        encode_s = 0.0
        good = np.array([not error for error in batch["error"]], dtype=bool)
        name = ""
        if good.any():
            embedding, encode_s = self._encode(batch["pixels"][good])
            keys = np.ascontiguousarray(batch["key"][good]).view(f"S{KEY_BYTES}")[:, 0]
            name = self._embeddings.append(keys, embedding.astype(np.float16))
        failed = pa.table({name: batch[name][~good] for name in FAILURES.names})
        return {
            "name": [name],
            "rows": [len(good)],
            "failed": [failed.cast(FAILURES).to_pylist()],
            "read_s": [float(batch["read_s"].sum())],
            "decode_s": [decode_s],
            "encode_s": [encode_s],
            "began": [began],
            "ended": [time.time()],
            "memory_gb": [own_memory_gb()],
        }

    def _encode(
        self, pixels: NDArray[np.uint8] | torch.Tensor
    ) -> tuple[NDArray[np.float32], float]:
        """Embeddings, and the seconds of all passes together."""

        def encode(start: int) -> tuple[NDArray[np.float32], float]:
            begun = time.perf_counter()
            some = pixels[start : start + self._at_once]
            embedding = self._encoder.encode_images(some, batch_size=self._batch_size)
            return embedding, time.perf_counter() - begun

        done = self._passes.map(encode, range(0, len(pixels), self._at_once))
        embeddings, seconds = zip(*done, strict=True)
        return np.concatenate(embeddings), sum(seconds)

    @staticmethod
    def _decode(batch: dict[str, Any], decoder: GpuDecoder) -> tuple[dict[str, Any], float]:
        """The batch with pixels on the device and with the errors of decoding; its seconds."""
        begun = time.perf_counter()
        step, error = (batch[name].astype(object) for name in ("step", "error"))
        read = np.flatnonzero(error == "")
        pixels, errors = decoder([batch["file"][row] for row in read])
        bad = [bool(reason) for reason in errors]
        step[read[bad]], error[read] = "decode", errors
        everything = pixels.new_zeros(len(error), *pixels.shape[1:])
        everything[torch.from_numpy(read)] = pixels
        decoded = {**batch, "pixels": everything, "step": step, "error": error}
        return decoded, time.perf_counter() - begun


@dataclass
class _Filled:
    """What the stream reported."""

    names: list[str] = field(default_factory=list)
    """Files it added to the store."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    n_seen: int = 0
    memory_gb: float = 0.0
    batches: list[tuple[float, float, int]] = field(default_factory=list)
    """When encoding of a batch began and ended, and its images."""
    read_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    workers: Workers | None = None

    def add(self, report: dict[str, Any]) -> None:
        """Take in the report of a batch."""
        if report["name"]:
            self.names.append(report["name"])
        self.failed += report["failed"]
        self.n_seen += report["rows"]
        self.memory_gb = max(self.memory_gb, report["memory_gb"])
        self.batches.append((report["began"], report["ended"], report["rows"]))
        self.read_s += report["read_s"]
        self.decode_s += report["decode_s"]
        self.encode_s += report["encode_s"]

    def failures(self) -> pa.Table:
        """The images that failed, sorted."""
        return pa.Table.from_pylist(self.failed, FAILURES).sort_by("image_id")

    def speed(self, begun: float) -> dict[str, Any]:
        """Images/s from the first batch to the last, and what each step alone could do."""
        if self.workers is None or not self.batches:
            return {}
        began, ended, rows = zip(*sorted(self.batches, key=lambda batch: batch[1]), strict=True)
        started = time.time() - time.perf_counter() + begun
        whole, n = ended[-1] - ended[0], self.n_seen - rows[0]
        if not n:
            whole, n = ended[0] - began[0], rows[0]
        encoders = self.workers
        n_free = ray.cluster_resources().get("CPU", 1) - encoders.n * encoders.num_cpus
        n_decoders = max(1, int(n_free / DECODE_CPUS))
        n_passes = encoders.n * (1 if encoders.num_gpus else encoders.n_threads)
        able = {
            "download": READS_IN_FLIGHT * n_decoders / max(self.read_s, 1e-9),
            "decode": n_decoders / max(self.decode_s, 1e-9),
            "encode": n_passes / max(self.encode_s, 1e-9),
        }
        rates = {f"{step}_per_s": round(rate * self.n_seen, 1) for step, rate in able.items()}
        return {
            "startup_s": round(min(began) - started, 1),
            "images_per_s": round(n / whole, 1),
            **rates,
            "bottleneck": min(able, key=lambda step: able[step]),
        }


def _encoders(workers: Workers) -> ActorPoolStrategy:
    """The encoders, all of them from the start: Ray adds actors late, if at all.

    Each takes two blocks at a time, so that its cores do not wait while one ends.
    """
    return ActorPoolStrategy(
        size=workers.n, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )


def _fill(
    filled: _Filled,
    progress: Progress,
    config: EmbedImagesConfig,
    spec: EncoderSpec,
    encoder: Encoder,
    images: Artifact,
    embeddings: EmbeddingStore,
    index: ObjectRef[Index],
    n_gpus: int | None,
) -> None:
    """Embed what the store lacks."""
    workers = filled.workers = Workers.over_cluster(config.n_encoders, n_gpus)
    parts = [{"part": part.name} for part in images.manifest.parts]
    with warnings.catch_warnings():
        # Ray 2.64 is to take the restarts of an actor in another way; pyproject.toml stays below.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        reports = (
            ray.data.from_items(parts, override_num_blocks=len(parts))
            .map_batches(
                read_lacking,  # type: ignore[arg-type]
                fn_kwargs={"listing": images.folder, "index": [index]},
                batch_format="pyarrow",
            )
            .repartition(target_num_rows_per_block=BATCH_ROWS)
            .map_batches(
                LoadImages(None if spec.decode_on_gpu else encoder.crop, encoder.image_size),  # type: ignore[arg-type]
                batch_size=BATCH_ROWS,
                batch_format="pyarrow",
                num_cpus=DECODE_CPUS,
            )
            .map_batches(
                EncodePixels,  # type: ignore[arg-type]
                fn_constructor_args=(spec, config.image_batch_size, workers.n_threads, embeddings),
                batch_size=BATCH_ROWS,
                max_restarts=RESTARTS,
                # Restarts are what ends it: tries are spent in seconds on a node that is gone and
                # not yet known to be.
                max_task_retries=-1,
                compute=_encoders(workers),
                num_cpus=workers.num_cpus,
                num_gpus=workers.num_gpus or None,
            )
        )
    failures = Counter("tac_ray_images_failed_total", "Images that could not be read.")
    for report in reports.iter_rows():
        filled.add(report)
        if report["failed"]:
            failures.inc(len(report["failed"]))
        n_failed = len(filled.failed)
        progress.advance(report["rows"], f"{n_failed} failed" if n_failed else "")
        _check_failures(filled.failed, filled.n_seen, images.n_rows, config.max_failures)


def _check_failures(
    failed: list[dict[str, Any]], n_seen: int, n_images: int, allowed: float
) -> None:
    """Stop a run whose input is plainly wrong.

    Raises:
        ValueError: more failures than allowed, or nothing but failures.
    """
    n_failed = len(failed)
    most = allowed if allowed >= 1 else allowed * n_images
    if n_failed and (n_failed > most or n_failed == n_seen >= min(FEW, n_images)):
        first = min(failed, key=lambda failure: failure["image_id"])
        raise ValueError(
            f"{n_failed} of {n_seen} images could not be read and --max-failures "
            f"{allowed:g} allows {int(most)} of {n_images}; the first: {first['uri']}: "
            f"{first['error']}"
        )
