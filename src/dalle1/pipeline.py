"""Prompts to pictures: the object that sample.py and notebooks use.

`Pipeline.from_checkpoints(...)`, then `pipeline(["a red circle"], candidates=16)`. Steps: check the prompts, text
tokens, image tokens (`sampling.generate`), pictures (the dVAE's decoder), and with a CLIP the best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.checkpoint import Loaded, check_pair, load_clip, load_image_tokenizer, load_transformer
from dalle1.data.fields import require_int
from dalle1.models.clip import CLIP
from dalle1.models.transformer import DalleTransformer
from dalle1.rerank import best_first, score_images
from dalle1.sampling.filters import DEFAULT_SAMPLING, SamplingConfig
from dalle1.sampling.generate import Progress, candidate_seeds, generate
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer

# On the generated scenes far better than 1, and as good as 2, which loses objects of groups (docs/shapes.md).
GUIDANCE_SCALE = 1.5


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptResult:
    """All candidates of one prompt, best first if they were scored, else in the order of their numbers."""

    prompt: str
    images: Float[Tensor, "n 3 h w"]  # float32 in [0, 1], on the CPU
    image_tokens: Int[Tensor, "n gh gw"]  # int64, on the CPU
    seeds: list[int]
    scores: list[float] | None  # cosine similarity to the prompt, in [-1, 1]; None without CLIP


class Pipeline:
    """A transformer, the dVAE whose tokens it was trained on, and perhaps a CLIP to rank with."""

    def __init__(
        self, transformer: Loaded[DalleTransformer], image_tokenizer: ImageTokenizer, clip: Loaded[CLIP] | None = None
    ) -> None:
        """Put loaded parts together.

        Raises: ValueError if the dVAE is not the transformer's own, or a text tokenizer is missing.
        """
        check_pair(transformer, image_tokenizer)
        self.transformer = transformer
        self.image_tokenizer = image_tokenizer
        self.clip = clip
        self._text_tokenizer = _text_tokenizer(transformer, "transformer")
        self._clip_tokenizer = _text_tokenizer(clip, "CLIP") if clip else None

    @classmethod
    def from_checkpoints(cls, *, transformer: str | Path, dvae: str | Path, clip: str | Path | None = None) -> Pipeline:
        """Load all parts on the CPU; `to` moves them.

        Raises: FileNotFoundError or ValueError as `checkpoint.load_transformer` and `__init__` do.
        """
        # The largest last, so that whatever else is missing is found at once.
        image_tokenizer = load_image_tokenizer(dvae)
        ranker = load_clip(clip) if clip is not None else None
        return cls(load_transformer(transformer), image_tokenizer, ranker)

    def to(self, device: torch.device) -> Pipeline:
        """The same pipeline with its models on another device."""
        self.transformer.model.to(device)
        if self.clip:
            self.clip.model.to(device)
        return self

    @property
    def default_guidance_scale(self) -> float:
        """Guidance to sample with when none is asked for: 1, no guidance, unless the transformer was trained for it."""
        return GUIDANCE_SCALE if self.transformer.caption_dropout else 1.0

    @property
    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """What identifies the weights: the hash of each part, and its training steps where they are known."""
        parts: dict[str, dict[str, Any]] = {
            "transformer": {"sha256": self.transformer.sha256, "step": self.transformer.step},
            "dvae": {"sha256": self.image_tokenizer.sha256},
        }
        if self.clip:
            parts["clip"] = {"sha256": self.clip.sha256, "step": self.clip.step}
        return parts

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        candidates: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        negative_prompt: str | None = None,
        batch_size: int = 128,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[PromptResult]:
        """Sample `candidates` pictures of each prompt.

        A prompt's pictures depend on it, on `seed` and on `sampling`, not on the other prompts, `candidates` or
        `batch_size` (see `sampling.generate` for the limits of that).

        Args:
            prompts: Captions; white space around them is ignored.
            candidates: Pictures per prompt.
            seed: Another seed gives other pictures.
            sampling: Temperature, truncation and guidance of the distribution.
            negative_prompt: What guidance leads away from, instead of from pictures without a caption.
            batch_size: Sequences decoded at once.
            on_progress: Called after each decoding step.

        Raises:
            ValueError: If there is no prompt, one is empty or too long, a number is too small, guidance is asked of a
                transformer that was not trained for it, or there is a negative prompt without guidance.
            TypeError: If a prompt is no text or a number not whole.
        """
        prompts = self._checked(prompts)
        require_int("candidates", candidates, at_least=1)
        require_int("batch_size", batch_size, at_least=1)
        require_int("seed", seed, at_least=0)
        if sampling.guidance_scale != 1 and not self.transformer.caption_dropout:
            raise ValueError(
                "guidance needs a transformer trained with optim.caption_dropout > 0, this one was not; "
                f"set guidance_scale=1, got {sampling.guidance_scale}"
            )
        negative = None
        if negative_prompt is not None:
            negative = self._text_tokenizer.encode(self._checked([negative_prompt])).to(self._device)
        seeds = [candidate_seeds(seed, prompt, candidates) for prompt in prompts]
        image_tokens = generate(
            self.transformer.model,
            self._text_tokenizer.encode(prompts).to(self._device),
            seeds=seeds,
            config=sampling,
            negative=negative,
            batch_size=batch_size,
            on_progress=on_progress,
        )
        return [self._finish(*parts) for parts in zip(prompts, image_tokens, seeds, strict=True)]

    @property
    def _device(self) -> torch.device:
        return self.transformer.model.start.device

    def _checked(self, prompts: Sequence[str]) -> list[str]:
        """The prompts without white space around them, each one usable by every model."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of texts, got the text {prompts!r}; put it in brackets")
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        stripped = [_check_text(prompt).strip() for prompt in prompts]
        tokenizers = {"the transformer": self._text_tokenizer, "the CLIP": self._clip_tokenizer}
        for prompt in stripped:
            if not prompt:
                raise ValueError("prompt must not be empty")
            for name, tokenizer in tokenizers.items():
                if tokenizer and len(ids := tokenizer.ids(prompt)) > tokenizer.seq_len:
                    limit = f"at most {tokenizer.seq_len} tokens, as {name} was trained with"
                    raise ValueError(f"prompt must have {limit}, got {len(ids)}: {prompt[:60]!r}")
        return stripped

    def _finish(self, prompt: str, image_tokens: Int[Tensor, "n gh gw"], seeds: list[int]) -> PromptResult:
        """Pictures of one prompt's tokens, scored and ordered if there is a CLIP."""
        # One picture at a time: large pictures need little memory so, and none depends on the others.
        images = torch.cat([self.image_tokenizer.decode(tokens[None]) for tokens in image_tokens])
        scores = None
        order = list(range(len(seeds)))
        if self.clip and self._clip_tokenizer:
            text_tokens = self._clip_tokenizer.encode([prompt])[0].to(self._device)
            similarity = score_images(self.clip.model, images, text_tokens)
            order = best_first(similarity)
            scores = [float(similarity[i]) for i in order]
        return PromptResult(
            prompt=prompt,
            images=images[order].cpu(),
            image_tokens=image_tokens[order].cpu(),
            seeds=[seeds[i] for i in order],
            scores=scores,
        )


def choose_device(name: str) -> torch.device:
    """The device of a name such as `cpu` or `cuda:1`; `auto` is a GPU if there is one.

    Raises: ValueError if PyTorch does not know the device or cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto or one that PyTorch can use here, got {name!r} ({reason})") from error


def _text_tokenizer(loaded: Loaded[DalleTransformer] | Loaded[CLIP], name: str) -> TextTokenizer:
    if loaded.text_tokenizer is None:
        raise ValueError(f"the {name} checkpoint must hold a text tokenizer, it has none; train that stage again")
    return loaded.text_tokenizer


def _check_text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a text, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt must be valid Unicode, got {prompt!r}") from error
    return prompt
