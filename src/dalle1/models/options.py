"""The named choices that model configurations offer, and the checks that all of them share."""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

AttentionPattern = Literal["row", "column", "conv", "full"]
ConvOffsets = Literal["wrapped", "raster"]
LayerPatterns = Literal["paper", "full"]
AttentionBackend = Literal["auto", "dense", "local", "flex"]
StreamStart = Literal["one", "two"]
Padding = Literal["per_position", "shared"]
Activation = Literal["quick_gelu", "gelu"]
Pretokenizer = Literal["paper", "gpt2"]


def check_field_types(config: Any) -> None:
    """Check every field of a frozen config dataclass that is a bool, an int, a float or a Literal.

    Whole numbers pass as floats; a bool is no number. Raises: TypeError or ValueError naming the field.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, expected = getattr(config, field.name), hints[field.name]
        name = f"{type(config).__name__}.{field.name}"
        if get_origin(expected) is Literal:
            if value not in get_args(expected):
                raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(expected)))}, got {value!r}")
        elif expected is float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
        elif expected in (int, bool) and type(value) is not expected:
            kind = "a whole number" if expected is int else "true or false"
            raise TypeError(f"{name} must be {kind}, got {value!r}")
