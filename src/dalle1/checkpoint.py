"""Checkpoints that rebuild their model: weights plus one plain `dalle1` record.

The record holds all that using the model needs (kind, configuration, text tokenizer, hash of the dVAE, ...), so a
checkpoint loads without the configuration of its run. There are three forms, and nothing in either can execute:

- what training writes, a Lightning file, read with `weights_only=True`; weights are the averaged ones where training
  kept an average;
- the same in parts, a directory that several devices have written together (`sharded_files`);
- an exported checkpoint, a directory with the weights alone as safetensors and the record as JSON.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle1.atomic_files import atomic, atomic_directory, write_json
from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.sharded_files import Place, find_damage, is_sharded, read_sharded
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer

FORMAT_VERSION = 1
RECORD_KEY = "dalle1"
EMA_KEY = "ema"
SECONDS_KEY = "wall_seconds"
OPTIONS_KEY = "options"  # how it was trained, so that a run does not continue as another one
PLATEAU_KEY = "plateau"  # what a schedule that follows the loss has seen
SHA256_KEY = "weights_sha256"
# An exported checkpoint's files.
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"  # as stage=tokenizer writes it; the record has it too
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


def write_exported(directory: str | Path, model: nn.Module, record: Mapping[str, Any], *, step: int) -> str:
    """Write a model as an exported checkpoint: a new directory with `config.json` and `model.safetensors`.

    And with `tokenizer.json`, where the record has a text tokenizer.
    `record` is that of `make_record`; `step` counts the optimizer steps that the model was trained for. Returns the
    hash of the weights. The directory appears at once or not at all.

    Raises: FileExistsError if it exists, unless it is empty.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    sha256 = weights_sha256(state)
    with atomic_directory(directory) as partial:
        write_json(partial / CONFIG_NAME, {**record, "step": step, SHA256_KEY: sha256})
        if record["text_tokenizer"]:
            write_json(partial / TOKENIZER_NAME, record["text_tokenizer"])
        with atomic(partial / WEIGHTS_NAME) as temporary:
            # The entry by which other readers know that these are PyTorch's.
            save_file(state, temporary, metadata={"format": "pt"})
            # safetensors makes files that only their owner may read, whatever the umask says.
            temporary.chmod((partial / CONFIG_NAME).stat().st_mode)
    return sha256


class DamagedCheckpointError(ValueError):
    """A file that no checkpoint can be read from."""


def check_sums(path: Path) -> None:
    """Raise DamagedCheckpointError if a byte of a tensor has changed: torch writes sums of them, and does not look.

    A directory is one in parts; of exported checkpoints the hash says that, when they are loaded.
    """
    if path.is_dir():
        if damage := find_damage(path):
            raise DamagedCheckpointError(f"'{path}' is damaged: {damage}; delete it, or copy it again")
    elif path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except Exception:  # a damaged list of contents can raise any error; `read_checkpoint` says what is wrong
            return
        if damaged is not None:
            raise DamagedCheckpointError(
                f"'{path}' is damaged: '{damaged}' in it has another checksum; delete it, or copy it again"
            )


def read_checkpoint(path: str | Path, *, mapped: bool = False, average: bool = True) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, without executing anything in it.

    All come in the form of a file that training writes; one in parts without the optimizer's state.

    Args:
        path: The file or directory.
        mapped: Leave the tensors of a file on the disk until they are used.
        average: Of a checkpoint in parts read no trained weights that have an average; else no averages.

    Raises: FileNotFoundError if there is none; DamagedCheckpointError, or another ValueError if it is not ours or of a
        newer format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}'; correct the path")
    try:
        if is_sharded(path):
            content = read_sharded(path, wanted=_averages_first if average else _trained)
        elif path.is_dir():
            content = _read_exported(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise any error
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise DamagedCheckpointError(
            f"'{path}' is not a checkpoint that can be read safely ({reason}); give checkpoints/last.ckpt of a stage; "
            "if it is that, it is damaged: delete it and train the stage again"
        ) from error
    record = content.get(RECORD_KEY) if isinstance(content, dict) else None
    if not isinstance(record, dict):
        raise ValueError(f"'{path}' must hold a '{RECORD_KEY}' record, as all our checkpoints do; it has none")
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' must have format version {FORMAT_VERSION}, got {record.get('format_version')!r}; "
            "use the dalle1 version that wrote it"
        )
    missing = [name for name in _RECORD_FIELDS if name not in record]
    if path.is_dir() and not is_sharded(path):
        missing += [name for name in ("step", SHA256_KEY) if name not in record]
    else:
        missing += [name for name in ("state_dict", "global_step") if name not in content]
    if missing:
        raise ValueError(f"'{path}' must hold all parts of a checkpoint, it lacks {', '.join(missing)}")
    return content


