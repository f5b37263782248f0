"""Which codes stay possible at a sampling step, and how sharp their distribution is; pure functions of logits.

Shapes: b sequences, v image vocabulary. Logits have 32 or 64 bits; a code that is ruled out has the logit -inf.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.options import check_field_types


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How codes are drawn. The defaults sample from the model's own distribution, as the paper does."""

    # Below 1: safer pictures, above 1: more varied ones; 0 is greedy, the likeliest code. A number for each row of the
    # grid, top to bottom, or one for all.
    temperature: float | tuple[float, ...] = 1.0
    temperature_end: float | None = None  # that of the last position, if it changes evenly from the first one on
    top_k: int = 0  # codes that stay possible at each position; 0 means all
    top_p: float = 1.0  # probability that the codes left possible must reach together; 1 means all
    # Classifier-free guidance (Ho and Salimans 2022): how far to go from the logits without the caption to those
    # with it. 1 is the model's own distribution; above 1 fits the caption better and varies less.
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_field_types(self)
        if isinstance(self.temperature, Sequence) and not isinstance(self.temperature, str):  # out of YAML too
            object.__setattr__(self, "temperature", tuple(self.temperature))
        rows = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        for name, value in [*(("temperature", row) for row in rows), ("temperature_end", self.temperature_end or 0)]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"SamplingConfig.{name} must be a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"SamplingConfig.{name} must be a finite number >= 0 (0 is greedy), got {value}")
        if self.temperature_end is not None and isinstance(self.temperature, tuple):
            raise ValueError(
                f"SamplingConfig.temperature must be one number with temperature_end, got {len(rows)}; leave out one"
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"SamplingConfig.guidance_scale must be a finite number >= 0, got {self.guidance_scale}")
        if self.top_k < 0:
            raise ValueError(f"SamplingConfig.top_k must be >= 0 (0 means all codes), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p must be in (0, 1] (1 means all codes), got {self.top_p}")

    def temperatures(self, grid_height: int, grid_width: int) -> list[float]:
        """That of every position, in raster order.

        Raises: ValueError if there is neither one temperature nor one for each row.
        """
        if isinstance(self.temperature, tuple):
            if len(self.temperature) != grid_height:
                raise ValueError(
                    f"temperature must be one number or one for each of {grid_height} rows, got {len(self.temperature)}"
                )
            return [row for row in self.temperature for _ in range(grid_width)]
        first, count = self.temperature, grid_height * grid_width
        if self.temperature_end is None:
            return [first] * count
        # So written it is exact at both ends, and never below 0.
        shares = [position / max(1, count - 1) for position in range(count)]
        return [first * (1 - share) + self.temperature_end * share for share in shares]


DEFAULT_SAMPLING = SamplingConfig()


def guide(
    with_caption: Float[Tensor, "b v"], without: Float[Tensor, "b v"], guidance_scale: float
) -> Float[Tensor, "b v"]:
    """Logits moved from those without the caption towards those with it, and beyond for a scale above 1.

    Normalising either first would change nothing: the distribution does not depend on a constant per row."""
    return without + guidance_scale * (with_caption - without)


def filter_logits(logits: Float[Tensor, "b v"], config: SamplingConfig, temperature: float) -> Float[Tensor, "b v"]:
    """Temperature, then top-k, then top-p, each on what the one before left."""
    return keep_top_p(keep_top_k(apply_temperature(logits, temperature), config.top_k), config.top_p)


def apply_temperature(logits: Float[Tensor, "b v"], temperature: float) -> Float[Tensor, "b v"]:
    """Logits divided by the temperature; the largest of a row becomes 0, so no temperature is too low.

    0 keeps the likeliest code alone, the lowest of equals."""
    if temperature == 0:
        return keep_top_k(logits, 1)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Float[Tensor, "b v"], top_k: int) -> Float[Tensor, "b v"]:
    """Exactly the `top_k` largest logits of each row, the lower code first among equals; all of them for 0."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return _keep_largest(logits, _kth_largest(logits, top_k), top_k)


def keep_top_p(logits: Float[Tensor, "b v"], top_p: float) -> Float[Tensor, "b v"]:
    """The fewest most likely codes of each row whose probability together is >= `top_p`; all of them for 1.

    Among equals the lower code comes first; the most likely code always stays.
    """
    if top_p == 1:
        return logits
    ordered = _descending(logits)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    # A code is needed if those before it do not reach top_p.
    count = 1 + (cumulative[:, :-1] < top_p).sum(dim=-1, keepdim=True)
    return _keep_largest(logits, ordered.gather(-1, count - 1), count)


def _keep_largest(
    logits: Float[Tensor, "b v"], smallest: Float[Tensor, "b 1"], count: int | Int[Tensor, "b 1"]
) -> Float[Tensor, "b v"]:
    """The `count` largest of each row, of which the last is `smallest`: of those that equal it the first ones."""
    kept = logits >= smallest
    # On a GPU it would cost more to ask than to do it.
    if logits.device.type != "cpu" or bool((kept.sum(dim=-1, keepdim=True) > count).any()):
        above, tied = logits > smallest, logits == smallest
        kept = above | (tied & (tied.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
    return logits.masked_fill(~kept, -math.inf)


# On a CPU NumPy's are 13 and 35 times as fast as PyTorch's: 8 rows of 8192 codes, one thread, numpy 2.4, torch 2.13.
def _kth_largest(logits: Float[Tensor, "b v"], k: int) -> Float[Tensor, "b 1"]:
    if logits.device.type == "cpu":
        return torch.from_numpy(np.partition(logits.numpy(), -k, axis=-1)[:, -k, None])
    return logits.topk(k, sorted=False).values.amin(dim=-1, keepdim=True)


def _descending(logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values
