"""Prompts to pictures: the object that sample.py and notebooks use.

`Pipeline.from_checkpoint(...)`, then `pipeline(["a red circle"], candidates=16)`. Steps: check the prompts, text
tokens, image tokens (`sampling.sampler`), pictures (the dVAE's decoder), and with a reranker the best first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from dalle1.checkpoint import Loaded, check_pair, load_image_tokenizer, load_transformer, text_tokenizer_of
from dalle1.data.fields import require_int
from dalle1.data.sampled_picture import SampledPicture
from dalle1.data.transforms import fit_picture, to_unit_interval
from dalle1.decode_and_rank import PromptResult, decode_and_rank
from dalle1.models.transformer import DalleTransformer
from dalle1.rerank.reranker import Reranker
from dalle1.sampling.batch_size import auto_batch_size
from dalle1.sampling.candidate_store import CandidateStore, MemoryStore
from dalle1.sampling.filters import DEFAULT_SAMPLING, SamplingConfig
from dalle1.sampling.image_prompt import ImagePrompt, keep_top_rows, kept_outside
from dalle1.sampling.progress import Progress
from dalle1.sampling.sampler import Block, Sampler, candidate_seeds
from dalle1.tokenizers.image import ImageTokenizer

# On the generated scenes far better than 1, and as good as 2, which loses objects of groups (docs/shapes.md).
GUIDANCE_SCALE = 1.5


class Pipeline:
    """A transformer, the dVAE whose tokens it was trained on, and perhaps a reranker."""

    def __init__(
        self,
        transformer: Loaded[DalleTransformer],
        image_tokenizer: ImageTokenizer,
        reranker: Reranker | None = None,
    ) -> None:
        """Put loaded parts together.

        Raises: ValueError if the dVAE is not the transformer's own, or its text tokenizer is missing.
        """
        check_pair(transformer, image_tokenizer)
        self.transformer = transformer
        self.image_tokenizer = image_tokenizer
        self.reranker = reranker
        self._text_tokenizer = text_tokenizer_of(transformer, "transformer")

    @classmethod
    def from_checkpoint(
        cls, *, transformer: str | Path, dvae: str | Path, reranker: Reranker | None = None
    ) -> Pipeline:
        """Load both parts on the CPU; `to` moves them.

        Raises: FileNotFoundError or ValueError as `checkpoint.load_transformer` and `__init__` do.
        """
        # The larger last, so that a missing dVAE is found at once.
        image_tokenizer = load_image_tokenizer(dvae)
        return cls(load_transformer(transformer), image_tokenizer, reranker)

    def to(self, device: torch.device | str) -> Pipeline:
        """The same pipeline with its models on another device."""
        device = torch.device(device)
        self.transformer.model.to(device)
        if self.reranker:
            self.reranker.to(device)
        return self

    @property
    def default_guidance_scale(self) -> float:
        """Guidance to sample with when none is asked for: 1, no guidance, unless the transformer was trained for it."""
        return GUIDANCE_SCALE if self.transformer.caption_dropout else 1.0

    @property
    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """What identifies the weights: the hash of each part, and its training steps where they are known."""
        return {
            "transformer": {"sha256": self.transformer.sha256, "step": self.transformer.step},
            "dvae": {"sha256": self.image_tokenizer.sha256},
        }

    def image_prompt(
        self,
        picture: Image.Image,
        *,
        keep_rows: int | None = None,
        mask: Image.Image | None = None,
        paste_kept: bool = False,
        sampled: SampledPicture | None = None,
    ) -> ImagePrompt:
        """A picture to go on from: its largest centred part of the right shape, and which of its cells stay.

        Args:
            picture: RGB, of any size.
            keep_rows: Rows of token cells that stay, from the top. Either this or a mask.
            mask: White where the picture is sampled again, see `sampling.image_prompt.kept_outside`.
            paste_kept: Put the picture's own pixels over the kept cells of results.
            sampled: What the picture's file says of its origin: if it was sampled from this dVAE's tokens, its own
                are taken. Encoding the picture again would change some.

        Raises: ValueError if there is neither `keep_rows` nor `mask`, or both, or one of them does not fit.
        """
        if (keep_rows is None) == (mask is None):
            raise ValueError(
                "an image needs either keep_rows=... or mask=..., which say what of it stays, or variations=... alone, "
                f"got {'neither' if mask is None else 'both'}"
            )
        config = self.transformer.model.config
        grid, cell = (config.grid_height, config.grid_width), self.image_tokenizer.dvae.config.downsampling
        if mask is not None:
            kept = kept_outside(mask, picture_size=picture.size, grid=grid, cell=cell)
        else:
            assert keep_rows is not None, "one of the two is given"
            kept = keep_top_rows(keep_rows, grid)
        image = to_unit_interval(fit_picture(picture, grid[0] * cell, grid[1] * cell))
        tokens = None
        if sampled:
            vocab_size = self.image_tokenizer.vocab_size
            tokens = sampled.tokens_of(self.image_tokenizer.sha256, grid=grid, vocab_size=vocab_size)
        if tokens is None:
            tokens = self.image_tokenizer.encode(image[None].to(self.device))[0].cpu()
        return ImagePrompt(image=image, image_tokens=tokens, kept=kept, paste_kept=paste_kept)

    def __call__(self, prompts: Sequence[str], **options: Any) -> list[PromptResult]:
        """Pictures of all prompts. Options and errors: those of `stream`."""
        return list(self.stream(prompts, **options))

    def stream(
        self,
        prompts: Sequence[str],
        *,
        candidates: int = 1,
        keep: int | None = None,
        seed: int = 0,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        negative_prompt: str | None = None,
        image_prompt: ImagePrompt | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
        batch_size: int | Literal["auto"] = "auto",
        store: CandidateStore | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> Iterator[PromptResult]:
        """Sample pictures of each prompt; its result comes as soon as it is done.

        A prompt's pictures depend on it, on `seed`, `sampling`, `negative_prompt`, `image_prompt` and `dtype`, not on
        the other prompts, `candidates` or `batch_size` (on a GPU only with batches of one size).

        Args:
            prompts: Captions; white space around them is ignored.
            candidates: Pictures that are sampled of each prompt.
            keep: How many of them are given back, the best if there is a reranker; all of them by default.
            seed: Another seed gives other pictures.
            sampling: Temperature, truncation and guidance of the distribution.
            negative_prompt: What guidance leads away from, instead of from pictures without a caption.
            image_prompt: What every picture begins with or contains, see `image_prompt`.
            dtype: Of the transformer's decoding, such as `torch.bfloat16` on a GPU; that of its weights by default.
            compiled: Compile decoding on CUDA.
            batch_size: Sequences decoded at once; `auto` looks at the memory that is free.
            store: Has tokens that were sampled before with the same arguments, and keeps those that are now.
            on_progress: Called after each decoding step.
            on_finished: Called with the number of pictures that were decoded so far, after each.

        Raises:
            ValueError: At once, if there is no prompt, one is empty or too long, a number is too small, guidance is
                asked of a transformer that was not trained for it, there is a negative prompt without guidance, or
                decoding is to be compiled and not on CUDA.
            TypeError: If a prompt is no text or a number not whole.
        """
        prompts = self.check_prompts(prompts)
        for name, number, least in (
            ("candidates", candidates, 1),
            ("keep", candidates if keep is None else keep, 1),
            ("seed", seed, 0),
        ):
            require_int(name, number, at_least=least)
        sampler = self._sampler(sampling, negative_prompt, dtype, compiled)
        if batch_size == "auto":
            model, guided = self.transformer.model, sampling.guidance_scale != 1
            of_states = dtype or model.start.dtype
            batch_size = auto_batch_size(model.config, device=self.device, dtype=of_states, guided=guided)
        require_int("batch_size", batch_size, at_least=1)
        seeds = [candidate_seeds(seed, prompt, candidates) for prompt in prompts]
        store = MemoryStore() if store is None else store
        done = self._sample(sampler, prompts, seeds, image_prompt, batch_size, store, on_progress)
        before = 0

        def result(done: tuple[int, Tensor]) -> PromptResult:
            nonlocal before
            i, tokens = done
            counted = None if on_finished is None else lambda pictures: on_finished(before + pictures)
            finished = self.decode_and_rank(
                prompts[i],
                tokens,
                keep=keep,
                image_prompt=image_prompt,
                on_finished=counted,
            )
            before += candidates
            return finished

        return map(result, done)

    def _sampler(
        self, sampling: SamplingConfig, negative_prompt: str | None, dtype: torch.dtype | None, compiled: bool
    ) -> Sampler:
        self.check_guidance(sampling.guidance_scale, negative_prompt)
        self.check_compiled(compiled)
        negative = None
        if negative_prompt is not None:
            texts = self.check_prompts([negative_prompt], name="negative_prompt")
            negative = self._text_tokenizer.encode(texts).to(self.device)
        return Sampler(self.transformer.model, sampling, negative=negative, dtype=dtype, compiled=compiled)

    def check_guidance(self, guidance_scale: float, negative_prompt: str | None = None) -> None:
        """Raise ValueError for guidance that the transformer was not trained for, or leads away from nothing."""
        if negative_prompt is not None:
            self.check_prompts([negative_prompt], name="negative_prompt")
            if guidance_scale == 1:
                raise ValueError("a negative prompt needs a guidance_scale other than 1, got 1; change one of the two")
        if guidance_scale != 1 and not self.transformer.caption_dropout:
            raise ValueError(
                "guidance needs a transformer trained with optim.caption_dropout > 0, this one was not; "
                f"set guidance_scale=1, got {guidance_scale}"
            )

    def check_compiled(self, compiled: bool) -> None:
        """Raise ValueError for compiled decoding elsewhere than on CUDA."""
        if compiled and self.device.type != "cuda":
            raise ValueError(f"compiled decoding is for CUDA, got device {self.device}; leave out compile")

    @property
    def device(self) -> torch.device:
        """Where its models are."""
        return self.transformer.model.start.device

    def check_prompts(self, prompts: Sequence[str], *, name: str = "prompt") -> list[str]:
        """The prompts without white space around them, each one usable by every model; `name` is theirs in messages.

        Raises: ValueError or TypeError as `stream` does.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of texts, got the text {prompts!r}; put it in brackets")
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        stripped = [_check_text(prompt).strip() for prompt in prompts]
        for prompt in stripped:
            if not prompt:
                raise ValueError(f"{name} must not be empty")
            if len(ids := self._text_tokenizer.ids(prompt)) > self._text_tokenizer.seq_len:
                limit = f"at most {self._text_tokenizer.seq_len} tokens, as the transformer was trained with"
                raise ValueError(f"{name} must have {limit}, got {len(ids)}; shorten {prompt[:60]!r}")
            if self.reranker and name == "prompt":
                self.reranker.check(prompt)
        return stripped

    def _sample(
        self,
        sampler: Sampler,
        prompts: Sequence[str],
        seeds: Sequence[Sequence[int]],
        image_prompt: ImagePrompt | None,
        batch_size: int,
        store: CandidateStore,
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[tuple[int, Int[Tensor, "n gh gw"]]]:
        """Sample what the store lacks; give the number of each prompt that has all its candidates, and their tokens."""
        n_candidates = len(seeds[0])
        known = [min(store.count(i), n_candidates) for i in range(len(seeds))]
        length = self.transformer.model.config.image_seq_len
        done, total = sum(known), len(seeds) * n_candidates

        def report(block: Block, positions: int) -> None:
            rows = len(block.prompts) * len(block.candidates)
            if on_progress:
                progress = Progress(
                    tokens_known=sum(known) * length,
                    tokens_done=done * length + rows * positions,
                    tokens=total * length,
                    candidates_done=done + (rows if positions == length else 0),
                    candidates=total,
                    block=block,
                    positions_done=positions,
                )
                on_progress(progress)

        for n_known, group in groupby(range(len(seeds)), key=known.__getitem__):
            numbers = list(group)
            if n_known == n_candidates:
                yield from ((i, _stored(store, i)[:n_candidates]) for i in numbers)
                continue
            text = self._text_tokenizer.encode([prompts[i] for i in numbers]).to(self.device)
            given = None
            if image_prompt is not None:
                given = image_prompt.given.to(self.device).expand(len(numbers), -1, -1)
            grown: dict[int, Tensor] = {}
            blocks = sampler.blocks(
                text,
                seeds=[seeds[i][n_known:] for i in numbers],
                given=given,
                batch_size=batch_size,
                on_step=report,
            )
            for block in blocks:
                done += len(block.prompts) * len(block.candidates)
                for i, tokens in zip(block.prompts, block.image_tokens.cpu(), strict=True):
                    number = numbers[i]
                    if number not in grown and n_known:
                        # Not all of them: another process may have added some by now.
                        grown[number] = _stored(store, number)[:n_known]
                    grown[number] = torch.cat([grown[number], tokens]) if number in grown else tokens
                    if store.count(number) < len(grown[number]):
                        store.save(number, grown[number])
                if n_known + block.candidates.stop == n_candidates:
                    yield from ((numbers[i], grown.pop(numbers[i])) for i in block.prompts)

    def decode_and_rank(
        self,
        prompt: str,
        image_tokens: Int[Tensor, "n gh gw"],
        *,
        keep: int | None = None,
        image_prompt: ImagePrompt | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> PromptResult:
        """See the function `decode_and_rank`."""
        return decode_and_rank(
            prompt,
            image_tokens,
            image_tokenizer=self.image_tokenizer,
            reranker=self.reranker,
            keep=keep,
            image_prompt=image_prompt,
            device=self.device,
            on_finished=on_finished,
        )


def _stored(store: CandidateStore, prompt: int) -> Int[Tensor, "n gh gw"]:
    tokens = store.load(prompt)
    assert tokens is not None, "there were some"
    return tokens


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


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to decode in: that of `fp32`, `bf16` or `fp16`; `auto` is bf16 on GPUs that have it, else fp32.

    Raises: ValueError for another name.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float32
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision must be one of auto, {', '.join(dtypes)}, got {precision!r}")
    return dtypes[precision]


def _check_text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a text, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt must be valid Unicode, got {prompt!r}") from error
    return prompt
