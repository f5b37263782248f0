"""DALLE-pytorch as an installed package, to compare with.

`pip install --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch` is enough: packages that
it imports at the top but that these paths never call (torchvision, taming, youtokentome, ...) are replaced by stand-ins
where they are missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any
from unittest.mock import MagicMock

_NOT_CALLED = (
    *("torchvision", "torchvision.transforms", "taming", "taming.models", "taming.models.vqgan", "youtokentome"),
    *("transformers", "ftfy", "regex", "pkg_resources", "requests", "omegaconf", "yaml"),
)
_CALLED = ("dalle_pytorch", "axial_positional_embedding", "rotary_embedding_torch")


def dalle_pytorch() -> Any:
    """The module with its networks.

    Raises: FileNotFoundError if it is not installed.
    """
    missing = [name for name in _CALLED if not _is_installed(name)]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is not installed; run 'pip install --no-deps dalle-pytorch==1.6.6 "
            "axial-positional-embedding rotary-embedding-torch'"
        )
    stand_ins = {name: MagicMock() for name in _NOT_CALLED if not _is_installed(name)}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("dalle_pytorch.dalle_pytorch")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
