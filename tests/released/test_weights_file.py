"""Files of weights from others: all forms are read, and no file can make the reader run anything."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_dvae
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle1.released.weights_file import read_weights

SIZES = official_dvae.Sizes(vocab=8, n_hid=4, n_init=4, groups=2, blocks=1)
PICKLED = ("zip", "legacy")


@pytest.fixture(scope="module")
def encoder() -> official_dvae.Encoder:
    return official_dvae.make_official(SIZES)[0]


@pytest.fixture(scope="module")
def files(encoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The encoder in all forms."""
    path = tmp_path_factory.mktemp("files") / "file"
    return {form: official_dvae.save_official(encoder, path, form).read_bytes() for form in official_dvae.FORMS}


@pytest.mark.parametrize("form", official_dvae.FORMS)
def test_every_form_gives_all_tensors(tmp_path: Path, encoder: nn.Module, files: dict[str, bytes], form: str) -> None:
    (tmp_path / "encoder.pkl").write_bytes(files[form])
    assert "dall_e.encoder" not in sys.modules
    weights = read_weights(tmp_path / "encoder.pkl")
    expected = encoder.state_dict()
    assert set(weights.tensors) == set(expected)
    assert all(torch.equal(weights.tensors[name], expected[name]) for name in expected)
    assert "dall_e.encoder" not in sys.modules


