"""How a released CLIP or SigLIP wants its pictures: read from its files, done on tensors on their device.

The models were trained on pictures that Pillow resized, in 8 bits. Rounding as Pillow does (before the resize, between
its two passes and after) makes the scores those of the library's own preprocessing; without it, cosines of random
networks differ by up to 0.009, with it by less than 0.0005.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

FILE_NAME = "preprocessor_config.json"
_PROCESSOR_FILE_NAME = "processor_config.json"  # of tokenizer and pictures in one, as newer releases have it
_LARGEST_SIDE = 4096  # pixels, far beyond any model's; a file must not make us take all memory
# Pillow's numbers of its filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop, rescale, normalise: pictures of any size to what a model sees."""

    resize: int | tuple[int, int] | None  # length of the shorter side, or (height, width); None: as they are
    mode: str = "bicubic"  # or bilinear
    crop: tuple[int, int] | None  # (height, width) of the centre, with black where the picture is smaller
    scale: float = 1 / 255  # times the level in [0, 255]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        """Pictures in [0, 1] as the model sees them."""
        # As they are written to files.
        levels = (images.float().clamp(0, 1) * 255).round()
        if self.resize is not None:
            levels = _resize(levels, self._resized(*levels.shape[-2:]), self.mode)
        if self.crop is not None:
            levels = _center_crop(levels, self.crop)
        mean, std = (levels.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return (levels * self.scale - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            assert self.resize is not None
            return self.resize
        shorter = min(height, width)
        # Rounded down, as Pillow's callers do; the shorter side comes out exactly.
        return self.resize * height // shorter, self.resize * width // shorter


def read_preprocessing(directory: Path, model_type: str) -> Preprocessing:
    """What the directory of a model (`clip`, `siglip` or `dinov2`) says of its pictures.

    Raises: FileNotFoundError if it says nothing; ValueError if it asks for what is not done here.
    """
    found = _find_config(directory)
    if found is None:
        raise FileNotFoundError(f"'{directory}' must have a {FILE_NAME}; get it from the model's source")
    path, config = found
    try:
        return _from_config(config, model_type)
    except ValueError as error:
        raise ValueError(f"'{path}' {error}; choose another model") from error


def has_preprocessing(directory: Path) -> bool:
    """Whether the directory of a model says how it wants its pictures."""
    return _find_config(directory) is not None


def _find_config(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Where the directory of a model says how it wants its pictures, and what; in the library's order."""
    newer, older = directory / _PROCESSOR_FILE_NAME, directory / FILE_NAME
    if newer.is_file() and isinstance(config := read_json(newer).get("image_processor"), dict):
        return newer, config
    return (older, read_json(older)) if older.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError if it is damaged or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON, it is damaged or cut short; get it again from its source") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold an object, got a {type(content).__name__}; get it again from its source")
    return content


def _from_config(config: Mapping[str, Any], model_type: str) -> Preprocessing:
    """Raises: ValueError whose text goes on a sentence that began with the file's name."""
    # What files leave out has the value of the library's classes; they differ in this one alone.
    crops = config.get("do_center_crop", model_type != "siglip")
    rescales, normalizes = config.get("do_rescale", True), config.get("do_normalize", True)
    if config.get("do_pad"):
        raise ValueError("must not pad pictures, it has do_pad=true")
    resample = config.get("resample", 3)
    if resample not in _FILTERS:
        raise ValueError(f"must resize pictures with resample=2 (bilinear) or 3 (bicubic), got {resample!r}")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float):
        raise ValueError(f"must give rescale_factor as a number, got {factor!r}")
    return Preprocessing(
        resize=_size(config.get("size"), "size") if config.get("do_resize", True) else None,
        mode=_FILTERS[resample],
        crop=_area(config.get("crop_size"), "crop_size") if crops else None,
        scale=float(factor) if rescales else 1.0,
        mean=_colors(config.get("image_mean"), "image_mean") if normalizes else (0.0, 0.0, 0.0),
        std=_colors(config.get("image_std"), "image_std") if normalizes else (1.0, 1.0, 1.0),
    )


def _size(size: Any, name: str) -> int | tuple[int, int]:
    """A size as any release writes it: a number, two, or either by name; entries that are null do not count."""
    if isinstance(size, list) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    named = size if isinstance(size, dict) else {"shortest_edge": size}
    named = {key: number for key, number in named.items() if number is not None}
    if all(isinstance(number, int) and 0 < number <= _LARGEST_SIDE for number in named.values()):
        if named.keys() == {"shortest_edge"}:
            return int(named["shortest_edge"])
        if named.keys() == {"height", "width"}:
            return named["height"], named["width"]
    raise ValueError(
        f"must give {name} as a height and width or as a shortest_edge, up to {_LARGEST_SIDE}, got {size!r}"
    )


def _area(size: Any, name: str) -> tuple[int, int]:
    """As `_size`, where one number means a square."""
    area = _size(size, name)
    return (area, area) if isinstance(area, int) else area


def _colors(numbers: Any, name: str) -> tuple[float, float, float]:
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"must give {name} as three numbers, got {numbers!r}")
    if name == "image_std" and min(numbers) <= 0:
        raise ValueError(f"must give {name} as three numbers above 0, got {numbers!r}")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _resize(levels: Float[Tensor, "n 3 h w"], size: tuple[int, int], mode: str) -> Float[Tensor, "n 3 h2 w2"]:
    """Whole numbers in [0, 255] to the same: across, then down, each pass rounded. A side that stays is left alone.

    So does Pillow; since its version 13 some tall pictures go down first, but models were trained with earlier ones.
    """
    for passed in ((levels.shape[-2], size[1]), size):
        if levels.shape[-2:] != torch.Size(passed):
            # The filter is widened where pictures shrink (antialias), as Pillow always does. Halves go up, as there.
            resized = interpolate(levels, passed, mode=mode, align_corners=False, antialias=True)
            levels = (resized.clamp(0, 255) + 0.5).floor()
    return levels


def _center_crop(levels: Float[Tensor, "n 3 h w"], size: tuple[int, int]) -> Float[Tensor, "n 3 h2 w2"]:
    (height, width), (new_height, new_width) = levels.shape[-2:], size
    top, left = -((height - new_height) // 2), -((width - new_width) // 2)
    # Negative padding cuts off.
    return pad(levels, (left, new_width - width - left, top, new_height - height - top))
