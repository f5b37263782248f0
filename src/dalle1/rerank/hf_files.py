"""Files of models in the format of Hugging Face's transformers: found, checked and loaded; nothing in them is run.

Weights are read from safetensors alone, and classes are those of the library. The library is loaded when a model is,
as its import takes seconds and not everybody has it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle1.rerank.hf_preprocessing import has_preprocessing, read_json

SENTENCEPIECE = "spiece.model"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_SHARDS_INDEX = "model.safetensors.index.json"
# Files that make up a tokenizer; any of the sets will do.
_TOKENIZERS = ((SENTENCEPIECE,), ("tokenizer.json",), ("vocab.json", "merges.txt"))
# A repository may hold the same weights in other formats too.
_DOWNLOADED = (
    *(_CONFIG, "preprocessor_config.json", "processor_config.json", "model*.safetensors", _SHARDS_INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", SENTENCEPIECE),
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INSTALL = "pip install '.[hf]' in the project's directory"


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a model is loaded for: what it may be, and what messages say can be done without it."""

    classes: Mapping[str, str]  # the library's class by a configuration's model_type
    kinds: str  # those, in words
    needs_tokenizer: bool
    allow_download: str  # how that is said
    otherwise: str  # what to do without the model


RANKING = Use(
    classes={"clip": "CLIPModel", "siglip": "SiglipModel"},
    kinds="a CLIP or SigLIP (model_type clip or siglip)",
    needs_tokenizer=True,
    allow_download="set rerank.allow_download=true",
    otherwise="set rerank=none",
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """The library, without its progress bars and remarks: what is wrong we say ourselves.

    Raises: ValueError if it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers
            from transformers.utils import logging as library
        except ImportError as error:
            raise ValueError(f"this model needs transformers, which is not installed; {INSTALL}") from error
        if int(transformers.__version__.partition(".")[0]) < 5:
            raise ValueError(f"this model needs transformers 5, got {transformers.__version__}; {INSTALL}")
        verbosity, shows_progress = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
        try:
            yield
        finally:
            library.set_verbosity(verbosity)
            if shows_progress:
                library.enable_progress_bar()


def find_model(model: str, *, allow_download: bool, use: Use) -> tuple[Path, str | None]:
    """The directory of a model, and its commit if it is from the hub. Raises: OSError if there is none."""
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return directory, None
    if directory.exists() or not HUB_ID.fullmatch(model):
        raise NotADirectoryError(
            f"'{model}' must be a directory with a model, or the id of one on the Hugging Face hub such as "
            f"openai/clip-vit-base-patch32; correct it or {use.otherwise}"
        )
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
        # Some other program may have fetched one file of it.
        is_complete = _missing_part(directory, use) is None
    except OSError:
        is_complete = False
    if not is_complete:
        if not allow_download:
            raise FileNotFoundError(
                f"'{model}' is neither a directory nor a model in the local cache of the Hugging Face hub; "
                f"{use.allow_download} to download it, or {use.otherwise}"
            )
        try:
            directory = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_DOWNLOADED)))
        except Exception as error:  # of the client, or of any of the two libraries for HTTP under it
            raise OSError(
                f"'{model}' could not be downloaded from the Hugging Face hub ({short_reason(error)}); check its "
                f"name and the network, or {use.otherwise}"
            ) from error
    return directory, directory.name


def _missing_part(directory: Path, use: Use) -> str | None:
    """What a model's directory lacks, if anything."""
    parts = {
        f"a {_CONFIG}": (directory / _CONFIG).is_file(),
        f"weights as safetensors ({_WEIGHTS})": all(path.is_file() for path in _weight_files(directory)),
        "a preprocessor_config.json": has_preprocessing(directory),
        f"a tokenizer (tokenizer.json, vocab.json with merges.txt, or {SENTENCEPIECE})": not use.needs_tokenizer
        or any(all((directory / name).is_file() for name in names) for names in _TOKENIZERS),
    }
    return next((part for part, is_there in parts.items() if not is_there), None)


def check_files(directory: Path, name: str, *, is_local: bool, use: Use) -> None:
    """Raises: FileNotFoundError if a part of the model is not there."""
    missing = _missing_part(directory, use)
    if missing is None:
        return
    if "safetensors" in missing and any(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"'{name}' must have {missing}, it has pickled ones (.bin) alone, which can hold programs and are not "
            f"read; choose another model, or save it again with transformers' save_pretrained"
        )
    # Without a network the hub's client is content with the part that it has.
    source = "it has none" if is_local else "its repository has none or could not be reached"
    raise FileNotFoundError(f"'{name}' must have {missing}, {source}; get the whole model, or {use.otherwise}")


def _weight_files(directory: Path) -> list[Path]:
    """The file of the weights, or the files it is split into; they need not be there."""
    if (directory / _WEIGHTS).is_file() or not (directory / _SHARDS_INDEX).is_file():
        return [directory / _WEIGHTS]
    parts = read_json(directory / _SHARDS_INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"'{directory / _SHARDS_INDEX}' must have a weight_map; get it again from its source")
    return [directory / name for name in sorted({str(part) for part in parts.values()})]


def read_model_type(directory: Path, name: str, use: Use) -> str:
    """Raises: FileNotFoundError without a configuration; ValueError if it is of another kind."""
    path = directory / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"'{name}' must be the directory of a model, it has no {_CONFIG}; correct the path")
    model_type = read_json(path).get("model_type")
    if model_type not in use.classes:
        # Those take patches of pictures of any size.
        hint = ", for example a SigLIP 2 without naflex in its name" if model_type == "siglip2" else ""
        raise ValueError(f"'{name}' must be {use.kinds}, it has model_type {model_type!r}; choose another model{hint}")
    return str(model_type)


def load_network(directory: Path, class_name: str, name: str) -> Any:
    """The network of a directory, in evaluation mode, float32, on the CPU.

    Raises: ValueError if its weights are damaged.
    """
    import transformers

    try:
        network, report = getattr(transformers, class_name).from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",  # a configuration could name a kernel to be downloaded
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it would say no more than that there are some
        )
        # The library would start these from random numbers.
        wrong = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        if wrong:
            raise ValueError(f"tensors missing or of another shape: {len(wrong)}, the first {wrong[0]}")
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            raise ValueError("some numbers are not finite")
    except Exception as error:  # damaged files make the library raise anything
        raise ValueError(
            f"the weights of '{name}' are damaged or not those of its {_CONFIG} ({short_reason(error)}); get both "
            f"again from their source"
        ) from error
    return network.eval()


def hash_weights(directory: Path) -> str:
    """SHA-256 of the weights' file, or of its parts read one after another by name."""
    digest = hashlib.sha256()
    for path in _weight_files(directory):
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def short_reason(error: Exception) -> str:
    """An error of a library in a few words, for the brackets of a sentence."""
    line = next(iter(str(error).strip().splitlines()), "")
    return "".join(filter(str.isprintable, line))[:150].rstrip(" .") or type(error).__name__
