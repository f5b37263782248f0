"""The decoding loop: text tokens to image tokens, one position at a time for many sequences at once.

Reproducible: a candidate's tokens depend on its prompt, its seed, the settings and the weights alone. Every
candidate has its own stream of random numbers, one per image position, and a number picks a code by the inverse
of the cumulative distribution in float64, codes in ascending order.

That needs logits which do not depend on the company of a sequence to the last bit, or one token in 5,000 to 80,000
would change, and then all that follow: `models.decoding` sees to it. On a GPU only runs with the same number of
sequences at once are sure to agree.

Shapes: p prompts, n candidates of each, b sequences decoded at once, t text_seq_len, v image vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.decoding import Decoder, Decoding, TextStates
from dalle1.models.transformer import DalleTransformer
from dalle1.sampling.filters import DEFAULT_SAMPLING, SamplingConfig, filter_logits, guide


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Candidates that are decoded together: a rectangle of prompts and candidates."""

    prompts: range
    candidates: range
    image_tokens: Int[Tensor, "p n gh gw"]  # int64 in [0, image_vocab_size), -1 where none is sampled yet


OnStep = Callable[[Block, int], None]  # called with what is being decoded, and the positions that are done


def candidate_seeds(seed: int, prompt: str, n_candidates: int) -> list[int]:
    """Seeds of a prompt's candidates: a hash of (seed, number of the candidate, prompt).

    Independent of the other prompts and of how many candidates there are. 32 bits, because PyTorch's CPU
    generator uses no more.
    """
    texts = (f"{seed}|{candidate}|{prompt}" for candidate in range(n_candidates))
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]


