"""Reads weights from files that others made, without running anything in them: torch.save and safetensors.

torch.save writes either a zip archive (since torch 1.6) or a sequence of pickles followed by raw numbers (before); both
may hold a state dict or a whole pickled module. Pickles are read by `inert_pickle`, and torch.load is not used at all:
what is not read here (TorchScript, the tar files of the first versions of torch) is refused.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from dalle1.released import inert_pickle
from dalle1.released.inert_pickle import Builder, Inert, Name, RefusedError, pairs_to_dict

Setting = bool | int | float | str


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    tensors: dict[str, Tensor]
    settings: dict[str, Setting]  # plain attributes of pickled modules, by dotted name; none in other files


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _TensorView:
    """How a tensor lies in its storage; all in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_ZIP_MAGIC = b"PK\x03\x04"
_TAR_MAGIC = b"ustar"  # from byte 257 on
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MOST_AXES = 8
_LONGEST_NAME = 200  # characters of a module's dotted name; the released files have about 40
_MOST_ENTRIES = 100_000  # weights and settings; the released files have about 2,000
_DTYPES = {
    Name("torch", "FloatStorage"): torch.float32,
    Name("torch", "DoubleStorage"): torch.float64,
    Name("torch", "HalfStorage"): torch.float16,
    Name("torch", "BFloat16Storage"): torch.bfloat16,
}
# Classes whose objects are of no use but for their state, by module.
_CLASSES = {
    "dall_e.encoder": ("Encoder", "EncoderBlock"),
    "dall_e.decoder": ("Decoder", "DecoderBlock"),
    "dall_e.utils": ("Conv2d",),
    "torch.nn.modules.container": ("Sequential", "ModuleList", "ModuleDict"),
    "torch.nn.modules.activation": ("ReLU",),
    "torch.nn.modules.pooling": ("MaxPool2d",),
    "torch.nn.modules.upsampling": ("Upsample",),
    "torch.nn.modules.linear": ("Identity",),
    "functools": ("partial",),
    "torch": ("device", "Size", "float16", "float32"),
    "builtins": ("set",),
    "__builtin__": ("set",),  # as it is called in pickles that Python 2 could read, torch.save's default
}


