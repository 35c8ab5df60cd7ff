"""Images to sealed parts of embeddings, streamed through Ray Data.

listing -> read and decode on CPU -> encode on an actor pool -> staged files -> sealed parts.
Ray Data hands batches on in any order; sealing sorts rows by `image_id` and cuts equal parts, so
the artifact does not depend on how many workers ran.
"""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import FAILURES, matrix, matrix_column
from tac_ray.artifacts.storage import Folder, filesystem, table_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store, resident_gb
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.encoders.decode import Crop, decode_image
from tac_ray.stages.parts import map_parts

BATCH_ROWS = 256
"""Images a Ray Data block: 40 MB of pixels at 224 x 224."""
READS_IN_FLIGHT = 8


def embed_images(
    store: Store,
    config: EmbedImagesConfig,
    spec: EncoderSpec,
    encoder: Encoder,
    images: Artifact,
) -> Artifact:
    """Embed every image of a listing.

    Args:
        store: where artifacts lie.
        config: part size, batch size, workers.
        spec: what the actors load.
        encoder: the same, loaded in the driver for its fingerprint and its crop.
        images: artifact of list_images.

    Returns:
        `image_id` int64 and `embedding` float16 of unit norm, sorted by `image_id`; images that
        cannot be read are in `failures.parquet`.

    Raises:
        ValueError: no image can be read, or more than `max_failures` of them cannot.

    Cost: one forward pass an image. Peak memory a worker: the model and about four blocks of
    BATCH_ROWS images; the driver holds 9 bytes an image.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(images.n_rows, "images")
        staging = Folder(writer.folder.join("staging"))
        staging.remove()
        found = _stream(writer, config, spec, encoder.crop, encoder.image_size, images, staging)
        failures = pa.concat_tables(
            [FAILURES.empty_table(), *[_failures(staging, name) for name, ids, ok in found]]
        ).sort_by("image_id")
        n_failed = failures.num_rows
        if n_failed > config.max_failures * images.n_rows or n_failed == images.n_rows:
            first = failures.slice(0, 1).to_pylist()[0]
            raise ValueError(
                f"{n_failed} of {images.n_rows} images could not be read, more than "
                f"--max-failures {config.max_failures} allows; the first: {first['uri']}: "
                f"{first['error']}"
            )
        writer.parts += _seal(writer.folder, staging, found, config.part_rows)
        writer.add_file("failures.parquet", table_bytes(failures), n_failed)
        writer.facts["n_failed"] = n_failed
        writer.facts["precision"] = spec.precision
        staging.remove()

    return store.run_stage(
        "embed_images",
        version=1,
        options=config,
        inputs=[images, encoder.image_fingerprint],
        write=write,
    )


class LoadPixels:
    """Read and decode a batch of images; a bad one becomes an error, not an exception."""

    def __init__(self, crop: Crop, size: tuple[int, int]) -> None:
        self._crop = crop
        self._blank = np.zeros((*size, 3), dtype=np.uint8)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add `pixels`, `step` and `error` (empty strings where all went well)."""
        start = time.perf_counter()
        with ThreadPoolExecutor(READS_IN_FLIGHT) as readers:
            loaded = list(readers.map(self._load, batch["uri"]))
        seconds = np.full(len(loaded), (time.perf_counter() - start) / max(1, len(loaded)))
        return {
            "image_id": batch["image_id"],
            "uri": batch["uri"],
            "pixels": np.stack([pixels for pixels, _, _ in loaded]),
            "step": np.array([step for _, step, _ in loaded]),
            "error": np.array([error for _, _, error in loaded]),
            "seconds": seconds,
        }

    def _load(self, uri: str) -> tuple[NDArray[np.uint8], str, str]:
        try:
            fs, path = filesystem(uri)
            data: bytes = fs.cat_file(path)  # type: ignore[assignment]
        except OSError as error:
            # Without the path, which `uri` says: equal reasons read the same.
            reason = f"{type(error).__name__}: {error.strerror or error}"
            return self._blank, "download", reason
        try:
            return decode_image(data, self._crop), "", ""
        except ValueError as error:
            return self._blank, "decode", str(error)


