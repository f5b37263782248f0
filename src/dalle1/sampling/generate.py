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
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.sampling.filters import DEFAULT_SAMPLING, SamplingConfig, filter_logits, guide


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a call of `generate` has come."""

    tokens_done: int
    tokens: int
    candidates_done: int
    candidates: int


def candidate_seeds(seed: int, prompt: str, n_candidates: int) -> list[int]:
    """Seeds of a prompt's candidates: a hash of (seed, number of the candidate, prompt).

    Independent of the other prompts and of how many candidates there are. 32 bits, because PyTorch's CPU
    generator uses no more.
    """
    texts = (f"{seed}|{candidate}|{prompt}" for candidate in range(n_candidates))
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]


@torch.inference_mode()
def generate(
    transformer: DalleTransformer,
    text_tokens: Int[Tensor, "p t"],
    *,
    seeds: Sequence[Sequence[int]],
    config: SamplingConfig = DEFAULT_SAMPLING,
    negative: Int[Tensor, "1 t"] | None = None,
    given: Int[Tensor, "p gh gw"] | None = None,
    batch_size: int = 128,
    on_progress: Callable[[Progress], None] | None = None,
) -> Int[Tensor, "p n gh gw"]:
    """Sample `n` grids of image tokens for each prompt, int64 in [0, image_vocab_size), on the text's device.

    Args:
        transformer: In evaluation mode, on the device of `text_tokens`.
        text_tokens: Padded prompts, as the text tokenizer gives them.
        seeds: One list per prompt with one seed per candidate, all lists of the same length.
        config: Temperature, truncation and guidance of the distribution.
        negative: The text that guidance leads away from; no caption if not given.
        given: Image tokens that stay as they are, -1 where a token is to be sampled.
        batch_size: Sequences decoded at once, twice as many rows with guidance; time and memory depend on it, the
            tokens do not.
        on_progress: Called after each step.

    Raises:
        ValueError: If the seeds do not fit the prompts, there are none, `batch_size` is below 1, `negative`, `given` or
            `config.temperature` do not fit the rest, or the transformer is in training mode.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if negative is not None and config.guidance_scale == 1:
        raise ValueError("a negative prompt needs a guidance_scale other than 1, got 1: there is nothing to lead away")
    n = _candidates(seeds, n_prompts=len(text_tokens))
    if given is not None:
        _check_given(given, transformer.config, n_prompts=len(text_tokens))
    length, decoder = transformer.config.image_seq_len, Decoder(transformer)
    temperatures = config.temperatures(transformer.config.grid_height, transformer.config.grid_width)
    untold = None
    if config.guidance_scale != 1:
        untold = decoder.prefill(transformer.empty_text() if negative is None else negative)
    tokens = torch.empty(len(seeds), n, length, dtype=torch.int64, device=text_tokens.device)
    done = 0
    texts: dict[int, TextStates] = {}
    for prompts, candidates in _batches(len(seeds), n, batch_size):
        texts = {prompt: texts.get(prompt) or decoder.prefill(text_tokens[prompt : prompt + 1]) for prompt in prompts}
        groups = [(list(texts.values()), len(candidates))]
        if untold is not None:
            groups.append(([untold], len(prompts) * len(candidates)))
        uniforms = _uniforms([seeds[prompt][candidate] for prompt in prompts for candidate in candidates], length)
        part = tokens[prompts.start : prompts.stop, candidates.start : candidates.stop]
        fixed = None
        if given is not None:
            fixed = given[prompts.start : prompts.stop].flatten(1).repeat_interleave(len(candidates), 0)
        decoding = Decoding(decoder, groups)
        if len(prompts) > 1:
            # The decoding has copies, and no prompt of several goes on in the next batch.
            texts, groups = {}, []
        columns = _decode(decoding, uniforms, config, temperatures, fixed)
        for position, column in enumerate(columns, start=1):
            part[..., position - 1] = column.view(len(prompts), len(candidates))
            if on_progress:
                progress = Progress(
                    tokens_done=done * length + position * len(column),
                    tokens=tokens.numel(),
                    candidates_done=done + (len(column) if position == length else 0),
                    candidates=len(seeds) * n,
                )
                on_progress(progress)
        done += len(uniforms)
    return tokens.view(len(seeds), -1, transformer.config.grid_height, transformer.config.grid_width)


def _check_given(given: Tensor, config: TransformerConfig, *, n_prompts: int) -> None:
    shape = (n_prompts, config.grid_height, config.grid_width)
    if given.shape != shape:
        raise ValueError(f"given tokens must have shape (prompts, height, width) = {shape}, got {tuple(given.shape)}")
    low, high = int(given.min()), int(given.max())
    if low < -1 or high >= config.image_vocab_size:
        raise ValueError(f"given tokens must be -1 or in [0, {config.image_vocab_size}), got {low} to {high}")


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


def _uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "b n"]:
    """Random numbers in [0, 1), float64: row i is the stream of seeds[i], the same on every device."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(length, generator=stream, dtype=torch.float64) for stream in streams])


def _decode(
    decoding: Decoding,
    uniforms: Float[Tensor, "b n"],
    config: SamplingConfig,
    temperatures: Sequence[float],
    given: Int[Tensor, "b n"] | None,
) -> Iterator[Int[Tensor, " b"]]:
    """Tokens of one position after the other, from each sequence's random numbers.

    With guidance `decoding` has every sequence a second time, without its caption, in rows that follow all the others,
    and logits are guided away from those.
    """
    guided = config.guidance_scale != 1
    # Apple's GPUs have no float64: there the codes are drawn on the CPU.
    device = decoding.logits.device
    drawing = torch.device("cpu") if device.type == "mps" else device
    columns = uniforms.T.contiguous().to(drawing)
    for position, temperature in enumerate(temperatures):
        logits = decoding.logits.to(drawing).double()
        if guided:
            with_caption, without = logits.chunk(2)
            logits = guide(with_caption, without, config.guidance_scale)
        tokens = draw_codes(filter_logits(logits, config, temperature), columns[position]).to(device)
        if given is not None:
            tokens = torch.where(given[:, position] >= 0, given[:, position], tokens)
        yield tokens
        if position + 1 < len(temperatures):
            decoding.step(tokens.repeat(2) if guided else tokens)


def draw_codes(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The code of each row at which the cumulative distribution first exceeds the row's number in [0, 1)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # Divided by its last value, the end is exactly 1: every number below 1 finds a code that is possible.
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
