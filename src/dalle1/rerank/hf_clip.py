"""Scores pictures with a released CLIP or SigLIP in the format of Hugging Face's transformers.

Nothing in a model's files is run: weights are read from safetensors alone, and classes are those of the library. The
library is loaded when a model is, as its import takes seconds and not everybody has it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from dalle1.rerank.hf_preprocessing import Preprocessing, has_preprocessing, read_json, read_preprocessing

# Pictures that are encoded at a time: it bounds the memory, whatever the number of candidates.
_BATCH_SIZE = 64
_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # by a configuration's model_type
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_SHARDS_INDEX = "model.safetensors.index.json"
_SENTENCEPIECE = "spiece.model"
# Files that make up a tokenizer; any of the sets will do.
_TOKENIZERS = ((_SENTENCEPIECE,), ("tokenizer.json",), ("vocab.json", "merges.txt"))
# A repository may hold the same weights in other formats too.
_DOWNLOADED = (
    *(_CONFIG, "preprocessor_config.json", "processor_config.json", "model*.safetensors", _SHARDS_INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", _SENTENCEPIECE),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INSTALL = "pip install '.[hf]' in the project's directory"


class HFCLIPReranker:
    """Cosine similarity of each picture with the prompt, in [-1, 1], from a CLIP or SigLIP.

    SigLIP's own score is a probability; for one prompt it rises with the cosine, so the order is the same. It serves
    SigLIP 2 with pictures of a fixed size as well, whose format is SigLIP's.
    """

    def __init__(self, network: Any, tokenizer: Any, preprocessing: Preprocessing, facts: Mapping[str, Any]) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._facts = dict(facts)
        self._is_siglip = facts["model_type"] == "siglip"
        self._name = facts["model"]
        self._n_positions = int(network.config.text_config.max_position_embeddings)
        self._vocab_size = int(network.config.text_config.vocab_size)
        self._side = int(network.config.vision_config.image_size)

    @classmethod
    def load(cls, model: str | Path, *, allow_download: bool = False) -> HFCLIPReranker:
        """The reranker of a model, on the CPU.

        Args:
            model: A directory as `save_pretrained` writes it, or the id of a model on the Hugging Face hub.
            allow_download: Whether a model that is not in the hub's local cache may be downloaded.

        Raises: OSError if it, or a part of it, is not there; ValueError if it is damaged, no CLIP or SigLIP, or
            transformers is not installed. Each is one sentence that says what to do.
        """
        name = str(model)
        with _quiet_transformers():
            directory, revision = _find(name, allow_download=allow_download)
            model_type = _read_model_type(directory, name)
            _check_files(directory, name, is_local=revision is None)
            preprocessing = read_preprocessing(directory, model_type)
            tokenizer = _load_tokenizer(directory, model_type, name)
            network = _load_network(directory, model_type, name)
        facts = {"kind": "hf_clip", "model": name, "model_type": model_type, "weights_sha256": _sha256(directory)}
        if revision is not None:
            facts["revision"] = revision
        reranker = cls(network, tokenizer, preprocessing, facts)
        reranker._check_parts_fit()
        return reranker

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies it, plain types.

        `weights_sha256` is the hash of the weights' file, or of its parts read one after another by name; `revision`
        is the commit of the hub's repository, where it is from there.
        """
        return dict(self._facts)

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self._network.to(device)

    def check(self, prompt: str) -> None:
        """Raises: ValueError if the prompt has more tokens than the model's text tower has positions."""
        self._token_ids(prompt)

    @torch.inference_mode()
    def score(
        self, prompt: str, images: Float[Tensor, "n 3 h w"], image_tokens: Int[Tensor, "n gh gw"]
    ) -> Float[Tensor, " n"]:
        """Scores of pictures in [0, 1], on the CPU; higher is better. `image_tokens` are not looked at.

        Raises: ValueError for a prompt that `check` refuses, and for pictures that do not become the model's size.
        """
        text_feature = self._text_feature(prompt)
        scores = [self._image_features(part) @ text_feature for part in torch.split(images, _BATCH_SIZE)]
        # Rounding can carry a cosine just beyond its bounds.
        return torch.cat(scores).clamp(-1, 1).cpu()

    def _text_feature(self, prompt: str) -> Float[Tensor, " d"]:
        """Of length 1."""
        ids = self._token_ids(prompt)
        if self._is_siglip:
            # It was trained on texts filled up to its positions, without a mask, and reads its feature off the last.
            ids += [self._tokenizer.pad_token_id] * (self._n_positions - len(ids))
        output = self._network.get_text_features(input_ids=torch.tensor([ids], device=self._network.device))
        return normalize(_pooled(output), dim=-1)[0]

    def _image_features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Each of length 1."""
        output = self._network.get_image_features(pixel_values=self._prepare(images.to(self._network.device)))
        return normalize(_pooled(output), dim=-1)

    def _prepare(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 side side"]:
        pixels = self._preprocessing(images)
        height, width = pixels.shape[-2:]
        if (height, width) != (self._side, self._side):
            raise ValueError(
                f"pictures must become {self._side} x {self._side} pixels for '{self._name}', but its preprocessing "
                f"makes {height} x {width} of {images.shape[-2]} x {images.shape[-1]}; choose another model or set "
                f"rerank=none"
            )
        return pixels

    def _token_ids(self, prompt: str) -> list[int]:
        """Start and end included, not padded. Raises: ValueError if they do not fit in the text tower."""
        # SigLIP 1 and 2 saw small letters alone; the tokenizers of the second do not see to it.
        text = prompt.lower() if self._is_siglip else prompt
        with _quiet_transformers():
            # Said out loud, because a tokenizer's file may ask for both.
            ids: list[int] = self._tokenizer(text, padding=False, truncation=False)["input_ids"]
        if len(ids) > self._n_positions:
            raise ValueError(
                f"the prompt must have at most {self._n_positions} tokens to be scored by '{self._name}', it has "
                f"{len(ids)}; shorten it or set rerank=none"
            )
        if max(ids) >= self._vocab_size:
            raise ValueError(
                f"the tokenizer of '{self._name}' must make tokens below {self._vocab_size}, as its text tower has no "
                f"more, it makes {max(ids)}; get both from the same source"
            )
        return ids

    def _check_parts_fit(self) -> None:
        """Raises: ValueError if tokenizer, weights and preprocessing are not of one model; it would go unnoticed."""
        text = self._network.config.text_config
        ids = self._token_ids("a")
        # CLIP's tower takes the feature at the first end token, and at the start where there is none. Configurations
        # of the first releases say 2 for it; the library then takes the highest number instead.
        end = max(ids) if text.eos_token_id == 2 else text.eos_token_id
        if not self._is_siglip and (end not in ids or ids.index(end) != len(ids) - 1):
            raise ValueError(
                f"the tokenizer of '{self._name}' must end a text with token {end}, where its text tower looks, it "
                f"makes {ids} of 'a'; get both from the same source"
            )
        if self._is_siglip and self._tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of '{self._name}' must have a padding token; get it again from its source")
        self._prepare(torch.zeros(1, 3, self._side, self._side))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The library, without its progress bars and remarks: what is wrong we say ourselves.

    Raises: ValueError if it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers
            from transformers.utils import logging as library
        except ImportError as error:
            raise ValueError(f"this reranker needs transformers, which is not installed; {_INSTALL}") from error
        if int(transformers.__version__.partition(".")[0]) < 5:
            raise ValueError(f"this reranker needs transformers 5, got {transformers.__version__}; {_INSTALL}")
        verbosity, shows_progress = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
        try:
            yield
        finally:
            library.set_verbosity(verbosity)
            if shows_progress:
                library.enable_progress_bar()


def _find(model: str, *, allow_download: bool) -> tuple[Path, str | None]:
    """The directory of a model, and its commit if it is from the hub. Raises: OSError if there is none."""
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return directory, None
    if directory.exists() or not _HUB_ID.fullmatch(model):
        raise NotADirectoryError(
            f"'{model}' must be a directory with a model, or the id of one on the Hugging Face hub such as "
            f"openai/clip-vit-base-patch32; correct it or set rerank=none"
        )
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
        # Some other program may have fetched one file of it.
        is_complete = _missing_part(directory) is None
    except OSError:
        is_complete = False
    if not is_complete:
        if not allow_download:
            raise FileNotFoundError(
                f"'{model}' is neither a directory nor a model in the local cache of the Hugging Face hub; set "
                f"rerank.allow_download=true to download it, or rerank=none"
            )
        try:
            directory = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_DOWNLOADED)))
        except Exception as error:  # of the client, or of any of the two libraries for HTTP under it
            raise OSError(
                f"'{model}' could not be downloaded from the Hugging Face hub ({_reason(error)}); check its name and "
                f"the network, or set rerank=none"
            ) from error
    return directory, directory.name


def _missing_part(directory: Path) -> str | None:
    """What a model's directory lacks, if anything."""
    parts = {
        f"a {_CONFIG}": (directory / _CONFIG).is_file(),
        f"weights as safetensors ({_WEIGHTS})": all(path.is_file() for path in _weight_files(directory)),
        "a preprocessor_config.json": has_preprocessing(directory),
        f"a tokenizer (tokenizer.json, vocab.json with merges.txt, or {_SENTENCEPIECE})": any(
            all((directory / name).is_file() for name in names) for names in _TOKENIZERS
        ),
    }
    return next((part for part, is_there in parts.items() if not is_there), None)