def training_options(path: str | Path) -> dict[str, Any]:
    """How a checkpoint's model was trained, by group, such as `optim`; nothing for exported checkpoints.

    Raises: as `read_checkpoint`.
    """
    return dict(read_checkpoint(path, mapped=Path(path).is_file()).get(OPTIONS_KEY, {}))


def weights_of(content: Mapping[str, Any], *, average: bool = True) -> dict[str, Tensor]:
    """The network's weights in what `read_checkpoint` gave, averages where there are such unless not wanted."""
    state = {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(_MODEL_PREFIX)
    }
    return state | (content.get(EMA_KEY, {}) if average else {})


def build_model(record: Mapping[str, Any]) -> DVAE | CLIP | DalleTransformer:
    """The network that a record describes, with initial weights. Raises: TypeError or ValueError if it is unknown."""
    config_type, model_type = _KINDS[record["kind"]]
    return cast("DVAE | CLIP | DalleTransformer", model_type(config_type(**record["model_config"])))


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


def text_tokenizer_of(loaded: Loaded[DalleTransformer] | Loaded[CLIP], name: str) -> TextTokenizer:
    """The text tokenizer of a checkpoint, called `name` in messages. Raises: ValueError if it has none."""
    if loaded.text_tokenizer is None:
        raise ValueError(f"the {name} checkpoint must hold a text tokenizer, it has none; train that stage again")
    return loaded.text_tokenizer


def _averages_first(place: Place, places: Collection[Place]) -> bool:
    """Whether a tensor of a checkpoint in parts is an average, or a weight without one."""
    name = str(place[-1]).removeprefix(_MODEL_PREFIX)
    return place[0] == EMA_KEY or (place[0] == "state_dict" and (EMA_KEY, name) not in places)


def _trained(place: Place, _: Collection[Place]) -> bool:
    return place[0] == "state_dict"


def _read_exported(directory: Path) -> dict[str, Any]:
    """An exported checkpoint's content under the names that training gives it."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"'{directory}' must be an exported checkpoint, it has no {name}; "
                "of a stage's results give the file checkpoints/last.ckpt"
            )
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "format_version" not in config:
        return {}
    state = load_file(directory / WEIGHTS_NAME)
    return {
        RECORD_KEY: config,
        "state_dict": {_MODEL_PREFIX + name: tensor for name, tensor in state.items()},
        "global_step": config.get("step"),
        SHA256_KEY: config.get(SHA256_KEY),
    }


def _load(path: str | Path, kind: str) -> Loaded[Any]:
    if not Path(path).exists():
        raise FileNotFoundError(f"no {kind} at '{path}'; train it (stage={kind}) or correct the path")
    if Path(path).is_file() or is_sharded(path):
        check_sums(Path(path))
    content = read_checkpoint(path, mapped=True)
    record = content[RECORD_KEY]
    if record["kind"] != kind:
        raise ValueError(f"'{path}' must hold a {kind}, got a {record['kind']}; give the checkpoint of stage={kind}")
    try:
        model = build_model(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}' has a configuration that this version of dalle1 does not know: {error}") from error
    state = weights_of(content)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{path}' does not fit its own configuration: {reason}") from error
    sha256 = weights_sha256(model.state_dict())
    if content.get(SHA256_KEY, sha256) != sha256:
        raise ValueError(
            f"'{path}' is damaged: its weights must have the hash that its {CONFIG_NAME} names, "
            f"{str(content[SHA256_KEY])[:12]}, got {sha256[:12]}; make or copy it again"
        )
    tokenizer = record["text_tokenizer"]
    return Loaded(
        model=model.eval().requires_grad_(False),
        sha256=sha256,
        step=content["global_step"],
        text_tokenizer=TextTokenizer.from_dict(tokenizer) if tokenizer else None,
        dvae_sha256=record["dvae_sha256"],
        caption_dropout=record["caption_dropout"],
    )
