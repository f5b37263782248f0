"""A picture of pictures that are still being sampled."""

from __future__ import annotations

from pathlib import Path

import torch

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
        tokens = grid.flatten(0, 1)[:_MOST_PICTURES]
        # Decoders look around every cell, so unknown ones would colour the last row that is known; repeated, that row
        # stays about what it becomes.
        known = torch.arange(height, device=tokens.device).clamp(max=rows - 1)
        # One at a time, as large pictures take much memory.
        images = torch.cat([self._image_tokenizer.decode(each[None, known]) for each in tokens])
        images[:, :, rows * (images.shape[2] // height) :] = _GREY
        done = f"{progress.candidates_done} of {progress.candidates} pictures done, of these {rows} of {height} rows"
        save_picture(draw_page([GridBlock(title=done, pictures=to_pictures(images))]), self._path)

    def remove(self) -> None:
        """The pictures themselves are there."""
        self._path.unlink(missing_ok=True)
