"""How well a transformer predicts captioned pictures: nats and accuracy of tokens, by position, and what captions help.

Sums over chunks of samples in float64, so any number of samples takes the memory of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.checkpoint import Loaded, text_tokenizer_of
from dalle1.data.fields import require_int
from dalle1.evaluation.captioned_tokens import CaptionedTokens, TokenBatch
from dalle1.evaluation.chunks import CHUNK_SIZE, compute_chunks
from dalle1.evaluation.likelihood import TokenNats, token_nats, told_tokens
from dalle1.evaluation.ranks import Ranks
from dalle1.models.transformer import DalleTransformer, TransformerConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionNumbers:
    """Means at each position, float64."""

    text_nats: Float[Tensor, " t"]  # NaN where no caption has a token
    text_accuracy: Float[Tensor, " t"]
    n_text: Int[Tensor, " t"]  # captions that have a token there, the one that ends them included
    image_nats: Float[Tensor, "gh gw"]
    image_accuracy: Float[Tensor, "gh gw"]
    caption_gain: Float[Tensor, "gh gw"] | None  # nats without a caption minus those with it


@dataclass(frozen=True, kw_only=True)
class TransformerNumbers:
    """What was measured: `values` by their names, and means at positions."""

    values: dict[str, float]
    positions: PositionNumbers

    def means_by_position(self) -> dict[str, Any]:
        """Means at positions and over rows of the grid, in plain types; a mean of nothing is None."""
        positions: dict[str, Any] = {
            name: _plain(getattr(self.positions, name).tolist())
            for name in PositionNumbers.__dataclass_fields__
            if getattr(self.positions, name) is not None
        }
        rows = {"image_nats_by_row": self.positions.image_nats.mean(1).tolist()}
        if self.positions.caption_gain is not None:
            rows["caption_gain_by_row"] = self.positions.caption_gain.mean(1).tolist()
        return rows | positions


def evaluate_transformer(
    samples: CaptionedTokens,
    transformer: Loaded[DalleTransformer],
    *,
    cache: Path,
    ranks: Ranks,
    device: torch.device,
    batch_size: int = 16,
    chunk_size: int = CHUNK_SIZE,
) -> TransformerNumbers:
    """Nats of all samples: those of chunks that are in the cache, and the others computed by all processes.

    Args:
        samples: Captioned pictures.
        transformer: On `device`. One that has learned pictures without a caption is asked for these too.
        cache: Where chunks are kept, see `chunks.compute_chunks`.
        ranks: The processes that share the work.
        device: Where networks are.
        batch_size: Sequences computed at once; nothing but rounding depends on it.
        chunk_size: Samples that are kept together.

    Raises: ValueError if no sample is good, or as `CaptionedTokens.batches`; TypeError or ValueError for a bad
        `batch_size`.
    """
    require_int("batch_size", batch_size, at_least=1)
    model = transformer.model
    guided = transformer.caption_dropout > 0

    def compute(numbers: range) -> Mapping[str, Tensor]:
        sums = _Sums(model.config, guided=guided)
        for batch in samples.batches(numbers, batch_size=batch_size, device=device):
            nats = token_nats(model, batch.text_tokens, batch.image_tokens, batch_size=batch_size)
            without = None
            if guided:
                nothing = model.empty_text().cpu().expand(len(batch.text_tokens), -1)
                without = token_nats(model, nothing, batch.image_tokens, batch_size=batch_size).image
            sums.add(batch, nats, without)
        return {name: tensor[None] for name, tensor in sums.tensors.items()}

    tokenizer = text_tokenizer_of(transformer, "transformer").sha256
    recipe = {"what": "nats of tokens", "samples": samples.facts, "transformer": [transformer.sha256, tokenizer]}
    chunks = compute_chunks(
        compute, len(samples), recipe=recipe, cache=cache, ranks=ranks, label="transformer", chunk_size=chunk_size
    )
    totals = {name: tensor.sum(0) for name, tensor in chunks.load().items()}
    return _numbers(totals, len(samples), model.config, samples.pixels_per_token)


class _Sums:
    """Sums over samples, float64: of nats and correct tokens by position, and moments of the nats of whole samples."""

    def __init__(self, config: TransformerConfig, *, guided: bool) -> None:
        grid = (config.grid_height, config.grid_width)
        self._text_vocab_size = config.text_vocab_size
        shapes: dict[str, tuple[int, ...]] = {
            "samples": (1,),
            "text": (3, config.text_seq_len),  # nats, correct, told
            "caption_end": (2,),  # nats of the padding that ends a caption, captions that have it
            "image": (2, *grid),  # nats, correct
            "moments": (2, 2),  # of the nats of captions and of pictures: sums, sums of squares
        }
        if guided:
            # Without a caption: nats, then of the gain its sum, sum of squares and how often it is above 0.
            shapes |= {"image_without_caption": grid, "gain": (3,)}
        self.tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, batch: TokenBatch, nats: TokenNats, without: Float[Tensor, "b gh gw"] | None) -> None:
        told = told_tokens(batch.text_tokens.cpu(), self._text_vocab_size)
        is_end = told & (batch.text_tokens.cpu() >= self._text_vocab_size)
        text, image = nats.text.double(), nats.image.double()
        of_samples = torch.stack([text.sum(1), image.sum((1, 2))])
        sums = {
            "samples": torch.tensor([len(told)]),
            "text": torch.stack([text, nats.text_correct.double(), told.double()]).sum(1),
            "caption_end": torch.stack([(text * is_end).sum(), is_end.sum()]),
            "image": torch.stack([image, nats.image_correct.double()]).sum(1),
            "moments": torch.stack([of_samples, of_samples**2], dim=1).sum(2),
        }
        if without is not None:
            gain = without.double().sum((1, 2)) - of_samples[1]
            sums["image_without_caption"] = without.double().sum(0)
            sums["gain"] = torch.stack([gain.sum(), (gain**2).sum(), (gain > 0).sum()])
        for name, tensor in sums.items():
            self.tensors[name] += tensor


def _numbers(
    totals: Mapping[str, Tensor], n_samples: int, config: TransformerConfig, pixels_per_token: int
) -> TransformerNumbers:
    n = int(totals["samples"])
    if not n:
        raise ValueError(f"at least one sample must be good, got {n_samples} bad ones")
    text_nats, text_correct, told = totals["text"]
    image_nats, image_correct = totals["image"] / n
    n_tokens = config.image_seq_len
    per_picture = float(image_nats.sum())
    n_values = 3 * pixels_per_token**2 * n_tokens
    values = {
        "samples": n,
        "bad_samples": n_samples - n,
        "text_nats_per_token": float(text_nats.sum() / told.sum()),
        "text_accuracy": float(text_correct.sum() / told.sum()),
        "text_nats_per_caption": float(text_nats.sum()) / n,
        "text_tokens_per_caption": float(told.sum()) / n,
        "image_nats_per_token": per_picture / n_tokens,
        "image_accuracy": float(image_correct.mean()),
        "image_nats_per_picture": per_picture,
        "image_bits_per_pixel_value": per_picture / math.log(2) / n_values,
        "uniform_image_nats_per_token": math.log(config.image_vocab_size),
        "first_image_token_nats": float(image_nats[0, 0]),
        "last_image_token_nats": float(image_nats[-1, -1]),
        "first_text_token_nats": float(text_nats[0] / told[0]),
    }
    end_nats, n_ends = totals["caption_end"].tolist()
    if n_ends:
        values["caption_end_nats"] = end_nats / n_ends
    gain = None
    if "gain" in totals:
        without = totals["image_without_caption"] / n
        gain = without - image_nats
        values |= {
            "image_nats_per_token_without_caption": float(without.mean()),
            "caption_gain_nats_per_picture": float(totals["gain"][0]) / n,
            "caption_gain_share": float(totals["gain"][2]) / n,
        }
    if n > 1:  # of one sample nobody knows
        moments = {"text_nats_per_caption": totals["moments"][0], "image_nats_per_picture": totals["moments"][1]}
        moments |= {} if gain is None else {"caption_gain_nats_per_picture": totals["gain"][:2]}
        values |= {f"{name}_error": _standard_error(sums, n) for name, sums in moments.items()}
    positions = PositionNumbers(
        text_nats=text_nats / told,
        text_accuracy=text_correct / told,
        n_text=told.long(),
        image_nats=image_nats,
        image_accuracy=image_correct,
        caption_gain=gain,
    )
    return TransformerNumbers(values=values, positions=positions)


def _standard_error(moments: Float[Tensor, " 2"], n: int) -> float:
    """Of the mean of n values, at least 2, with this sum and sum of squares."""
    total, squares = moments.tolist()
    variance = max(0.0, squares / n - (total / n) ** 2)
    return math.sqrt(variance / (n - 1))


def _plain(value: Any) -> Any:
    """Nested lists with None for NaN, which JSON lacks."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
