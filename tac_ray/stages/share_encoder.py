"""The encoder's weights in the store, where all workers of a cluster find them."""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.encoders.clip import Encoder, EncoderSpec

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class SharedEncoder(EncoderSpec):
    """An encoder that workers load from the store: none asks a model hub or the driver's disk."""

    folder: Folder

    def load(self, device: str = "cpu") -> Encoder:
        """Bring the weights to this machine and load them."""
        with tempfile.TemporaryDirectory() as local:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (Path(local) / name).write_bytes(self.folder.read(name))
            options = {f.name: getattr(self, f.name) for f in dataclasses.fields(EncoderSpec)}
            here = {**options, "model": f"local-dir:{local}", "pretrained": None}
            return EncoderSpec(**here).load(device)


def share_encoder(store: Store, spec: EncoderSpec, encoder: Encoder) -> EncoderSpec:
    """Write an encoder to the store, as a folder that open_clip reads.

    Args:
        store: where artifacts lie.
        spec: of the encoder.
        encoder: the same, loaded.

    Returns:
        What workers load instead, with the same bits. One with a tokenizer of Hugging Face, whose
        files would have to come along, stays as it is: workers load it from where it is.

    Cost: the weights once over the network, and once to each worker.
    """
    if not encoder.has_plain_tokenizer:
        return spec

    def write(writer: ArtifactWriter) -> None:
        writer.add_file(CONFIG_FILE, json.dumps(encoder.configuration()).encode())
        writer.add_file(WEIGHTS_FILE, save(encoder.weights()))

    artifact = store.run_stage(
        "share_encoder",
        version=1,
        options={},
        inputs=[encoder.image_fingerprint, encoder.text_fingerprint],
        write=write,
    )
    return SharedEncoder(**dataclasses.asdict(spec), folder=artifact.folder)