def _check_files(directory: Path, name: str, *, is_local: bool) -> None:
    """Raises: FileNotFoundError if a part of the model is not there."""
    missing = _missing_part(directory)
    if missing is None:
        return
    if "safetensors" in missing and any(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"'{name}' must have {missing}, it has pickled ones (.bin) alone, which can hold programs and are not "
            f"read; choose another model, or save it again with transformers' save_pretrained"
        )
    # Without a network the hub's client is content with the part that it has.
    source = "it has none" if is_local else "its repository has none or could not be reached"
    raise FileNotFoundError(f"'{name}' must have {missing}, {source}; get the whole model, or set rerank=none")


def _weight_files(directory: Path) -> list[Path]:
    """The file of the weights, or the files it is split into; they need not be there."""
    if (directory / _WEIGHTS).is_file() or not (directory / _SHARDS_INDEX).is_file():
        return [directory / _WEIGHTS]
    parts = read_json(directory / _SHARDS_INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"'{directory / _SHARDS_INDEX}' must have a weight_map; get it again from its source")
    return [directory / name for name in sorted({str(part) for part in parts.values()})]


def _read_model_type(directory: Path, name: str) -> str:
    """Raises: FileNotFoundError without a configuration; ValueError if it is not of a CLIP or SigLIP."""
    path = directory / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"'{name}' must be the directory of a model, it has no {_CONFIG}; correct the path")
    model_type = read_json(path).get("model_type")
    if model_type not in _CLASSES:
        # Those take patches of pictures of any size.
        hint = ", for example a SigLIP 2 without naflex in its name" if model_type == "siglip2" else ""
        raise ValueError(
            f"'{name}' must be a CLIP or SigLIP (model_type clip or siglip), it has model_type {model_type!r}; "
            f"choose another model{hint}"
        )
    return str(model_type)


