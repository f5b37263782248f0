"""Checkpoints that rebuild their model: a Lightning file plus one plain `dalle1` record.

The record holds all that using the model needs (kind, configuration, text tokenizer, hash of the dVAE, ...), so a
file loads without the configuration of its run, and always with `weights_only=True`: nothing in it can execute.
Weights are the averaged ones where training kept an average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer

FORMAT_VERSION = 1
RECORD_KEY = "dalle1"
EMA_KEY = "ema"
SECONDS_KEY = "wall_seconds"
OPTIONS_KEY = "options"  # how it was trained, so that a run does not continue as another one
_RECORD_FIELDS = ("kind", "model_config", "text_tokenizer", "dvae_sha256", "caption_dropout")
# Lightning modules hold the trained network under this name.
_MODEL_PREFIX = "model."

_KINDS: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "dvae": (DVAEConfig, DVAE),
    "clip": (CLIPConfig, CLIP),
    "transformer": (TransformerConfig, DalleTransformer),
}
Model = TypeVar("Model", DVAE, CLIP, DalleTransformer)


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[Model]):
    """A model in evaluation mode and what its checkpoint says of it."""

    model: Model
    sha256: str  # of the weights
    step: int  # optimizer steps that it was trained for
    text_tokenizer: TextTokenizer | None
    dvae_sha256: str | None  # the dVAE whose tokens a transformer was trained on
    caption_dropout: float  # share of captions left out in training; above 0 allows guidance


def make_record(
    model: DVAE | CLIP | DalleTransformer,
    *,
    text_tokenizer: TextTokenizer | None = None,
    dvae_sha256: str | None = None,
    caption_dropout: float = 0.0,
) -> dict[str, Any]:
    """The plain-type record that rebuilds `model` (see the module's docstring)."""
    kind = next(name for name, (_, model_type) in _KINDS.items() if isinstance(model, model_type))
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "model_config": asdict(model.config),
        "text_tokenizer": text_tokenizer.to_dict() if text_tokenizer else None,
        "dvae_sha256": dvae_sha256,
        "caption_dropout": caption_dropout,
    }


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of named tensors: names, shapes, types and bytes; independent of how they were saved."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        # As bytes, because numpy has no bfloat16; a scalar needs an axis to be viewed so.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file on the CPU, without executing anything in it.

    Raises: FileNotFoundError if there is no such file; ValueError if it is damaged, not ours or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'; correct the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any error
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise ValueError(f"'{path}' is not a checkpoint that can be read safely ({reason})") from error
    record = content.get(RECORD_KEY) if isinstance(content, dict) else None
    if not isinstance(record, dict):
        raise ValueError(f"'{path}' must hold a '{RECORD_KEY}' record, as checkpoints of train.py do; it has none")
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' must have format version {FORMAT_VERSION}, got {record.get('format_version')!r}; "
            "use the dalle1 version that wrote it"
        )
    missing = [name for name in _RECORD_FIELDS if name not in record]
    missing += [name for name in ("state_dict", "global_step") if name not in content]
    if missing:
        raise ValueError(f"'{path}' must hold all parts of a checkpoint, it lacks {', '.join(missing)}")
    return cast("dict[str, Any]", content)


def load_dvae(path: str | Path) -> Loaded[DVAE]:
    """The dVAE in a checkpoint. Raises: as `read_checkpoint`, and ValueError if it holds something else."""
    return _load(path, "dvae")


def load_clip(path: str | Path) -> Loaded[CLIP]:
    """The CLIP in a checkpoint. Raises: as `read_checkpoint`, and ValueError if it holds something else."""
    return _load(path, "clip")


def load_transformer(path: str | Path) -> Loaded[DalleTransformer]:
    """The transformer in a checkpoint. Raises: as `read_checkpoint`, and ValueError if it holds something else."""
    return _load(path, "transformer")


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The dVAE in a checkpoint as an image tokenizer. Raises: as `load_dvae`."""
    loaded = load_dvae(path)
    return ImageTokenizer(loaded.model, sha256=loaded.sha256)


def check_pair(transformer: Loaded[DalleTransformer], image_tokenizer: ImageTokenizer) -> None:
    """Raise ValueError unless the transformer was trained on the tokens of this very dVAE."""
    if transformer.dvae_sha256 != image_tokenizer.sha256:
        raise ValueError(
            f"the transformer needs the dVAE it was trained with, {str(transformer.dvae_sha256)[:12]}, "
            f"got {image_tokenizer.sha256[:12]}; give that dVAE's checkpoint, or train the transformer again"
        )


def _load(path: str | Path, kind: str) -> Loaded[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} at '{path}'; train it (stage={kind}) or correct the path")
    content = read_checkpoint(path)
    record = content[RECORD_KEY]
    if record["kind"] != kind:
        raise ValueError(f"'{path}' must hold a {kind}, got a {record['kind']}; give the checkpoint of stage={kind}")
    config_type, model_type = _KINDS[kind]
    try:
        model = model_type(config_type(**record["model_config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}' has a configuration that this version of dalle1 does not know: {error}") from error
    state = {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(_MODEL_PREFIX)
    }
    state |= content.get(EMA_KEY, {})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{path}' does not fit its own configuration: {reason}") from error
    tokenizer = record["text_tokenizer"]
    return Loaded(
        model=model.eval().requires_grad_(False),
        sha256=weights_sha256(model.state_dict()),
        step=content["global_step"],
        text_tokenizer=TextTokenizer.from_dict(tokenizer) if tokenizer else None,
        dvae_sha256=record["dvae_sha256"],
        caption_dropout=record["caption_dropout"],
    )