@pytest.mark.parametrize("form", official_dvae.FORMS)
def test_no_unpickler_is_ever_used(
    tmp_path: Path, files: dict[str, bytes], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the file was unpickled")

    for module in (pickle, torch, torch.jit):
        for name in {"load", "loads", "Unpickler", "_Unpickler", "_load"} & set(dir(module)):
            monkeypatch.setattr(module, name, fail)
    (tmp_path / "encoder.pkl").write_bytes(files[form])
    assert len(read_weights(tmp_path / "encoder.pkl").tensors) == 22


@pytest.mark.parametrize("form", PICKLED)
def test_plain_attributes_of_modules_are_settings(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    (tmp_path / "encoder.pkl").write_bytes(files[form])
    settings = read_weights(tmp_path / "encoder.pkl").settings
    assert settings["vocab_size"] == 8
    assert settings["blocks.group_2.block_1.post_gain"] == 0.25
    assert settings["blocks.group_1.pool.kernel_size"] == 2
    assert settings["blocks.output.conv.use_float16"] is False


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_types_and_layouts_of_tensors_stay(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    grid = torch.randn(4, 6, 2, 3).to(dtype)
    state = {"plain": grid, "turned": grid.clone().permute(3, 1, 0, 2), "part": torch.randn(9, 5).to(dtype)[2:7:2, 1:]}
    state["last"] = grid.clone().to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=not legacy)
    tensors = read_weights(tmp_path / "state.pt").tensors
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(state, dtype)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_protocol_is_read(tmp_path: Path, protocol: int, legacy: bool) -> None:
    module = nn.Sequential(OrderedDict(relu=nn.ReLU(), up=nn.Upsample(scale_factor=2)))
    module.register_parameter("w", nn.Parameter(torch.randn(2, 3)))
    module.register_buffer("mean", torch.randn(4))
    module.register_parameter("none", None)
    module.kinds = {1, 2}  # type: ignore[assignment]
    module.dtype = torch.float16  # type: ignore[assignment]
    path = tmp_path / "module.pt"
    torch.save(module, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    weights = read_weights(path)
    assert {name: tensor.tolist() for name, tensor in weights.tensors.items()} == {
        "w": module.w.tolist(),
        "mean": module.mean.tolist(),
    }
    assert weights.settings["up.mode"] == "nearest"


def _wrap(path: Path, payload: bytes, form: str) -> Path:
    """A file of torch.save with any pickle as its content."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in head) + payload + pickle.dumps([], 2))
    return path


class _Calls:
    """An object that is unpickled by a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class WithSetstate:
    """An object whose class runs something when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["victim"].touch()


def _python(victim: Path) -> str:
    return f"import pathlib; pathlib.Path({str(victim)!r}).touch()"


def _dotted(victim: Path) -> bytes:
    """A name that leads through the attributes of a harmless module, and its call."""
    command = f"touch {victim}".encode()
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (b"torch", b"serialization.os.system"))
    return b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(command)]) + command + b"\x85R."


def _state_of_a_class(victim: Path) -> bytes:
    """A `__setstate__` for a class that is known, set as its attribute, and then used."""
    del victim
    function = b"ctorch._utils\n_rebuild_parameter\n"
    return b"\x80\x02cdall_e.utils\nConv2d\nN}U\x0c__setstate__" + function + b"s\x86b)\x81}b."


MALICIOUS: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (lambda victim: _Calls(os.system, f"touch {victim}"), f"it names '{os.system.__module__}.system'"),
    "eval": (lambda victim: _Calls(eval, f"__import__('os').system('touch {victim}')"), "it names '__builtin__.eval'"),
    "exec": (lambda victim: _Calls(exec, _python(victim)), "it names '__builtin__.exec'"),
    "getattr": (lambda victim: _Calls(getattr, victim, "touch"), "it names '__builtin__.getattr'"),
    "subprocess": (
        lambda victim: _Calls(subprocess.Popen, ["touch", str(victim)]),
        "it names '(subprocess|commands).Popen'",
    ),
    "torch.load": (
        lambda victim: _Calls(torch.load, str(victim.with_name("inner")), "cpu", None),
        "it names 'torch.serialization.load'",
    ),
    "touch": (lambda victim: _Calls(Path.touch, victim), r"it names '(__builtin__\.getattr|pathlib.*)'"),
    "setstate": (WithSetstate, "it names '.*WithSetstate'"),
    "dotted name": (_dotted, "it names 'torch.serialization.os.system'"),
    "state of a class": (_state_of_a_class, "a state for something that has none"),
}


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("kind", MALICIOUS)
def test_malicious_pickle_is_refused_and_nothing_is_run(tmp_path: Path, kind: str, form: str) -> None:
    make, message = MALICIOUS[kind]
    victim = tmp_path / "victim"
    torch.save({"a": _Calls(Path.touch, victim)}, tmp_path / "inner")
    payload = make(victim)
    if not isinstance(payload, bytes):
        payload = pickle.dumps({"w": payload}, protocol=2)
    path = _wrap(tmp_path / "evil.pkl", payload, form)
    with pytest.raises(ValueError, match=message) as raised:
        read_weights(path)
    assert str(raised.value).startswith(f"'{path}' ")
    assert "get it again from its source" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not victim.exists()


@pytest.mark.parametrize("kind", ["os.system", "eval", "touch"])
def test_the_malicious_pickles_of_these_tests_would_work(tmp_path: Path, kind: str) -> None:
    pickle.loads(pickle.dumps(MALICIOUS[kind][0](tmp_path / "victim"), protocol=2))
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("place", ["magic", "system", "keys"])
def test_malicious_pickle_around_the_legacy_content_is_refused(
    tmp_path: Path, files: dict[str, bytes], place: str
) -> None:
    victim = tmp_path / "victim"
    evil = pickle.dumps(_Calls(Path.touch, victim), protocol=2)
    file = io.BytesIO(files["legacy"])
    for _ in range({"magic": 0, "system": 2, "keys": 4}[place]):
        for _ in __import__("pickletools").genops(file):
            pass
    (tmp_path / "evil.pkl").write_bytes(files["legacy"][: file.tell()] + evil + files["legacy"][file.tell() :])
    with pytest.raises(ValueError, match="it names '"):
        read_weights(tmp_path / "evil.pkl")
    assert not victim.exists()


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match=r"must be a file of torch\.save, it is another pickle"):
        read_weights(tmp_path / "plain.pkl")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but files of it exist
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), tmp_path / "script.pkl")
    with pytest.raises(ValueError, match="must hold weights, it is a TorchScript program"):
        read_weights(tmp_path / "script.pkl")


def test_tar_file_of_the_first_versions_of_torch_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pkl", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match="must not be a tar file, as only the first versions of torch wrote them"):
        read_weights(tmp_path / "old.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"must be a file of torch\.save or safetensors, it begins with b''"),
        (b"<!DOCTYPE html><html>", r"must be .* safetensors, it begins with b'<!DOCTYPE ht'"),
        (b"\x80", "is damaged or cut short"),
        (b"PK\x03\x04", r"is damaged or cut short \(File is not a zip file\)"),
        (b"12345678{", "is damaged or cut short"),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "other.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_weights(tmp_path / "other.pkl")
    assert "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pkl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no weights at '{path}'; download them or correct the path"):
            read_weights(path)


@pytest.mark.parametrize("form", official_dvae.FORMS)
def test_cut_file_is_refused_wherever_it_ends(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    data = files[form]
    path = tmp_path / "cut.pkl"
    lengths = [*range(1, 40), *range(40, len(data), len(data) // 60), len(data) - 3000, len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"'.*cut\.pkl' (is damaged or cut short|must )") as raised:
            read_weights(path)
        assert "\n" not in str(raised.value)


def _problem(path: Path) -> str | None:
    try:
        read_weights(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", official_dvae.FORMS)
def test_flipped_bytes_are_read_or_refused_in_one_line(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    chance = random.Random(0)
    path = tmp_path / "flipped.pkl"
    for _ in range(150):
        data = bytearray(files[form])
        for _ in range(chance.choice([1, 1, 5])):
            # Most of them where the structure is.
            data[int(chance.random() ** 3 * len(data))] = chance.randrange(256)
        path.write_bytes(data)
        problem = _problem(path)
        assert problem is None or (problem.startswith("'") and "\n" not in problem)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a module or a state dict, it holds a list"),
        ({"epoch": 3}, "must hold a module or a dict of named tensors, its 'epoch' is no tensor"),
        ({"state_dict": {"w": torch.zeros(1)}}, "its 'state_dict' is no tensor"),
        ({1: torch.zeros(1)}, "its 1 is no tensor"),
        ({"w": torch.zeros(1, dtype=torch.int64)}, r"it names 'torch\.LongStorage'"),
        ({"w": torch.zeros(3).to_sparse()}, r"it names 'torch\._utils\._rebuild_sparse_tensor'"),
        ({"w": torch.zeros(3).numpy()}, r"it names 'numpy\._?core\.multiarray\._reconstruct'"),
        (nn.Linear(1, 1), r"it names 'torch\.nn\.modules\.linear\.Linear'"),
        (dict.fromkeys(["a", "b"], torch.zeros(2)), "'a' and 'b' share their numbers"),
        (OrderedDict(zip("ab", torch.zeros(2, 3), strict=True)), "'a' and 'b' share their numbers"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_other_content_is_refused(tmp_path: Path, content: object, message: str, legacy: bool) -> None:
    torch.save(content, tmp_path / "other.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "other.pt")


def test_negative_bit_is_not_lost(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1, dtype=torch.complex64).conj().imag}, tmp_path / "negative.pt")
    with pytest.raises(ValueError, match="a tensor of an unknown kind"):
        read_weights(tmp_path / "negative.pt")


def _tensor(size: str, stride: str, numel: int = 4) -> bytes:
    """A pickle of {"w": a tensor} with any size and stride; both are written as instructions."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK" + bytes([numel]) + b"tQ"
    shapes = b"".join(b"(" + bytes.fromhex(numbers) + b"t" for numbers in (size, stride))
    return b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shapes + b"\x89NtRs."


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        ("4b05", "4b01", "a tensor larger than its storage"),
        ("4b02 4b02", "4b03 4b01", "a tensor larger than its storage"),
        ("4affffff7f", "4b00", "a tensor larger than its storage"),
        ("4affffffff", "4b01", "a tensor of an unknown kind"),
        ("4b02", "4affffffff", "a tensor of an unknown kind"),
        ("88", "4b01", "a tensor of an unknown kind"),
        ("8a08ffffffffffffff7f", "4b00", "a tensor of an unknown kind"),
        ("4b01" * 9, "4b01" * 9, "a tensor of 9 axes"),
        ("4b01", "4b01 4b01", "argument 2 is longer"),
    ],
)
def test_hostile_shape_is_refused(tmp_path: Path, size: str, stride: str, message: str) -> None:
    path = _wrap(tmp_path / "evil.pkl", _tensor(size, stride), "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(ValueError, match=message):
        read_weights(path)


def test_same_tensor_with_a_right_shape_is_read(tmp_path: Path) -> None:
    path = _wrap(tmp_path / "good.pkl", _tensor("4b02 4b02", "4b02 4b01"), "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    assert torch.equal(read_weights(path).tensors["w"], torch.zeros(2, 2))


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pkl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match="the records in this zip archive are larger than itself"):
        read_weights(tmp_path / "bomb.pkl")


def test_modules_in_a_circle_are_refused(tmp_path: Path) -> None:
    inner = nn.Sequential()
    outer = nn.Sequential(inner)
    inner._modules["0"] = outer
    torch.save(outer, tmp_path / "circle.pt")
    with pytest.raises(ValueError, match=r"the modules at '0\.0\.' are no tree"):
        read_weights(tmp_path / "circle.pt")


def test_modules_that_share_what_they_hold_are_refused(tmp_path: Path) -> None:
    # A few bytes for each further use: a small file could stand for any number of weights.
    shared = nn.ReLU()
    torch.save(nn.Sequential(shared, shared), tmp_path / "shared.pt")
    with pytest.raises(ValueError, match=r"the modules at '[01]\.' are no tree"):
        read_weights(tmp_path / "shared.pt")


def test_module_with_a_long_name_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Sequential(OrderedDict([("a" * 201, nn.ReLU())])), tmp_path / "long.pt")
    with pytest.raises(ValueError, match="a name that is too long"):
        read_weights(tmp_path / "long.pt")


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(b")" + b"\x85" * 300_000, id="a tuple in a tuple ..."),
        pytest.param(b")" + b"q\x00h\x00\x86" * 40, id="t = (t, t) forty times"),
    ],
)
def test_storage_key_that_is_no_text_is_refused_before_it_is_hashed(tmp_path: Path, key: bytes) -> None:
    path = _wrap(tmp_path / "evil.pkl", pickle.dumps({}, protocol=2), "legacy")
    end = len(pickle.dumps([], protocol=2))
    path.write_bytes(path.read_bytes()[:-end] + b"\x80\x02]" + key + b"a." + bytes(8))
    with pytest.raises(ValueError, match="a storage without a name"):
        read_weights(path)


def test_big_endian_file_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(files["zip"])) as old, zipfile.ZipFile(tmp_path / "big.pkl", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else old.read(info))
    with pytest.raises(ValueError, match="must be from a little-endian machine"):
        read_weights(tmp_path / "big.pkl")


def test_safetensors_keep_their_types(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "state.any-name")
    tensors = read_weights(tmp_path / "state.any-name").tensors
    assert all(torch.equal(tensors[name], state[name]) for name in state)
