"""Pictures that are still being sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dalle1.models.dvae import DVAE
from dalle1.preview import Preview
from dalle1.sampling.progress import Progress
from dalle1.sampling.sampler import Block
from dalle1.tokenizers.image import ImageTokenizer


def test_rows_that_are_not_sampled_are_grey(tmp_path: Path, make_dvae: Callable[..., DVAE]) -> None:
    tokenizer = ImageTokenizer(make_dvae(), sha256="")
    tokens = torch.randint(32, (1, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    preview = Preview(tmp_path / "preview.png", tokenizer, every=2)
    grey = np.full((128 // 3 - 1, 16, 3), round(0.75 * 255))
    for positions, rows in ((4, None), (7, None), (8, 2), (12, 3)):
        sampled = tokens.clone()
        sampled.view(-1)[positions:] = -1
        block = Block(prompts=range(1), candidates=range(1), image_tokens=sampled)
        preview(
            Progress(
                tokens_known=0,
                tokens_done=positions,
                tokens=12,
                candidates_done=0,
                candidates=1,
                block=block,
                positions_done=positions,
            )
        )
        assert (tmp_path / "preview.png").exists() == (rows is not None)
        if rows is not None:
            with Image.open(tmp_path / "preview.png") as page:
                # 12 x 16 pixels are drawn 11 times as large, below the title.
                bottom = np.asarray(page)[-8 - len(grey) : -8, 20:36]
            assert (bottom == grey).all() == (rows < 3)
    preview.remove()
    assert not (tmp_path / "preview.png").exists()