class EncodePixels:
    """One encoder on one device; writes what it embeds and reports what it wrote."""

    def __init__(
        self, spec: EncoderSpec, batch_size: int | None, n_threads: int, staging: Folder
    ) -> None:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            torch.set_num_threads(n_threads)
        self._encoder = spec.load("cuda" if on_gpu else "cpu")
        self._batch_size = batch_size or (256 if on_gpu else 16)
        self._staging = staging

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Stage the embeddings of a batch; one row of report."""
        start = time.perf_counter()
        ok = np.array([not error for error in batch["error"]], dtype=bool)
        embedding = np.zeros((len(ok), 0), dtype=np.float16)
        if ok.any():
            good = self._encoder.encode_images(batch["pixels"][ok], batch_size=self._batch_size)
            embedding = np.zeros((len(ok), good.shape[1]), dtype=np.float16)
            embedding[ok] = good.astype(np.float16)
        name = f"{uuid.uuid4().hex}.parquet"
        table = pa.table(
            {
                "image_id": batch["image_id"],
                "uri": pa.array(list(batch["uri"]), pa.string()),
                "step": pa.array(list(batch["step"]), pa.string()),
                "error": pa.array(list(batch["error"]), pa.string()),
            }
        )
        if ok.any():
            table = table.append_column("embedding", matrix_column(embedding))
        self._staging.write(name, table_bytes(table, plain=True))
        return {
            "name": [name],
            "image_id": [batch["image_id"].tolist()],
            "ok": [ok.tolist()],
            "decode_s": [float(batch["seconds"].sum())],
            "encode_s": [time.perf_counter() - start],
            "memory_gb": [resident_gb()],
        }


Staged = tuple[str, NDArray[np.int64], NDArray[np.bool_]]


def _stream(
    writer: ArtifactWriter,
    config: EmbedImagesConfig,
    spec: EncoderSpec,
    crop: Crop,
    size: tuple[int, int],
    images: Artifact,
    staging: Folder,
) -> list[Staged]:
    """Run the stream and say what was staged: file, image ids, which of them are good."""
    resources = ray.cluster_resources()
    n_cpus, n_gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    n_encoders = config.n_encoders or max(1, n_gpus)
    # On CPU an encoder reserves half the cores, so that decoding is not starved, and uses all.
    encoder_cpus = 1 if n_gpus else n_cpus / n_encoders / 2
    fs, _ = filesystem(images.folder.path)
    paths = [filesystem(images.folder.join(p.name))[1] for p in images.manifest.parts]
    reports = (
        ray.data.read_parquet(paths, filesystem=fs, columns=["image_id", "uri"])
        .repartition(target_num_rows_per_block=BATCH_ROWS)
        .map_batches(LoadPixels(crop, size), batch_size=BATCH_ROWS, num_cpus=0.5)  # type: ignore[arg-type]
        .map_batches(
            EncodePixels,  # type: ignore[arg-type]
            fn_constructor_args=(spec, config.image_batch_size, n_cpus, staging),
            batch_size=BATCH_ROWS,
            compute=ActorPoolStrategy(size=n_encoders),
            num_cpus=encoder_cpus,
            num_gpus=1 if n_gpus else None,
        )
    )
    found: list[Staged] = []
    decode_s = encode_s = 0.0
    start, n_failed = time.perf_counter(), 0
    for report in reports.iter_rows():
        ids = np.array(report["image_id"], dtype=np.int64)
        ok = np.array(report["ok"], dtype=bool)
        found.append((report["name"], ids, ok))
        decode_s += report["decode_s"]
        encode_s += report["encode_s"]
        writer.note_memory(report["memory_gb"])
        n_failed += int((~ok).sum())
        writer.progress.advance(len(ids), f"{n_failed} failed" if n_failed else "")
    n = images.n_rows
    writer.facts["images_per_s"] = round(n / (time.perf_counter() - start), 1)
    writer.facts["decode_images_per_s_per_task"] = round(n / decode_s, 1)
    writer.facts["encode_images_per_s_per_actor"] = round(n / encode_s, 1)
    return found


def _failures(staging: Folder, name: str) -> pa.Table:
    table = staging.read_table(name, FAILURES.names)
    return table.filter(pc.field("error") != "").cast(FAILURES)


def _seal(folder: Folder, staging: Folder, found: list[Staged], part_rows: int) -> list[Part]:
    """Cut the good rows, sorted by image_id, into equal parts; one task a part."""
    ids = np.concatenate([ids[ok] for _, ids, ok in found])
    file = np.concatenate([np.full(ok.sum(), i) for i, (_, _, ok) in enumerate(found)])
    order = np.argsort(ids, kind="stable")
    arguments = []
    for index, start in enumerate(range(0, len(ids), part_rows)):
        rows = order[start : start + part_rows]
        names = [found[i][0] for i in np.unique(file[rows])]
        arguments.append((folder, staging, index, names, ids[rows[0]], ids[rows[-1]]))
    return list(map_parts(_seal_part, arguments))


def _seal_part(
    folder: Folder, staging: Folder, index: int, names: list[str], first: int, last: int
) -> Part:
    tables = []
    for name in names:
        table = staging.read_table(name)
        image_id = pc.field("image_id")
        mine = (pc.field("error") == "") & (image_id >= first) & (image_id <= last)
        tables.append(table.filter(mine))
    table = pa.concat_tables([t.select(["image_id", "embedding"]) for t in tables])
    order = np.argsort(table["image_id"].to_numpy(), kind="stable")
    sealed = pa.table(
        {
            "image_id": table["image_id"].to_numpy()[order],
            "embedding": matrix_column(matrix(table["embedding"])[order]),
        }
    )
    return write_part(folder, index, sealed, plain=True)
