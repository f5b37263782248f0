"""Pickles as data: what torch.save writes is read, everything else is refused and nothing is run."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest

from dalle1.released.inert_pickle import Inert, Name, RefusedError, load, pairs_to_dict

KNOWN: dict[Name, Any] = {
    Name("collections", "OrderedDict"): pairs_to_dict,
    Name("collections", "Counter"): lambda *_: Inert(Name("collections", "Counter")),
}


def _load(data: bytes) -> Any:
    return load(io.BytesIO(data), known=KNOWN, load_persistent=lambda saved: ("persistent", saved))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "content",
    [
        None,
        [1, -1, 255, 65535, 2**31, -(2**40), 0.5, True, False, "", "ä" * 300, "b"],
        {"a": (), "b": (1,), "c": (1, 2), "d": (1, 2, 3), "e": tuple(range(9)), 7: {"f": [[]]}},
        OrderedDict(a=1, b=OrderedDict(c=2)),
    ],
)
def test_plain_data_is_what_was_saved(content: object, protocol: int) -> None:
    assert _load(pickle.dumps(content, protocol=protocol)) == content


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_and_large_containers_are_read(protocol: int) -> None:
    content = [b"\x00\xff", list(range(2000)), {str(i): i for i in range(2000)}]
    assert _load(pickle.dumps(content, protocol=protocol)) == content


def test_shared_and_recursive_lists_stay_so() -> None:
    inner: list[Any] = [1]
    inner.append(inner)
    first, second = _load(pickle.dumps([inner, inner], protocol=2))
    assert first is second
    assert first[1] is first


class _Counts:
    """Pickled as an object of a known class."""

    def __reduce__(self) -> tuple[Any, ...]:
        from collections import Counter

        return Counter, ({"a": 1},), {"state": [1, 2]}


def test_object_of_a_known_class_is_only_its_state() -> None:
    content = _load(pickle.dumps(_Counts(), protocol=2))
    assert type(content) is Inert
    assert str(content.name) == "collections.Counter"
    assert content.state == {"state": [1, 2]}


def test_file_is_left_behind_the_end_so_that_the_next_pickle_follows() -> None:
    file = io.BytesIO(pickle.dumps("one", protocol=2) + pickle.dumps("two", protocol=4) + b"rest")
    assert [load(file, known={}, load_persistent=id) for _ in range(2)] == ["one", "two"]
    assert file.read() == b"rest"


def test_persistent_ids_go_to_the_caller() -> None:
    assert _load(b"\x80\x02K\x07Q.") == ("persistent", 7)


def _global(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def _stack_global(module: str, attribute: str) -> bytes:
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute))
    return texts + b"\x93"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (_global("posix", "system"), "posix.system"),
        (_global("__builtin__", "eval"), "__builtin__.eval"),
        (_global("builtins", "getattr"), "builtins.getattr"),
        (_global("copyreg", "_reconstructor"), "copyreg._reconstructor"),
        (_global("functools", "reduce"), "functools.reduce"),
        (_global("collections", "OrderedDict.fromkeys"), "collections.OrderedDict.fromkeys"),
        (_global("collections", " OrderedDict"), "collections. OrderedDict"),
        (_global("", "collections OrderedDict"), ".collections OrderedDict"),
        (_stack_global("collections", "OrderedDict.__init__.__globals__"), "OrderedDict.__init__.__globals__"),
        (_stack_global("torch", "serialization.os.system"), "torch.serialization.os.system"),
        (_stack_global("", "collections.OrderedDict"), ".collections.OrderedDict"),
    ],
)
def test_name_that_is_not_known_is_refused_at_once(name: bytes, shown: str) -> None:
    with pytest.raises(RefusedError, match=rf"it names '.*{shown}'"):
        _load(b"\x80\x04" + name + b"(tR.")


def test_text_that_is_no_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="must name classes by texts"):
        _load(b"\x80\x04]K\x07\x93.")


def test_name_of_nested_tuples_is_refused_at_once() -> None:
    # t = (t, t) forty times: as text a million million brackets.
    with pytest.raises(RefusedError, match="must name classes by texts"):
        _load(b"\x80\x04)" + b"q\x00h\x00\x86" * 40 + b"X\x01\x00\x00\x00a\x93.")


def test_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(RefusedError, match=r"it names 'a{100}'$"):
        _load(b"\x80\x02" + _global("a" * 10_000, "b") + b".")


@pytest.mark.parametrize(
    ("data", "opcode"),
    [
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02\x83\x01\x00.", "EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        (b"(S'echo'\niposix\nsystem\n.", "STRING"),
        (b"(iposix\nsystem\n.", "INST"),
        (b"(" + _global("collections", "OrderedDict") + b"o.", "OBJ"),
        (b"Pname\n.", "PERSID"),
        (_global("collections", "OrderedDict") + b")}\x92.", "NEWOBJ_EX"),
        (b"I1\n.", "INT"),
        (b"\x8b\x01\x00\x00\x00\x01.", "LONG4"),
        (b"K\x002.", "DUP"),
        (b"\x97.", "NEXT_BUFFER"),
    ],
)
def test_instruction_that_torch_never_writes_is_refused(data: bytes, opcode: str) -> None:
    with pytest.raises(RefusedError, match=f"it has the instruction {opcode}$"):
        _load(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"K\x07)R.", "a call of something that is no name"),
        (_global("collections", "Counter") + b"]R.", "a call of something that is no name"),
        (_global("collections", "Counter") + b")R)R.", "a call of something that is no name"),
        (_global("collections", "Counter") + b"}b.", "a state for something that has none"),
        (b"]}b.", "a state for something that has none"),
        (_global("collections", "Counter") + b")RK\x01a.", "items for something that is no list"),
        (_global("collections", "Counter") + b")RK\x01K\x02s.", "entries for something that is no dict"),
        (b"})K\x01s.", "a key that is neither text nor number"),
        (_global("collections", "OrderedDict") + b"])K\x01\x86a\x85R.", "a key that is neither text nor number"),
        (b"\x80\x02", "pickle exhausted before seeing STOP"),
        (b"\xff.", "unknown"),
    ],
)
def test_nonsense_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(data)


def test_deeply_nested_key_does_not_end_the_process() -> None:
    with pytest.raises(ValueError, match="a key that is neither text nor number"):
        _load(b"}" + b")" + b"\x85" * 300_000 + b"K\x01s.")
