"""A picture of pictures that are still being sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.data.fields import require_int
from dalle1.evaluation.pictures import save_picture, to_pictures
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.sampling.progress import Progress
from dalle1.tokenizers.image import ImageTokenizer

_MOST_PICTURES = 16
_GREY = 0.75


class Preview:
    """Draws the first pictures that are being decoded, every few rows; what is not sampled yet is grey."""

    def __init__(self, path: Path, image_tokenizer: ImageTokenizer, every: int) -> None:
        """Draw to `path` after every `every` rows of tokens.

        Raises: TypeError or ValueError unless that is a whole number >= 1.
        """
        require_int("preview_every", every, at_least=1)
        self._path, self._image_tokenizer, self._every = path, image_tokenizer, every

    def __call__(self, progress: Progress) -> None:
        """Look at where sampling is."""
        grid = progress.block.image_tokens
        height, width = grid.shape[-2:]
        rows, rest = divmod(progress.positions_done, width)
        if rest or (rows % self._every and rows != height):
            return
        # One at a time, as large pictures take much memory.
        images = torch.cat([draw_so_far(each, self._image_tokenizer) for each in grid.flatten(0, 1)[:_MOST_PICTURES]])
        done = f"{progress.candidates_done} of {progress.candidates} pictures done, of these {rows} of {height} rows"
        save_picture(draw_page([GridBlock(title=done, pictures=to_pictures(images))]), self._path)

    def remove(self) -> None:
        """The pictures themselves are there."""
        self._path.unlink(missing_ok=True)


def draw_so_far(image_tokens: Int[Tensor, "gh gw"], image_tokenizer: ImageTokenizer) -> Float[Tensor, "1 3 h w"]:
    """The picture of tokens of which some are not known yet: those are -1, and grey in it.

    The picture is on the tokens' device, with values in [0, 1].
    """
    known = image_tokens >= 0
    # Decoders look around every cell, so unknown ones would colour those that are known; with the token above them
    # these stay about what they become.
    filled = image_tokens.clamp(min=0)
    for row in range(1, len(filled)):
        filled[row] = torch.where(known[row], filled[row], filled[row - 1])
    image = image_tokenizer.decode(filled[None])
    side = image.shape[2] // len(filled)
    unknown = ~known.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return image.masked_fill(unknown, _GREY)
