"""A page that is used for long."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from web_page import sample, serving

from dalle1.pipeline import Pipeline
from dalle1.web.asked import Limits


@pytest.mark.slow
def test_hundred_requests_leave_memory_flat(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """After 20 requests that warm up, 100 more with an uploaded picture each may take 8 MB."""
    pipeline = Pipeline.from_checkpoint(transformer=checkpoints["transformer"], dvae=checkpoints["dvae"])
    process, noise = psutil.Process(), np.random.default_rng(0)
    before = 0
    with (
        serving(pipeline, tmp_path, limits=Limits(results=5), preview_share=0.25) as address,
        httpx.Client(base_url=address) as client,
    ):
        for number in range(120):
            if number == 20:
                before = process.memory_info().rss
            # 1.9 MB each once it is decoded: as many as were kept would show.
            picture = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(picture, "PNG")
            upload = client.post("/pictures", content=picture.getvalue()).json()["picture"]
            again = [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
            sample(client, prompt=f"a {number}", candidates=2, picture=upload, again=again)
        grown = process.memory_info().rss - before
    print(f"grown by {grown / 1e6:.1f} MB")
    assert grown < 8e6
    assert len(list(tmp_path.iterdir())) == 5
