"""A run of sampling as the gallery gets it: a manifest, and pictures by their names."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

NASTY_PROMPTS = [
    "</script><script>document.title = 'owned'</script>",
    "\"'><img src=x onerror=\"document.title = 'owned'\">",
    "<!-- {{ 7 * 7 }} {% raw %} ${7 * 7} &amp; \\u003c \\ `",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "日本のドラゴン 🐉\u2028\u2029\ttab\nline",
    "x" * 700,
]


def make_manifest(prompts: Mapping[str, Sequence[float | None]], **changes: Any) -> dict[str, Any]:
    """A complete run of 8 candidates per prompt; a prompt's scores are those of its candidates 0, 1, ..."""
    entries = []
    for number, (prompt, scores) in enumerate(prompts.items(), start=1):
        pictures = [
            {"file": f"{number:04d}-picture-{i:04d}.png", "candidate": i, "score": score}
            for i, score in enumerate(scores)
        ]
        entries.append({"prompt": prompt, "sampled": 8, "pictures": pictures})
    manifest = {
        "format_version": 2,
        "created": "2026-11-22T04:09:10+00:00",
        "complete": True,
        "versions": {"dalle1": "0.1.0", "torch": "2.13.0"},
        "settings": {
            "prompt": None,
            "prompts_file": "prompts.txt",
            "candidates": 8,
            "seed": 0,
            "temperature": [0.5, 1.0],
            "temperature_end": None,
            "top_p": 0.95,
            "name": "my run",
            "out": "pictures",
        },
        "checkpoints": {"transformer": {"sha256": "aa11", "step": 7}, "dvae": {"sha256": "bb22"}},
        "reranker": {"kind": "clip", "sha256": "cc33"},
        "grids": ["grid.png"],
        "prompts": entries,
    }
    return manifest | changes


def open_picture(file: str, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Noise that depends on the file's name."""
    noise = np.random.default_rng(zlib.crc32(file.encode()))
    return Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
