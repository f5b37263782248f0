"""Checks of configuration fields whose messages name the field and the value."""

from __future__ import annotations


def require_bool(name: str, value: object) -> None:
    """Refuse any value that is not true or false. Raises: TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def require_int(name: str, value: object, *, at_least: int) -> None:
    """Refuse any value that is not a whole number of at least `at_least`.

    Raises: TypeError for other types, numbers in quotes and true/false included; ValueError if it is too small.
    """
    # Not isinstance: to Python, True is an int.
    if type(value) is not int:
        raise TypeError(f"{name} must be an integer >= {at_least}, got {value!r} of type {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
