"""Pictures of which some token cells stay and the others are sampled again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from dalle1.data.fields import require_int
from dalle1.data.transforms import crop_box

_GREYS = 0.65, 0.85  # a chessboard of them is where a person sees what does not stay


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePrompt:
    """A picture as the model sees it, and which of its cells stay."""

    image: Float[Tensor, "3 h w"]  # in [0, 1], on the CPU, as are the others
    image_tokens: Int[Tensor, "gh gw"]
    kept: Bool[Tensor, "gh gw"]
    paste_kept: bool = False  # put the kept cells' own pixels over those that were decoded

    @property
    def given(self) -> Int[Tensor, "gh gw"]:
        """Tokens that stay, -1 where they are sampled."""
        return self.image_tokens.masked_fill(~self.kept, -1)

    @property
    def shown(self) -> Float[Tensor, "3 h w"]:
        """What stays of the picture; the rest is a chessboard of cells."""
        height, width = self.kept.shape
        odd = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 1
        return torch.where(self._pixels(self.kept), self.image, torch.where(self._pixels(odd), *_GREYS))

    def paste(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Pictures with the kept pixels over them, if that is asked for."""
        if not self.paste_kept:
            return images
        return torch.where(self._pixels(self.kept).to(images.device), self.image.to(images.device), images)

    def _pixels(self, cells: Bool[Tensor, "gh gw"]) -> Bool[Tensor, "h w"]:
        side = self.image.shape[1] // cells.shape[0]
        return cells.repeat_interleave(side, 0).repeat_interleave(side, 1)


def keep_top_rows(rows: int, grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
    """True in the first `rows` rows of token cells.

    Raises: TypeError or ValueError unless it is a whole number in [1, height of the grid).
    """
    require_int("keep_rows", rows, at_least=1)
    height, width = grid
    if rows >= height:
        raise ValueError(f"keep_rows must leave some of the {height} rows of tokens to sample, got {rows}")
    return (torch.arange(height) < rows)[:, None].expand(height, width).clone()


def kept_outside(
    mask: Image.Image, *, picture_size: tuple[int, int], grid: tuple[int, int], cell: int
) -> Bool[Tensor, "gh gw"]:
    """True where a mask is black: a cell is sampled again if any part of it is lighter than mid grey.

    Args:
        mask: A picture, as large as the one it belongs to; or as the model sees that, or as the grid of tokens.
        picture_size: Width and height of the picture before it is cropped, in pixels.
        grid: Height and width in tokens.
        cell: Side of a token's cell in pixels.

    Raises: ValueError for another size, and if nothing or everything is to be sampled again.
    """
    height, width = grid
    sizes = (picture_size, (width * cell, height * cell), (width, height))
    if mask.size not in sizes:
        allowed = " or ".join(f"{w} x {h}" for w, h in dict.fromkeys(sizes))
        raise ValueError(f"mask must have the size of its picture, {allowed} pixels, got {mask.width} x {mask.height}")
    seen = mask.convert("L").crop(crop_box(mask.size, height, width))
    lightest = F.adaptive_max_pool2d(torch.from_numpy(np.array(seen, dtype=np.float32))[None], (height, width))[0]
    kept = lightest <= 127
    if kept.all():
        raise ValueError("mask must be white where the picture is to be sampled again, it is black everywhere")
    if not kept.any():
        raise ValueError("mask must be black where the picture stays, it is white everywhere; leave out image and mask")
    return kept
