"""Which state may attend to which: the sparse patterns of Ramesh et al. 2021 (sec. 2.2, app. B.1, fig. 11).

All (row, column) arithmetic of the transformer is here. A mask is a bool tensor, True where the query (first
axis) may attend to the key (second axis). Image positions are raster indices; an offset is query - key >= 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from dalle1.models.options import AttentionPattern, ConvOffsets, LayerPatterns


def paper_layer_patterns(n_layers: int) -> tuple[AttentionPattern, ...]:
    """The paper's order: layer i (from 1) is `column` if (i - 2) % 4 == 0, else `row`; the last is `conv`.

    Raises: ValueError if `n_layers` is below 1.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers must be >= 1, got {n_layers}")
    body: list[AttentionPattern] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layers)]
    return (*body, "conv")


def layer_patterns(
    attention: LayerPatterns | tuple[AttentionPattern, ...], n_layers: int
) -> tuple[AttentionPattern, ...]:
    """The pattern of each layer, first to last: by the name of a rule, or as they are.

    Raises: ValueError if `attention` is neither or has another length; `image_offsets` checks the patterns themselves.
    """
    if attention == "paper":
        return paper_layer_patterns(n_layers)
    full: AttentionPattern = "full"
    if attention == "full":
        return (full,) * n_layers
    if not isinstance(attention, tuple):
        raise ValueError(f"attention must be paper, full or a list of patterns, got {attention!r}")
    if len(attention) != n_layers:
        raise ValueError(
            f"attention must name a pattern for each of n_layers = {n_layers} layers, got {len(attention)} of them"
        )
    return attention


def image_offsets(
    pattern: AttentionPattern,
    grid_height: int,
    grid_width: int,
    *,
    conv_kernel_size: int = 11,
    conv_offsets: ConvOffsets = "wrapped",
) -> tuple[int, ...]:
    """The offsets (query - key, raster order) that a pattern allows on a grid, ascending, always with 0.

    `row`: 0 .. width, a window that crosses line ends (33 keys at width 32). `column`: multiples of the width.
    `full`: all. `conv`: the causal half of a square kernel; the paper gives its exact offsets only in a
    picture, so both readings exist: `wrapped` takes dr * width + (dc mod width), columns wrapping inside
    their line, which is {0, 1, 3, 4, 5, 7} at width 4 and kernel 3; `raster` takes dr * width + dc >= 0.

    Raises: ValueError for an unknown pattern or a kernel size that is not a positive odd number.
    """
    length = grid_height * grid_width
    if pattern == "full":
        return tuple(range(length))
    if pattern == "row":
        return tuple(range(min(grid_width + 1, length)))
    if pattern == "column":
        return tuple(range(0, length, grid_width))
    if pattern != "conv":
        raise ValueError(f"attention pattern must be one of {', '.join(get_args(AttentionPattern))}, got {pattern!r}")
    if conv_kernel_size < 1 or conv_kernel_size % 2 == 0:
        raise ValueError(f"conv_kernel_size must be odd and >= 1, got {conv_kernel_size}")
    reach = conv_kernel_size // 2
    steps = [(row, column) for row in range(reach + 1) for column in range(-reach, reach + 1)]
    if conv_offsets == "wrapped":
        found = {row * grid_width + column % grid_width for row, column in steps}
    else:
        found = {row * grid_width + column for row, column in steps}
    return tuple(sorted(offset for offset in found if 0 <= offset < length))


@dataclass(frozen=True, kw_only=True)
class StreamLayout:
    """A stream of states: first those of the text, then those of the image in raster order.

    Image state i stands at position i of the grid; the last position may have none."""

    text_states: int
    image_states: int  # grid_height * grid_width, or one less
    grid_height: int
    grid_width: int
    conv_kernel_size: int
    conv_offsets: ConvOffsets

    @property
    def n_states(self) -> int:
        """All states."""
        return self.text_states + self.image_states

    def offsets(self, pattern: AttentionPattern) -> tuple[int, ...]:
        """See `image_offsets`."""
        return image_offsets(
            pattern,
            self.grid_height,
            self.grid_width,
            conv_kernel_size=self.conv_kernel_size,
            conv_offsets=self.conv_offsets,
        )

    def image_mask(self, pattern: AttentionPattern) -> Bool[Tensor, "m m"]:
        """Mask among the image states."""
        return image_mask(self.offsets(pattern), self.image_states)

    def mask(self, pattern: AttentionPattern) -> Bool[Tensor, "s s"]:
        """Mask among all states."""
        return stream_mask(self.image_mask(pattern), self.text_states)

    def image_order(self, *, column_major: bool) -> list[int]:
        """The image states, raster or column by column. The last position of the grid is the last in both."""
        height, width = self.grid_height, self.grid_width
        order = [row * width + column for column in range(width) for row in range(height)]
        return order[: self.image_states] if column_major else list(range(self.image_states))

    def order(self, *, column_major: bool) -> list[int]:
        """All states: the text, then `image_order`."""
        image = self.image_order(column_major=column_major)
        return [*range(self.text_states), *(self.text_states + state for state in image)]

    def count_pairs(self, pattern: AttentionPattern) -> int:
        """Number of (query, key) pairs that the mask allows: what exact attention has to compute."""
        text, image = self.text_states, self.image_states
        among_image = sum(image - offset for offset in self.offsets(pattern) if offset < image)
        return text * (text + 1) // 2 + text * image + among_image

    def hides_nothing(self, pattern: AttentionPattern) -> bool:
        """Whether the mask is plain causal attention."""
        return self.count_pairs(pattern) == self.n_states * (self.n_states + 1) // 2


def image_mask(offsets: Sequence[int], length: int) -> Bool[Tensor, "length length"]:
    """Mask among `length` image positions that allows exactly these offsets."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None, :]
    return torch.isin(distance, torch.tensor(tuple(offsets)))


def stream_mask(image: Bool[Tensor, "n n"], text_length: int) -> Bool[Tensor, "s s"]:
    """Mask of the whole stream: text sees earlier text, every image position sees all text, then `image` holds."""
    total = text_length + image.shape[0]
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:text_length, :text_length] = torch.ones(text_length, text_length, dtype=torch.bool).tril()
    mask[text_length:, :text_length] = True
    mask[text_length:, text_length:] = image
    return mask
