"""A dual encoder through open_clip: images and texts into one space."""

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torchvision import transforms

from tac_ray.encoders.prompts import prompts

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Which encoder to load and in which arithmetic; small, so it travels to every worker."""

    model: str
    pretrained: str | None
    precision: str
    resize: int | None = None
    compile: bool = False
    """Compile the image tower with torch.compile: slow to start, for runs of many images."""
    decode_on_gpu: bool = False
    """Decode plain JPEGs by `GpuDecoder`: part of the preprocessing, as pixels differ a little."""

    def load(self, device: str = "cpu") -> "Encoder":
        """Load the weights (seconds, and the size of the model in memory).

        Raises:
            ValueError: unknown architecture or tag, OpenAI weights without QuickGELU, or weights
                of another architecture.
            FileNotFoundError: no such weights.
        """
        return Encoder(self, device)


class Encoder:
    """Image and text tower of one model, in evaluation mode."""

    def __init__(self, spec: EncoderSpec, device: str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._model = _load_model(spec).eval().to(self.device)
        # One shape of batch a run, so that nothing is gained by code for any shape.
        self._encode_image = (
            torch.compile(self._model.encode_image, dynamic=False)
            if spec.compile
            else self._model.encode_image
        )
        self._tokenize = open_clip.get_tokenizer(spec.model)
        preprocess = open_clip.get_model_preprocess_cfg(self._model)
        self.crop = _crop(preprocess, spec.resize)
        self._mean = torch.tensor(preprocess["mean"], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess["std"], device=self.device).view(1, 3, 1, 1)
        size = preprocess["size"]
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        """Height and width of the pixels it takes."""

    @property
    def has_plain_tokenizer(self) -> bool:
        """Whether texts are cut by open_clip's own tokenizer, which needs no files."""
        return isinstance(self._tokenize, SimpleTokenizer)

    def configuration(self) -> dict[str, Any]:
        """What open_clip has to know of the model besides its weights."""
        model = open_clip.get_model_config(self.spec.model)
        return {
            "model_cfg": model,
            "preprocess_cfg": open_clip.get_model_preprocess_cfg(self._model),
        }

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the model, by name, on the CPU."""
        return {n: t.cpu().contiguous().clone() for n, t in self._model.state_dict().items()}

    @functools.cached_property
    def image_fingerprint(self) -> str:
        """Names the embeddings of images: weights, preprocessing and precision."""
        config, vision, _ = self._configs()
        preprocess = open_clip.get_model_preprocess_cfg(self._model)
        # Compiled code and the GPU's decoder round otherwise.
        asked = [name for name in ("compile", "decode_on_gpu") if getattr(self.spec, name)]
        return _hash(
            [config, vision, preprocess, self.spec.resize, *asked],
            {n: t for n, t in self._model.state_dict().items() if n.startswith("visual.")},
            self.spec.precision,
        )

    @functools.cached_property
    def text_fingerprint(self) -> str:
        """Names the embeddings of texts.

        Models that differ in `visual` alone have one, so their nouns are embedded once.
        """
        config, _, text = self._configs()
        return _hash(
            [config, text],
            {
                n: t
                for n, t in self._model.state_dict().items()
                if not n.startswith("visual.") and n not in ("logit_scale", "logit_bias")
            },
            self.spec.precision,
        )

    def _configs(self) -> tuple[dict[str, Any], Any, Any]:
        """What both towers share, the image tower's and the text tower's configuration."""
        config: dict[str, Any] = dict(open_clip.get_model_config(self.spec.model) or {})
        vision, text = config.pop("vision_cfg", None), config.pop("text_cfg", None)
        return config, vision, text

    @functools.cached_property
    def width(self) -> int:
        """d, the width of the embeddings, the same for images and texts."""
        return self.encode_texts([""], batch_size=1).shape[1]

    @torch.inference_mode()
    def encode_images(
        self, pixels: NDArray[np.uint8] | Tensor, *, batch_size: int
    ) -> NDArray[np.float32]:
        """Unit-norm embeddings, (n, d).

        Every forward pass has exactly `batch_size` images, the last one padded, since the bits of
        an embedding depend on the shape of its batch. The embeddings stay on the device until the
        last pass, so that the host waits for the device once.

        Args:
            pixels: cropped images, (n, height, width, 3) uint8, n >= 1; an array, or a tensor on
                any device.
            batch_size: images a forward pass.
        """
        out = []
        for batch in self._batches(pixels, batch_size):
            scaled = (batch.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
            with self._autocast():
                embedding = self._encode_image(scaled)
            out.append(F.normalize(embedding.float(), dim=-1))
        return torch.cat(out)[: len(pixels)].cpu().numpy()

    def _batches(self, pixels: NDArray[np.uint8] | Tensor, batch_size: int) -> Iterator[Tensor]:
        """Batches on the device, (batch_size, height, width, 3) uint8, the last one padded."""
        for start in range(0, len(pixels), batch_size):
            batch = pixels[start : start + batch_size]
            if not isinstance(batch, Tensor):
                # From pinned memory the copy to a GPU runs beside the pass before it.
                pinned = torch.empty(
                    batch.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
                )
                pinned.numpy()[:] = batch
                batch = pinned
            batch = batch.to(self.device, non_blocking=True)
            yield F.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - len(batch)))

    def encode_prompts(self, nouns: Sequence[str], *, batch_size: int) -> Tensor:
        """Embeddings of nouns in every prompt template, (n_nouns, n_templates, d).

        As `encode_texts` gives them, a template at a time, so that what its prompts begin with is
        computed once a row.
        """
        by_template = zip(*map(prompts, nouns), strict=True)
        encoded = [self.encode_texts(texts, batch_size=batch_size) for texts in by_template]
        return torch.stack(encoded, dim=1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int) -> Tensor:
        """Embeddings as the text tower gives them, not normalized, (n, d) float32 on the CPU.

        Where the tower is causal and reads the end-of-text position, texts are sorted by length,
        each batch is cut at its longest, which changes nothing, and the tokens that all texts
        begin with are shared (see `packed_text_forward`). Other towers run at full length.
        """
        tokens = self._tokenize(list(texts))
        tower = _text_tower(self._model)
        packs = _reads_end_of_text(tower)
        lengths = tokens.argmax(dim=1) + 1 if packs else torch.full((len(tokens),), tokens.shape[1])
        same = (tokens == tokens[0]).all(dim=0).cumprod(dim=0).sum()
        n_shared = min(int(same), int(lengths.min()) - 1)
        out = torch.empty(0)
        order = torch.argsort(lengths, stable=True)
        for rows in order.split(batch_size):
            batch = tokens[rows, : int(lengths[rows[-1]])].to(self.device)
            with self._autocast():
                embedding = (
                    packed_text_forward(tower, batch, n_shared)
                    if packs
                    else self._model.encode_text(batch)
                )
            if not len(out):
                out = torch.empty(len(texts), embedding.shape[1])
            out[rows] = embedding.float().cpu()
        return out

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.spec.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def resolve_precision(precision: str, *, on_gpu: bool) -> str:
    """`auto` made definite: fp16 on CUDA; on CPU bf16 where this processor computes in it.

    Elsewhere fp32, since bf16 is emulated there, slowly. Chosen once a run, not by each node.
    """
    if precision != "auto":
        return precision
    if on_gpu:
        return "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def _load_model(spec: EncoderSpec) -> Any:
    has_schema = spec.model.startswith(("local-dir:", "hf-hub:"))
    pretrained = None if has_schema else spec.pretrained
    if not has_schema:
        _check_architecture(spec.model, pretrained)
    elif spec.model.startswith("local-dir:"):
        folder = Path(spec.model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(
                f"no open_clip_config.json in {folder}; --model local-dir: needs a folder with "
                "it and the weights"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Weights of the large layers are held in the precision: autocast alone would convert
            # them in every pass, which on CPU takes longer than bf16 saves.
            return open_clip.create_model(
                spec.model,
                pretrained=pretrained,
                precision=spec.precision,
                require_pretrained=True,
                weights_only=True,
            )
    except (RuntimeError, AssertionError) as error:
        # open_clip asserts the width of positions, and torch lists the tensors that do not fit.
        if isinstance(error, AssertionError) or "loading state_dict" in str(error):
            first = str(error).strip().splitlines()[-1].strip()
            remedy = (
                "put the weights and the configuration of one model into the folder"
                if has_schema
                else "give --model and --pretrained of the same model"
            )
            raise ValueError(
                f"weights {pretrained or spec.model} are not of architecture {spec.model} "
                f"({first}); {remedy}"
            ) from error
        raise FileNotFoundError(
            f"no weights for --model {spec.model} --pretrained {pretrained}: {error}"
        ) from error


def _check_architecture(model: str, pretrained: str | None) -> None:
    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(
            f"unknown --model {model}; use a name of open_clip.list_models(), such as "
            "ViT-B-32-quickgelu, or local-dir:PATH"
        )
    if pretrained is None:
        raise ValueError(f"--model {model} needs --pretrained: an open_clip tag or a path")
    tags = open_clip.list_pretrained_tags_by_model(model)
    base = model.removesuffix("-quickgelu")
    if pretrained.lower() == "openai" and not config.get("quick_gelu", False):
        raise ValueError(
            f"--pretrained openai was trained with QuickGELU and --model {model} has GELU, which "
            f"silently costs accuracy; use --model {base}-quickgelu"
        )
    if pretrained.lower() not in (tag.lower() for tag in tags) and not Path(pretrained).exists():
        raise FileNotFoundError(
            f"no weights {pretrained!r} for --model {model}: neither a file nor one of its tags "
            f"({', '.join(tags) or 'it has none'})"
        )


def _crop(preprocess: dict[str, Any], resize: int | None) -> transforms.Compose:
    config = PreprocessCfg(**preprocess)
    # The last two steps make a normalized tensor, which is the device's work.
    whole: Any = image_transform_v2(config, is_train=False)
    steps = whole.transforms[:-2]
    if resize is not None:
        size = config.size if isinstance(config.size, int) else max(config.size)
        if resize < size:
            raise ValueError(
                f"resize={resize} should be >= the encoder's image size {size}; raise --resize"
            )
        if not isinstance(steps[0], transforms.Resize):
            raise ValueError(
                f"resize={resize} works with encoders that resize the short side; this one uses "
                f"resize_mode={config.resize_mode}; leave out --resize"
            )
        steps[0] = transforms.Resize(resize, interpolation=steps[0].interpolation)
    return transforms.Compose(steps)


def _hash(structure: list[Any], tensors: dict[str, Tensor], precision: str) -> str:
    # The configuration tells what no weight does: activations, heads, pooling.
    described = json.dumps([*structure, precision], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _text_tower(model: Any) -> Any:
    return getattr(model, "text", model)


def _reads_end_of_text(tower: Any) -> bool:
    """Whether nothing behind its end-of-text token has a part in the embedding of a text."""
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = isinstance(getattr(tower, "attn_mask", None), Tensor)
    plain = isinstance(getattr(tower, "transformer", None), nn.Module) and hasattr(
        tower, "token_embedding"
    )
    return causal and plain and pool == "argmax" and getattr(tower, "cls_emb", None) is None


def packed_text_forward(tower: Any, tokens: Tensor, n_shared: int) -> Tensor:
    """The text tower on fewer positions than its context, several texts in each.

    The tokens that all texts begin with stand once at the head of a row, the rest of as many texts
    as the context holds behind it, each at the positions it would have alone. The mask lets a text
    see the head and itself, so every token attends to what it would attend to alone.

    Args:
        tower: a causal text tower of open_clip that reads the end-of-text position.
        tokens: texts of one length, padded after their end-of-text token, (n, length).
        n_shared: leading tokens that are the same in all, fewer than the shortest text has.

    Returns:
        Embeddings as the tower gives them, not normalized, (n, d).

    Cost: one forward of about n (length - n_shared) tokens.
    """
    head, tails = tokens[0, :n_shared], tokens[:, n_shared:]
    length = tails.shape[1]
    n_rows = -(-len(tails) // max(1, (len(tower.positional_embedding) - n_shared) // length))
    n_packed = -(-len(tails) // n_rows)
    filled = F.pad(tails, (0, 0, 0, n_rows * n_packed - len(tails)))
    packed = torch.cat([head.expand(n_rows, -1), filled.reshape(n_rows, -1)], dim=1)
    place = torch.arange(packed.shape[1], device=tokens.device) - n_shared
    position = torch.where(place < 0, place, place % length) + n_shared
    text = torch.where(place < 0, -1, place // length)
    seen = (text == -1) | (text == text[:, None])
    hidden = ~(seen & (position <= position[:, None]))
    dtype = tower.transformer.get_cast_dtype()
    mask = torch.zeros(hidden.shape, dtype=dtype, device=tokens.device)
    mask.masked_fill_(hidden, float("-inf"))
    x = tower.token_embedding(packed).to(dtype) + tower.positional_embedding[position].to(dtype)
    x = tower.ln_final(tower.transformer(x, attn_mask=mask))
    x = x[:, n_shared:].reshape(n_rows * n_packed, length, -1)[: len(tails)]
    x = x[torch.arange(len(x), device=x.device), tails.argmax(dim=1)]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
