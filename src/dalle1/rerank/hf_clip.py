"""Scores pictures with a released CLIP or SigLIP in the format of Hugging Face's transformers.

Nothing in a model's files is run: weights are read from safetensors alone, and classes are those of the library. The
library is loaded when a model is, as its import takes seconds and not everybody has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from dalle1.rerank.hf_files import (
    INSTALL,
    RANKING,
    SENTENCEPIECE,
    Use,
    check_files,
    find_model,
    hash_weights,
    load_network,
    quiet_transformers,
    read_model_type,
    short_reason,
)
from dalle1.rerank.hf_preprocessing import Preprocessing, read_preprocessing

# Pictures that are encoded at a time: it bounds the memory, whatever the number of candidates.
_BATCH_SIZE = 64


class HFCLIPReranker:
    """Cosine similarity of each picture with the prompt, in [-1, 1], from a CLIP or SigLIP.

    SigLIP's own score is a probability; for one prompt it rises with the cosine, so the order is the same. It serves
    SigLIP 2 with pictures of a fixed size as well, whose format is SigLIP's.
    """

    def __init__(
        self, network: Any, tokenizer: Any, preprocessing: Preprocessing, facts: Mapping[str, Any], use: Use = RANKING
    ) -> None:
        self._network = network
        self._use = use
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._facts = dict(facts)
        self._is_siglip = facts["model_type"] == "siglip"
        self._name = facts["model"]
        self._n_positions = int(network.config.text_config.max_position_embeddings)
        self._vocab_size = int(network.config.text_config.vocab_size)
        self._side = int(network.config.vision_config.image_size)

    @classmethod
    def load(cls, model: str | Path, *, allow_download: bool = False, use: Use = RANKING) -> HFCLIPReranker:
        """The reranker of a model, on the CPU.

        Args:
            model: A directory as `save_pretrained` writes it, or the id of a model on the Hugging Face hub.
            allow_download: Whether a model that is not in the hub's local cache may be downloaded.
            use: What messages say of it.

        Raises: OSError if it, or a part of it, is not there; ValueError if it is damaged, no CLIP or SigLIP, or
            transformers is not installed. Each is one sentence that says what to do.
        """
        name = str(model)
        with quiet_transformers():
            directory, revision = find_model(name, allow_download=allow_download, use=use)
            model_type = read_model_type(directory, name, use)
            check_files(directory, name, is_local=revision is None, use=use)
            preprocessing = read_preprocessing(directory, model_type)
            tokenizer = _load_tokenizer(directory, model_type, name)
            network = load_network(directory, use.classes[model_type], name)
        facts = {"kind": "hf_clip", "model": name, "model_type": model_type, "weights_sha256": hash_weights(directory)}
        if revision is not None:
            facts["revision"] = revision
        reranker = cls(network, tokenizer, preprocessing, facts, use)
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
        text_feature = self.text_features([prompt])[0]
        parts = torch.split(images, _BATCH_SIZE)
        scores = [normalize(self.image_features(part), dim=-1) @ text_feature for part in parts]
        # Rounding can carry a cosine just beyond its bounds.
        return torch.cat(scores).clamp(-1, 1).cpu()

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Feature of each prompt, of length 1, on the model's device.

        Raises: ValueError for a prompt that `check` refuses.
        """
        return torch.stack([self._text_feature(prompt) for prompt in prompts])

    @torch.inference_mode()
    def image_features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Features of pictures in [0, 1], of any length, on the model's device.

        Raises: ValueError for pictures that do not become the model's size.
        """
        return self.pixel_features(self.prepare(images.to(self._network.device)))

    @torch.inference_mode()
    def pixel_features(self, pixels: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n d"]:
        """As `image_features`, of what `prepare` made of the pictures, on the model's device."""
        return _pooled(self._network.get_image_features(pixel_values=pixels))

    @property
    def n_features(self) -> int:
        """Of each picture and prompt."""
        config = self._network.config
        return int(config.vision_config.hidden_size if self._is_siglip else config.projection_dim)

    @property
    def preprocessing(self) -> Preprocessing:
        """What becomes of pictures before the model sees them."""
        return self._preprocessing

    def _text_feature(self, prompt: str) -> Float[Tensor, " d"]:
        ids = self._token_ids(prompt)
        if self._is_siglip:
            # It was trained on texts filled up to its positions, without a mask, and reads its feature off the last.
            ids += [self._tokenizer.pad_token_id] * (self._n_positions - len(ids))
        output = self._network.get_text_features(input_ids=torch.tensor([ids], device=self._network.device))
        return normalize(_pooled(output), dim=-1)[0]

    def prepare(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 side side"]:
        """Pictures in [0, 1] as the model sees them.

        Raises: ValueError for pictures that do not become the model's size.
        """
        pixels = self._preprocessing(images)
        height, width = pixels.shape[-2:]
        if (height, width) != (self._side, self._side):
            raise ValueError(
                f"pictures must become {self._side} x {self._side} pixels for '{self._name}', but its preprocessing "
                f"makes {height} x {width} of {images.shape[-2]} x {images.shape[-1]}; choose another model or "
                f"{self._use.otherwise}"
            )
        return pixels

    def _token_ids(self, prompt: str) -> list[int]:
        """Start and end included, not padded. Raises: ValueError if they do not fit in the text tower."""
        # SigLIP 1 and 2 saw small letters alone; the tokenizers of the second do not see to it.
        text = prompt.lower() if self._is_siglip else prompt
        with quiet_transformers():
            # Said out loud, because a tokenizer's file may ask for both.
            ids: list[int] = self._tokenizer(text, padding=False, truncation=False)["input_ids"]
        if len(ids) > self._n_positions:
            raise ValueError(
                f"the prompt must have at most {self._n_positions} tokens to be scored by '{self._name}', it has "
                f"{len(ids)}; shorten it or {self._use.otherwise}"
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
        self.prepare(torch.zeros(1, 3, self._side, self._side))


def _load_tokenizer(directory: Path, model_type: str, name: str) -> Any:
    import transformers

    try:
        if model_type == "clip":
            return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # The first SigLIP's class also takes away punctuation. The second's tokenizer.json is complete by itself.
        is_first = (directory / SENTENCEPIECE).is_file()
        kind = transformers.SiglipTokenizer if is_first else transformers.PreTrainedTokenizerFast
        return kind.from_pretrained(directory, local_files_only=True)
    except ImportError as error:
        raise ValueError(f"the tokenizer of '{name}' needs sentencepiece, which is not installed; {INSTALL}") from error
    except Exception as error:  # damaged files make the library raise anything
        raise ValueError(
            f"the tokenizer of '{name}' is damaged ({short_reason(error)}); get it again from its source"
        ) from error


def _pooled(output: Any) -> Float[Tensor, "n d"]:
    """The features in what the library returns, which differs between its versions."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