def _load_tokenizer(directory: Path, model_type: str, name: str) -> Any:
    import transformers

    try:
        if model_type == "clip":
            return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # The first SigLIP's class also takes away punctuation. The second's tokenizer.json is complete by itself.
        is_first = (directory / _SENTENCEPIECE).is_file()
        kind = transformers.SiglipTokenizer if is_first else transformers.PreTrainedTokenizerFast
        return kind.from_pretrained(directory, local_files_only=True)
    except ImportError as error:
        raise ValueError(
            f"the tokenizer of '{name}' needs sentencepiece, which is not installed; {_INSTALL}"
        ) from error
    except Exception as error:  # damaged files make the library raise anything
        raise ValueError(
            f"the tokenizer of '{name}' is damaged ({_reason(error)}); get it again from its source"
        ) from error


def _load_network(directory: Path, model_type: str, name: str) -> Any:
    """In evaluation mode, float32, on the CPU."""
    import transformers

    try:
        network, report = getattr(transformers, _CLASSES[model_type]).from_pretrained(
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
            f"the weights of '{name}' are damaged or not those of its {_CONFIG} ({_reason(error)}); get both again "
            f"from their source"
        ) from error
    return network.eval()


def _sha256(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in _weight_files(directory):
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def _pooled(output: Any) -> Float[Tensor, "n d"]:
    """The features in what the library returns, which differs between its versions."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _reason(error: Exception) -> str:
    """An error of a library in a few words, for the brackets of a sentence."""
    line = next(iter(str(error).strip().splitlines()), "")
    return "".join(filter(str.isprintable, line))[:150].rstrip(" .") or type(error).__name__