class Sampler:
    """A transformer and a way to draw from it."""

    def __init__(
        self,
        transformer: DalleTransformer,
        config: SamplingConfig = DEFAULT_SAMPLING,
        *,
        negative: Int[Tensor, "1 t"] | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        """Sample with the weights that `transformer` has now.

        Args:
            transformer: In evaluation mode.
            config: Temperature, truncation and guidance of the distribution.
            negative: The text that guidance leads away from, on the transformer's device; no caption if not given.
            dtype: Of decoding, see `models.decoding.Decoder`; that of the weights if not given.
            compiled: Compile decoding, for CUDA.

        Raises: ValueError if the transformer is in training mode, there is a `negative` without guidance, temperatures
            do not fit the grid, or for a `dtype` or `compiled` that `Decoder` refuses.
        """
        if negative is not None and config.guidance_scale == 1:
            raise ValueError(
                "a negative prompt needs a guidance_scale other than 1, got 1: there is nothing to lead away"
            )
        self._grid = transformer.config.grid_height, transformer.config.grid_width
        self._config, self._temperatures = config, config.temperatures(*self._grid)
        self._vocab_size = transformer.config.image_vocab_size
        self._decoder = Decoder(transformer, dtype=dtype, compiled=compiled)
        self._unconditional: TextStates | None = None
        if config.guidance_scale != 1:
            self._unconditional = self._decoder.prefill(transformer.empty_text() if negative is None else negative)

    def blocks(
        self,
        text_tokens: Int[Tensor, "p t"],
        *,
        seeds: Sequence[Sequence[int]],
        given: Int[Tensor, "p gh gw"] | None = None,
        batch_size: int = 128,
        on_step: OnStep | None = None,
    ) -> Iterator[Block]:
        """Grids of image tokens for each prompt, as they get done: prompts and candidates in their order.

        Args:
            text_tokens: Padded prompts, as the text tokenizer gives them, on the transformer's device.
            seeds: One list per prompt with one seed per candidate, all lists of the same length.
            given: Image tokens that stay as they are, -1 where a token is to be sampled.
            batch_size: Sequences decoded at once, twice as many rows with guidance; time and memory depend on it, and
                on a GPU the last bits of logits.
            on_step: Called after each step.

        Raises: ValueError at once if the seeds do not fit the prompts, there are none, `batch_size` is below 1, or
            `given` does not fit the rest; and later if logits are not finite.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        candidates = _candidates(seeds, n_prompts=len(text_tokens))
        if given is not None:
            self._check_given(given, n_prompts=len(text_tokens))
        return self._blocks(text_tokens, seeds, given, _batches(len(seeds), candidates, batch_size), on_step)

    def sample(
        self,
        text_tokens: Int[Tensor, "p t"],
        *,
        seeds: Sequence[Sequence[int]],
        given: Int[Tensor, "p gh gw"] | None = None,
        batch_size: int = 128,
        on_step: OnStep | None = None,
    ) -> Int[Tensor, "p n gh gw"]:
        """All `blocks` as one tensor. Raises: as `blocks`."""
        blocks = self.blocks(text_tokens, seeds=seeds, given=given, batch_size=batch_size, on_step=on_step)
        tokens = torch.empty(len(seeds), len(seeds[0]), *self._grid, dtype=torch.int64, device=text_tokens.device)
        for block in blocks:
            prompts, candidates = block.prompts, block.candidates
            tokens[prompts.start : prompts.stop, candidates.start : candidates.stop] = block.image_tokens
        return tokens

    @torch.inference_mode()
    def _blocks(
        self,
        text_tokens: Int[Tensor, "p t"],
        seeds: Sequence[Sequence[int]],
        given: Int[Tensor, "p gh gw"] | None,
        batches: Iterator[tuple[range, range]],
        on_step: OnStep | None,
    ) -> Iterator[Block]:
        length = self._grid[0] * self._grid[1]
        texts: dict[int, TextStates] = {}
        beginnings: dict[range, Decoding] = {}
        for prompts, candidates in batches:
            texts = {prompt: texts.get(prompt) or self._prefill(text_tokens, prompt) for prompt in prompts}
            fixed = torch.full((len(prompts), length), -1) if given is None else given[prompts.start : prompts.stop]
            fixed = fixed.flatten(1)
            n_shared = 0 if given is None else _shared_length(fixed)
            if n_shared:
                known = beginnings.get(prompts)
                beginnings = {prompts: known or self._begin(list(texts.values()), fixed[:, :n_shared])}
                decoding = beginnings[prompts].spread(len(candidates))
            else:
                decoding = self._decoding(list(texts.values()), len(candidates))
            if len(prompts) > 1:
                texts = {}  # the decoding has copies, and no prompt of several goes on in the next batch
            uniforms = _uniforms([seeds[prompt][candidate] for prompt in prompts for candidate in candidates], length)
            tokens = torch.full((len(uniforms), length), -1, device=text_tokens.device)
            block = Block(
                prompts=prompts,
                candidates=candidates,
                image_tokens=tokens.view(len(prompts), len(candidates), *self._grid),
            )
            fixed = fixed.repeat_interleave(len(candidates), 0).to(tokens.device)
            tokens[:, :n_shared] = fixed[:, :n_shared]
            for position, column in self._decode(decoding, uniforms, fixed, n_shared):
                tokens[:, position] = column
                if on_step:
                    on_step(block, position + 1)
            _check_finite(decoding.logits)
            yield block

    def _decoding(self, texts: list[TextStates], candidates: int) -> Decoding:
        """With guidance every sequence is there a second time, without its caption, after all the others."""
        groups = [(texts, candidates)]
        if self._unconditional is not None:
            groups.append(([self._unconditional], len(texts) * candidates))
        return Decoding(self._decoder, groups)

    def _begin(self, texts: list[TextStates], tokens: Int[Tensor, "p s"]) -> Decoding:
        """What all candidates of each prompt have in common, decoded once."""
        decoding = self._decoding(texts, 1)
        for column in tokens.T.contiguous():
            decoding.step(column if self._unconditional is None else column.repeat(2))
        return decoding

    def _prefill(self, text_tokens: Int[Tensor, "p t"], prompt: int) -> TextStates:
        text = self._decoder.prefill(text_tokens[prompt : prompt + 1])
        _check_finite(text.logits)
        return text

    def _decode(
        self, decoding: Decoding, uniforms: Float[Tensor, "b n"], given: Int[Tensor, "b n"], first: int
    ) -> Iterator[tuple[int, Int[Tensor, " b"]]]:
        """Positions from `first` on, and the tokens of each, from each sequence's random numbers.

        With guidance logits are guided away from those of the second half of the rows.
        """
        guided = self._unconditional is not None
        # Apple's GPUs have no float64: there the codes are drawn on the CPU.
        device = decoding.logits.device
        drawing = torch.device("cpu") if device.type == "mps" else device
        columns = uniforms.T.contiguous().to(drawing)
        for position in range(first, len(self._temperatures)):
            logits = decoding.logits.to(drawing).double()
            if guided:
                with_caption, without = logits.chunk(2)
                logits = guide(with_caption, without, self._config.guidance_scale)
            logits = filter_logits(logits, self._config, self._temperatures[position])
            tokens = draw_codes(logits, columns[position]).to(device)
            tokens = torch.where(given[:, position] >= 0, given[:, position], tokens)
            yield position, tokens
            if position + 1 < len(self._temperatures):
                decoding.step(tokens.repeat(2) if guided else tokens)

    def _check_given(self, given: Tensor, *, n_prompts: int) -> None:
        shape = (n_prompts, *self._grid)
        if given.shape != shape:
            raise ValueError(
                f"given tokens must have shape (prompts, height, width) = {shape}, got {tuple(given.shape)}"
            )
        low, high = int(given.min()), int(given.max())
        if low < -1 or high >= self._vocab_size:
            raise ValueError(f"given tokens must be -1 or in [0, {self._vocab_size}), got {low} to {high}")


def _candidates(seeds: Sequence[Sequence[int]], *, n_prompts: int) -> int:
    """Candidates of each prompt."""
    counts = [len(row) for row in seeds]
    if len(seeds) != n_prompts or len(set(counts)) != 1 or counts[0] < 1:
        raise ValueError(f"seeds must be {n_prompts} lists of one same length >= 1, got lengths {counts}")
    return counts[0]


def _batches(n_prompts: int, n_candidates: int, batch_size: int) -> Iterator[tuple[range, range]]:
    """Prompts and candidates that are decoded together, at most `batch_size` sequences."""
    if n_candidates <= batch_size:
        yield from ((prompts, range(n_candidates)) for prompts in _chunks(n_prompts, batch_size // n_candidates))
        return
    for prompt in range(n_prompts):
        yield from ((range(prompt, prompt + 1), candidates) for candidates in _chunks(n_candidates, batch_size))


def _chunks(total: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, total)) for first in range(0, total, size))


def _shared_length(given: Int[Tensor, "p n"]) -> int:
    """Positions at the beginning that are given for every prompt; the last two never count, for `Decoding.spread`."""
    free = (given < 0).any(0).nonzero()
    length = given.shape[1]
    return max(0, min(int(free[0]) if len(free) else length, length - 2))


def _check_finite(logits: Tensor) -> None:
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"logits must be finite numbers, they are not in {str(logits.dtype).removeprefix('torch.')}: the "
            "transformer's weights are damaged, or too large for the precision"
        )


def _uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "b n"]:
    """Random numbers in [0, 1), float64: row i is the stream of seeds[i], the same on every device."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(length, generator=stream, dtype=torch.float64) for stream in streams])


def draw_codes(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The code of each row at which the cumulative distribution first exceeds the row's number in [0, 1)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # Divided by its last value, the end is exactly 1: every number below 1 finds a code that is possible.
    cumulative = cumulative / cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
    return codes.clamp(max=logits.shape[-1] - 1)  # only of rows that are not finite
