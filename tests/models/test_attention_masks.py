"""The sparse patterns, against the paper's figures and against loops over (query, key)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dalle1.models.attention_masks import image_mask, image_offsets, paper_layer_patterns, stream_mask
from dalle1.models.options import AttentionPattern


def test_offsets_of_row_at_width_4_are_0_to_4() -> None:
    assert image_offsets("row", 4, 4) == (0, 1, 2, 3, 4)


def test_offsets_of_row_at_width_32_are_33() -> None:
    assert len(image_offsets("row", 32, 32)) == 33


def test_offsets_of_column_at_width_4_are_multiples_of_4() -> None:
    assert image_offsets("column", 4, 4) == (0, 4, 8, 12)


def test_offsets_of_wrapped_convolution_at_width_4_and_kernel_3() -> None:
    assert image_offsets("conv", 4, 4, conv_kernel_size=3) == (0, 1, 3, 4, 5, 7)


def test_offsets_of_raster_convolution_at_width_4_and_kernel_3() -> None:
    assert image_offsets("conv", 4, 4, conv_kernel_size=3, conv_offsets="raster") == (0, 1, 3, 4, 5)


def test_offsets_of_full_attention_are_all() -> None:
    assert image_offsets("full", 2, 3) == (0, 1, 2, 3, 4, 5)


def test_offsets_refuse_an_unknown_pattern() -> None:
    with pytest.raises(ValueError, match="must be one of row, column, conv, full, got 'diagonal'"):
        image_offsets("diagonal", 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 4, -3])
def test_offsets_refuse_an_even_or_too_small_kernel(size: int) -> None:
    with pytest.raises(ValueError, match=f"conv_kernel_size must be odd and >= 1, got {size}"):
        image_offsets("conv", 4, 4, conv_kernel_size=size)


def _may_attend(pattern: AttentionPattern, query: int, key: int, height: int, width: int) -> bool:
    """The patterns by rows and columns, without offsets; conv is a 3x3 kernel read as `wrapped`."""
    if key > query:
        return False
    if pattern == "row":
        return query - key <= width
    if pattern == "column":
        return query % width == key % width
    if pattern == "conv":
        return any(key == query - down * width - (aside % width) for down in range(2) for aside in (-1, 0, 1))
    return True


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (5, 2), (1, 6), (6, 1)])
@pytest.mark.parametrize("pattern", ["row", "column", "conv", "full"])
def test_image_mask_equals_a_loop_over_rows_and_columns(pattern: AttentionPattern, height: int, width: int) -> None:
    length = height * width
    mask = image_mask(image_offsets(pattern, height, width, conv_kernel_size=3), length)
    expected = [[_may_attend(pattern, query, key, height, width) for key in range(length)] for query in range(length)]
    assert mask.tolist() == expected


def test_stream_mask_is_causal_in_the_text_and_shows_all_text_to_the_image() -> None:
    image = torch.eye(6, dtype=torch.bool)
    mask = stream_mask(image, 3)
    for query in range(9):
        for key in range(9):
            if query < 3:
                expected = key <= query
            elif key < 3:
                expected = True
            else:
                expected = query == key
            assert mask[query, key] == expected


def test_paper_order_of_64_layers() -> None:
    patterns = paper_layer_patterns(64)
    assert Counter(patterns) == {"row": 47, "column": 16, "conv": 1}
    assert patterns[:4] == ("row", "column", "row", "row")
    assert patterns[-1] == "conv"


def test_paper_order_of_one_layer_is_the_convolution() -> None:
    assert paper_layer_patterns(1) == ("conv",)


def test_paper_order_refuses_no_layers() -> None:
    with pytest.raises(ValueError, match="n_layers must be >= 1, got 0"):
        paper_layer_patterns(0)
