"""Pixels that a released model sees, against those of transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import SIDE, SIGLIP_PICTURES, SIZES, edit_json, library_pixels, make_images, write_json

from dalle1.rerank.hf_preprocessing import Preprocessing, read_preprocessing

pytestmark = pytest.mark.usefixtures("no_network")


PROCESSINGS = {
    "smaller than its crop": {"size": {"shortest_edge": 21}, "crop_size": {"height": 32, "width": 27}},
    "a part of it": {"size": {"shortest_edge": 40}, "crop_size": {"height": 25, "width": 32}},
    "squeezed": {"size": {"height": 18, "width": 50}, "do_center_crop": False},
    "two numbers": {"size": [18, 50], "crop_size": [18, 50]},
    "as it is": {"do_resize": False, "do_center_crop": False},
    "bilinear": {"resample": 2},
    "levels": {"do_rescale": False},
    "another range": {"rescale_factor": 2 / 255, "do_normalize": False},
}


@pytest.mark.usefixtures("quiet_library", "across_then_down")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSINGS)
def test_pixels_are_those_of_the_library(copy: Callable[[str], Path], name: str, size: tuple[int, int]) -> None:
    directory = copy("clip")
    edit_json(directory / "preprocessor_config.json", **PROCESSINGS[name])
    preprocessing = read_preprocessing(directory, "clip")
    images = make_images(2, *size)
    pixels, expected = preprocessing(images), library_pixels(directory, images)
    errors = (pixels - expected) * torch.tensor(preprocessing.std)[:, None, None] / preprocessing.scale
    # In levels. A sum that is halfway between two of them may be rounded to either, in both passes.
    assert errors.abs().max() < 2.01
    assert errors.square().mean().sqrt() < 0.3  # 0.4 and more if only the result is rounded


@pytest.mark.usefixtures("quiet_library")
def test_newer_releases_have_their_preprocessing_in_another_file(copy: Callable[[str], Path]) -> None:
    directory = copy("siglip")
    old = directory / "preprocessor_config.json"
    write_json(directory / "processor_config.json", {"image_processor": SIGLIP_PICTURES | {"resample": 2}})
    expected = Preprocessing(resize=(SIDE, SIDE), mode="bilinear", crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert read_preprocessing(directory, "siglip") == expected  # the library looks there first, too
    old.unlink()
    assert read_preprocessing(directory, "siglip") == expected
    write_json(old, SIGLIP_PICTURES)
    write_json(directory / "processor_config.json", {"processor_class": "SiglipProcessor"})
    assert read_preprocessing(directory, "siglip").mode == "bicubic"
