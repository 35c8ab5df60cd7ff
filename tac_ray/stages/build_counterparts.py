"""What each image would be in words (Eq. 7, 8)."""

import numpy as np
import pyarrow as pa
import torch

from tac_ray.algorithm.counterparts import text_counterparts
from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import matrix, matrix_column
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.config import BuildCounterpartsConfig
from tac_ray.stages.parts import map_parts

BATCH_ROWS = 4096
"""Images a matrix product."""


def build_counterparts(
    store: Store, config: BuildCounterpartsConfig, images: Artifact, selected: Artifact
) -> Artifact:
    """Text counterparts of all images, a task a part.

    Args:
        store: where artifacts lie.
        config: temperature and precision.
        images: artifact of embed_images.
        selected: artifact of select_nouns.

    Returns:
        Aligned with `images`: `embedding` float16; `noun_id` and `weight`, fixed-size lists of
        the 3 strongest nouns; `standing`, how far the most similar noun stands out.

    Cost: 4 N M d operations. Peak memory a worker: 4 M d + 8 BATCH_ROWS M bytes and one part.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(images.n_rows, "images")
        arguments = (
            (writer.folder, i, images.folder, part, selected, config)
            for i, part in enumerate(images.manifest.parts)
        )
        for part, memory_gb in map_parts(_build_part, arguments):
            writer.parts.append(part)
            writer.note_memory(memory_gb)
            writer.progress.advance(part.rows)

    return store.run_stage(
        "build_counterparts", version=3, options=config, inputs=[images, selected], write=write
    )


def _build_part(
    folder: Folder,
    index: int,
    images: Folder,
    part: Part,
    selected: Artifact,
    config: BuildCounterpartsConfig,
) -> tuple[Part, float]:
    rows = torch.tensor(matrix(images.read_table(part.name, ["embedding"])["embedding"]))
    nouns = next(selected.tables(["noun_id", "embedding"]))
    noun_embedding = torch.tensor(matrix(nouns["embedding"]))
    built = [
        text_counterparts(
            batch,
            noun_embedding,
            temperature=config.retrieval_temperature,
            precision=config.counterpart_precision,
        )
        for batch in rows.split(BATCH_ROWS)
    ]
    noun_row = torch.cat([b.noun_row for b in built]).numpy()
    table = pa.table(
        {
            "embedding": matrix_column(torch.cat([b.embedding for b in built]).half().numpy()),
            "noun_id": matrix_column(nouns["noun_id"].to_numpy()[noun_row]),
            "weight": matrix_column(
                torch.cat([b.weight for b in built]).numpy().astype(np.float32)
            ),
            "standing": torch.cat([b.standing for b in built]).numpy(),
        }
    )
    return write_part(folder, index, table, plain=True), own_memory_gb()
