"""Reads a pickle as data: no name in it is imported and nothing that it brings is called.

Python's own unpickler imports what a file names and calls it, and an unpickler that restricts the names still hands
their attributes, arguments and `__setstate__` to the file. Here `pickletools.genops`, which only parses, gives the
instructions, and the few that build numbers, texts, lists, dicts and tuples are carried out. A class or function is
a `Name`; an instruction to call it looks it up in a table of the reader's own functions. A name that is not in the
table, and an instruction that torch.save never writes, end the reading.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any


class RefusedError(ValueError):
    """What a file holds is refused; the text goes on after the file's name."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; never the thing itself."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(eq=False)
class Inert:
    """What an object of the class `name` was saved as. It can do nothing."""

    name: Name
    state: object = None


# From a call's arguments to data.
Builder = Callable[..., object]

_PUSHES_ITS_ARGUMENT = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
)
_PUSHES_A_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # nobody here reads sets, and a list never hashes what is put into it
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME")


def load(file: IO[bytes], *, known: Mapping[Name, Builder], load_persistent: Callable[[object], object]) -> Any:
    """What the pickle at the file's position stands for; the file is left behind its end.

    Args:
        file: Open for reading; `read` must not make room for more than is there.
        known: What stands for a call of each name that may occur.
        load_persistent: What a persistent id stands for.

    Raises:
        RefusedError: For a name or an instruction that is not admitted.
        Exception: Of almost any kind if the pickle is damaged.
    """
    reader = _Reader(known, load_persistent)
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "STOP":
            break
        reader.carry_out(opcode.name, argument)
    return reader.stack.pop()


class _Reader:
    """The pickle machine's stack and memo. Only plain data, `Name` and what builders made ever lie on them."""

    def __init__(self, known: Mapping[Name, Builder], load_persistent: Callable[[object], object]) -> None:
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below the marks
        self._memo: dict[int, Any] = {}
        self._known = known
        self._load_persistent = load_persistent

    def carry_out(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _PUSHES_ITS_ARGUMENT:
            stack.append(argument)
        elif opcode in _PUSHES_A_NEW:
            stack.append(_PUSHES_A_NEW[opcode]())
        elif opcode in _TUPLES:
            stack[-_TUPLES[opcode] :] = [tuple(stack[-_TUPLES[opcode] :])]
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode == "BINPERSID":
            stack.append(self._load_persistent(stack.pop()))
        elif opcode == "GLOBAL":
            self._name(*argument.split(" ", 1))
        elif opcode == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            self._name(module, attribute)
        elif opcode in ("REDUCE", "NEWOBJ"):
            self._call()
        elif opcode == "BUILD":
            self._set_state()
        elif opcode not in _IGNORED:
            self._carry_out_on_items(opcode)

    def _carry_out_on_items(self, opcode: str) -> None:
        if opcode == "MARK":
            self._outer.append(self.stack)
            self.stack = []
        elif opcode == "APPEND":
            self._extend([self.stack.pop()])
        elif opcode in ("APPENDS", "ADDITEMS"):
            self._extend(self._since_mark())
        elif opcode == "SETITEM":
            value, key = self.stack.pop(), self.stack.pop()
            self._update([key, value])
        elif opcode == "SETITEMS":
            self._update(self._since_mark())
        elif opcode == "TUPLE":
            items = self._since_mark()
            self.stack.append(tuple(items))
        else:
            raise RefusedError(f"must be a pickle as torch.save writes it, it has the instruction {opcode}")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._outer.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items for something that is no list")
        self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise ValueError("entries for something that is no dict")
        self.stack[-1].update(pairs_to_dict(zip(items[::2], items[1::2], strict=True)))

    def _name(self, module: object, attribute: object) -> None:
        if type(module) is not str or type(attribute) is not str:
            raise RefusedError("must name classes by texts")
        name = Name(module, attribute)
        if name not in self._known:
            raise RefusedError(f"must hold only weights and modules that are known, it names {str(name)[:100]!r}")
        self.stack.append(name)

    def _call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise ValueError("a call of something that is no name")
        self.stack.append(self._known[name](*arguments))

    def _set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Inert:
            target.state = state
        elif type(target) is not dict:  # an OrderedDict's own attributes, such as `_metadata`, are of no use
            raise ValueError("a state for something that has none")


def pairs_to_dict(pairs: Any = ()) -> dict[str | int, Any]:
    """A dict of pairs.

    Raises: ValueError unless all keys are texts or integers, as hashing a deeply nested key can end the process."""
    content = {}
    for key, value in pairs:
        if type(key) not in (str, int):
            raise ValueError("a key that is neither text nor number")
        content[key] = value
    return content