def read_weights(path: str | Path) -> Weights:
    """The named tensors in a file, with their own types, on the CPU.

    Raises: FileNotFoundError if there is none; ValueError in one sentence if it is damaged, of another format, or
        holds anything but tensors and the known modules.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at '{path}'; download them or correct the path")
    with open(path, "rb") as file:
        try:
            return _reader_for(file.read(512))(file)
        except RefusedError as error:
            raise ValueError(f"'{path}' {error}; nothing in it was run, get it again from its source") from error
        except Exception as error:  # a damaged pickle can raise any error
            # It may quote the file.
            reason = "".join(filter(str.isprintable, str(error)))[:100] or type(error).__name__
            raise ValueError(f"'{path}' is damaged or cut short ({reason}); get it again from its source") from error


def _reader_for(head: bytes) -> Callable[[IO[bytes]], Weights]:
    """The reader of a file that begins with `head`."""
    if head.startswith(_ZIP_MAGIC):
        return _read_zip
    if head[8:9] == b"{":  # behind the length of its header, which may begin with any byte
        return _read_safetensors
    if head[257:].startswith(_TAR_MAGIC):
        raise RefusedError("must not be a tar file, as only the first versions of torch wrote them")
    if head.startswith(b"\x80"):  # a pickle of protocol 2 or later
        return _read_legacy
    raise RefusedError(f"must be a file of torch.save or safetensors, it begins with {head[:12]!r}")


def _read_safetensors(file: IO[bytes]) -> Weights:
    return Weights(load_file(file.name), {})


def _read_zip(file: IO[bytes]) -> Weights:
    with zipfile.ZipFile(file) as archive:
        # All records are in one folder, of any name.
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(name == "constants.pkl" or name.startswith("code/") for name in records):
            raise RefusedError("must hold weights, it is a TorchScript program")
        if "data.pkl" not in records:
            raise RefusedError("must be a file of torch.save, this zip archive has no data.pkl")
        if sum(info.file_size for info in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise RefusedError("must be a file of torch.save, the records in this zip archive are larger than itself")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise RefusedError("must be from a little-endian machine")
        pickle = io.BytesIO(archive.read(records["data.pkl"]))
        root = inert_pickle.load(pickle, known=_KNOWN, load_persistent=partial(_persistent, {}))
        return _named_weights(root, lambda storage: bytearray(archive.read(records[f"data/{storage.key}"])))


def _read_legacy(file: IO[bytes]) -> Weights:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pickles = cast("IO[bytes]", content)
        storages: dict[str, _Storage] = {}
        plain = partial(inert_pickle.load, pickles, known={}, load_persistent=_no_persistent)
        if plain() != _LEGACY_MAGIC or plain() != _LEGACY_VERSION:
            raise RefusedError("must be a file of torch.save, it is another pickle")
        if plain()["little_endian"] is not True:
            raise RefusedError("must be from a little-endian machine")
        root = inert_pickle.load(pickles, known=_KNOWN, load_persistent=partial(_persistent, storages))
        starts = {}
        for key in plain():
            if type(key) is not str:  # hashing a deeply nested key can end the process
                raise ValueError("a storage without a name")
            (numel,) = struct.unpack("<q", content.read(8))
            if numel != storages[key].numel:
                raise ValueError(f"{numel} numbers instead of {storages[key].numel}")
            starts[key] = content.tell()
            content.seek(numel * storages[key].dtype.itemsize, os.SEEK_CUR)

        def read(storage: _Storage) -> bytearray:
            start = starts[storage.key]
            return bytearray(content[start : start + storage.numel * storage.dtype.itemsize])

        return _named_weights(root, read)


def _persistent(storages: dict[str, _Storage], saved: object) -> object:
    """What torch.save keeps out of the pickle: a storage (noted in `storages`), or a class with its source code."""
    match saved:
        case ("module", Name(), *_):
            return saved[1]
        case ("storage", Name() as kind, str(key), _, int(numel), *view) if numel >= 0 and not any(view):
            storage = _Storage(key, _DTYPES[kind], numel)
            if storages.setdefault(key, storage) != storage:
                raise ValueError(f"two sizes of the storage {key!r}")
            return storage
    raise ValueError("a persistent id that is neither a storage nor a module")


def _no_persistent(_: object) -> object:
    raise ValueError("a persistent id where none belongs")


def _tensor_view(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> _TensorView:
    """What `torch._utils._rebuild_tensor_v2` would make."""
    numbers = (offset, *size, *stride)
    if type(storage) is not _Storage or metadata or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError("a tensor of an unknown kind")
    if len(size) > _MOST_AXES:
        raise ValueError(f"a tensor of {len(size)} axes")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # The second bound keeps a tensor, once copied, from being larger than its file.
    if end > storage.numel or math.prod(size) > storage.numel:
        raise ValueError("a tensor larger than its storage")
    return _TensorView(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> _TensorView:
    """What `torch._utils._rebuild_parameter` would make."""
    if type(data) is not _TensorView:
        raise ValueError("a parameter without a tensor")
    return data


def _inert_builder(name: Name) -> Builder:
    return lambda *_: Inert(name)


_KNOWN: dict[Name, Builder] = {
    Name("collections", "OrderedDict"): pairs_to_dict,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor_view,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    **{name: _inert_builder(name) for name in _DTYPES},
    **{
        name: _inert_builder(name)
        for name in (Name(module, attribute) for module in _CLASSES for attribute in _CLASSES[module])
    },
}


def _named_weights(root: object, read: Callable[[_Storage], bytearray]) -> Weights:
    """The tensors and settings in what a pickle holds, a state dict or a module."""
    views, settings = _walk(root) if type(root) is Inert else (root, {})
    if type(views) is not dict:
        raise RefusedError(f"must hold a module or a state dict, it holds a {type(root).__name__}")
    owners: dict[str, str] = {}
    tensors = {}
    for name, view in views.items():
        if type(name) is not str or type(view) is not _TensorView:
            raise RefusedError(f"must hold a module or a dict of named tensors, its {name!r} is no tensor")
        owner = owners.setdefault(view.storage.key, name)
        if owner != name:
            raise RefusedError(f"must hold tensors of their own, but {owner!r} and {name!r} share their numbers")
        flat = torch.frombuffer(read(view.storage), dtype=view.storage.dtype, count=view.storage.numel)
        tensors[name] = flat.as_strided(view.size, view.stride, view.offset)
    return Weights(tensors, settings)


def _walk(root: Inert) -> tuple[dict[str, object], dict[str, Setting]]:
    """Parameters, buffers and plain attributes of a saved module and the modules in it, by dotted name."""
    tensors: dict[str, object] = {}
    settings: dict[str, Setting] = {}
    waiting: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        prefix, module = waiting.pop()
        # What is shared is refused, states too: a small file could stand for any number of modules.
        ids = {id(module), id(getattr(module, "state", None))}
        if type(module) is not Inert or type(module.state) is not dict or ids & seen or len(prefix) > _LONGEST_NAME:
            raise ValueError(f"the modules at {prefix[:30]!r} are no tree")
        seen |= ids
        state = module.state
        entries = {**state["_parameters"], **state["_buffers"]}
        tensors |= {f"{prefix}{name}": tensor for name, tensor in _short(entries) if tensor is not None}
        settings |= {f"{prefix}{name}": value for name, value in _short(state) if isinstance(value, Setting)}
        if len(tensors) + len(settings) > _MOST_ENTRIES:
            raise ValueError(f"more than {_MOST_ENTRIES} weights and settings")
        waiting += [(f"{prefix}{name}.", child) for name, child in _short(state["_modules"]) if child is not None]
    return tensors, settings


def _short(entries: dict[object, object]) -> list[tuple[object, object]]:
    """The entries. Raises: ValueError for a long name, which a small file could use any number of times."""
    if any(len(str(name)) > _LONGEST_NAME for name in entries):
        raise ValueError("a name that is too long")
    return list(entries.items())
