"""The decoding loop: text tokens to image tokens, one position at a time for many sequences at once.

Reproducible: a candidate's tokens depend on its prompt, its seed, the settings and the weights alone. Every
candidate has its own stream of random numbers, one per image position, and a number picks a code by the inverse
of the cumulative distribution in float64, codes in ascending order.

That needs logits which do not depend on the company of a sequence, and matrix products do not give that for free:
libraries sum in another order for few rows. Measured in fp32 on an x86 CPU (torch 2.13 with MKL, inner sizes 64 to
2048): a row of `F.linear` has the same bits for 16 to 256 rows but others for 1 to 15; attention is the same for
any number. Such a difference in the last bits changes one token in 5,000 to 80,000, and then all that follow. So
text is prefilled alone, and sequences are decoded in multiples of 16, filled up with copies that are thrown away.
What remains: with several threads and inner sizes from 1024 on, and on a GPU, kernels may also change beyond 16
rows; there only runs with the same number of sequences at once are sure to agree.

Shapes: p prompts, n candidates of each, b sequences decoded at once, t text_seq_len, v image vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.kv_cache import KVCache
from dalle1.models.transformer import DalleTransformer
from dalle1.sampling.filters import DEFAULT_SAMPLING, SamplingConfig, filter_logits, guide


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a call of `generate` has come."""

    tokens_done: int
    tokens: int
    candidates_done: int
    candidates: int


# Logits of the first image token, and the cache to continue from.
_Prefilled = tuple[Tensor, KVCache]

# Rows that matrix products are filled up to a multiple of; see the module's docstring.
ROW_MULTIPLE = 16


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
    batch_size: int = 128,
    on_progress: Callable[[Progress], None] | None = None,
) -> Int[Tensor, "p n gh gw"]:
    """Sample `n` grids of image tokens for each prompt, int64 in [0, image_vocab_size), on the text's device.

    Args:
        transformer: In evaluation mode, on the device of `text_tokens`.
        text_tokens: Padded prompts, as the text tokenizer gives them.
        seeds: One list per prompt with one seed per candidate, all lists of the same length.
        config: Temperature, truncation and guidance of the distribution.
        batch_size: Sequences decoded at once, twice as many rows with guidance; time and memory depend on it, the
            tokens do not.
        on_progress: Called after each step.

    Raises:
        ValueError: If the seeds do not fit the prompts, there are none, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    sequences = _sequences(seeds, n_prompts=len(text_tokens))
    length, device = transformer.config.image_seq_len, text_tokens.device
    prefilled: dict[int, _Prefilled] = {}
    empty = transformer.prefill(transformer.empty_text()) if config.guidance_scale != 1 else None
    tokens = torch.empty(len(sequences), length, dtype=torch.int64, device=device)
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        # One prompt at a time, and once each: only the last prompt of a batch can go on in the next one.
        prefilled = {
            prompt: prefilled.get(prompt) or transformer.prefill(text_tokens[prompt : prompt + 1])
            for prompt in dict.fromkeys(prompt for prompt, _ in batch)
        }
        starts = [prefilled[prompt] for prompt, _ in batch]
        uniforms = _uniforms([seed for _, seed in batch], length)
        for position, column in enumerate(_decode(transformer, starts, empty, uniforms, config)):
            tokens[first : first + len(batch), position] = column
            if on_progress:
                progress = Progress(
                    tokens_done=first * length + (position + 1) * len(batch),
                    tokens=tokens.numel(),
                    candidates_done=first + (len(batch) if position == length - 1 else 0),
                    candidates=len(sequences),
                )
                on_progress(progress)
    return tokens.view(len(seeds), -1, transformer.config.grid_height, transformer.config.grid_width)


def _sequences(seeds: Sequence[Sequence[int]], *, n_prompts: int) -> list[tuple[int, int]]:
    """Number of the prompt and seed of every candidate, prompt by prompt."""
    counts = [len(row) for row in seeds]
    if len(seeds) != n_prompts or len(set(counts)) != 1 or counts[0] < 1:
        raise ValueError(f"seeds must be {n_prompts} lists of one same length >= 1, got lengths {counts}")
    return [(prompt, seed) for prompt, row in enumerate(seeds) for seed in row]


def _uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "b n"]:
    """Random numbers in [0, 1), float64: row i is the stream of seeds[i], the same on every device."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(length, generator=stream, dtype=torch.float64) for stream in streams])


def _decode(
    transformer: DalleTransformer,
    starts: Sequence[_Prefilled],
    empty: _Prefilled | None,
    uniforms: Float[Tensor, "b n"],
    config: SamplingConfig,
) -> Iterator[Int[Tensor, " b"]]:
    """Tokens of one position after the other, from each sequence's prefilled text and random numbers.

    With `empty`, the prefilled text without a caption, every sequence is decoded a second time without its
    caption, in rows that follow all the others, and its logits are guided away from those.
    """
    wanted = len(starts)
    padded = [starts[min(row, wanted - 1)] for row in range(wanted + -wanted % ROW_MULTIPLE)]
    uniforms = torch.cat([uniforms, uniforms[-1:].expand(len(padded) - wanted, -1)])
    rows = padded if empty is None else padded + [empty] * len(padded)
    logits = torch.cat([first_logits for first_logits, _ in rows])
    cache = KVCache.cat([text_cache for _, text_cache in rows])
    # Apple's GPUs have no float64: there the codes are drawn on the CPU.
    device = logits.device
    drawing = torch.device("cpu") if device.type == "mps" else device
    for position, column in enumerate(uniforms.T.contiguous().to(drawing), start=1):
        logits = logits.to(drawing).double()
        if empty is not None:
            with_caption, without = logits.chunk(2)
            logits = guide(with_caption, without, config.guidance_scale)
        tokens = draw_codes(filter_logits(logits, config), column).to(device)
        yield tokens[:wanted]
        if position < uniforms.shape[1]:
            logits = transformer.decode(tokens if empty is None else tokens.repeat(2), cache)


def draw_codes(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The code of each row at which the cumulative distribution first exceeds the row's number in [0, 1)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # Divided by its last value, the end is exactly 1: every number below 1 finds a code that is possible.
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
