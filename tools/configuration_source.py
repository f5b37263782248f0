"""What conf/ and the code say of each option: its value in every file, its type and its comment.

Nothing of the project is imported: YAML is read with the comments that stand in it, and classes that `_target_` names
are read from their source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
_TARGET = "_target_"
_TYPES = {"int": "whole number", "float": "number", "bool": "`true` or `false`", "str": "text", "None": "`null`"}


@dataclass(frozen=True)
class Option:
    """One value of the configuration."""

    name: str  # dotted
    values: Mapping[str, str]  # as written, by the file (its choice) that has it
    type: str = ""
    meaning: str = ""  # in one line of plain text


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of conf/, together with those that its own `defaults` name in its group."""

    path: Path
    header: str  # what the comment at its top says, without commands
    options: dict[str, Option]
    groups: dict[str, tuple[str, str]] = field(default_factory=dict)  # of a primary file: choice and comment by name
    targets: frozenset[str] = frozenset()


@cache
def read_config(path: Path) -> ConfigFile:
    """Read a file of conf/. Values of other files of its group come first, as Hydra merges them."""
    text = path.read_text("utf-8")
    lines = text.splitlines()
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode), f"{path} must hold a mapping"
    options: dict[str, Option] = {}
    targets: set[str] = set()
    groups = {}
    for entry in _defaults(node):
        name, choice, comment = _read_default(entry, lines)
        if choice is not None:
            groups[name] = (choice, comment)
        elif name != "_self_" and (base := path.with_name(f"{name}.yaml")).is_file():
            inherited = read_config(base)
            options |= inherited.options
            targets |= inherited.targets
    for option in _flatten(node, "", lines, text, path.stem):
        for outer in _outer_names(option.name):
            options.pop(outer, None)  # null in the other file, a mapping here
        before = options.get(option.name)
        if before and before.meaning:
            option = replace(option, meaning=before.meaning, type=before.type)
        options[option.name] = option
    options = {name: replace(each, values={path.stem: _only(each.values)}) for name, each in options.items()}
    return ConfigFile(path, _header(lines), options, groups, frozenset(targets | set(_targets(node))))


def _outer_names(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _only(values: Mapping[str, str]) -> str:
    (value,) = values.values()
    return value


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    for key, value in node.value:
        yield str(key.value), key, value


def _defaults(node: yaml.MappingNode) -> list[yaml.Node]:
    return next((list(value.value) for name, _, value in _pairs(node) if name == "defaults"), [])


def _read_default(entry: yaml.Node, lines: list[str]) -> tuple[str, str | None, str]:
    """Group, choice and comment of one entry of a defaults list; a file of the same group has no choice."""
    if isinstance(entry, yaml.ScalarNode):
        is_primary = (CONF / f"{entry.value}.yaml").is_file()
        return entry.value, (entry.value if is_primary else None), ""
    ((name, _, value),) = _pairs(entry)  # type: ignore[arg-type]
    return name.removeprefix("optional "), str(value.value), _comment(value, value, lines)


def _targets(node: yaml.Node) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        for name, _, value in _pairs(node):
            if name == _TARGET:
                yield str(value.value)
            yield from _targets(value)


def _flatten(node: yaml.MappingNode, prefix: str, lines: list[str], text: str, choice: str) -> Iterator[Option]:
    """All values in a mapping, but for Hydra's own."""
    target = next((str(value.value) for name, _, value in _pairs(node) if name == _TARGET), None)
    described = describe(target) if target else {}
    for name, key, value in _pairs(node):
        if name == _TARGET or (not prefix and name in ("defaults", "hydra")):
            continue
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _flatten(value, f"{prefix}{name}.", lines, text, choice)
            continue
        raw = text[value.start_mark.index : value.end_mark.index].strip()
        kind, meaning = described.get(name, ("", ""))
        comment = _comment(key, value, lines)
        # What a class says of its field holds for every file; a comment in a file may be about its value.
        yield Option(f"{prefix}{name}", {choice: raw}, kind or _type_of(value), meaning or comment)


def _type_of(value: yaml.Node) -> str:
    """The type of a value that no class describes; nothing for null and for references."""
    is_plain = isinstance(value, yaml.ScalarNode) and not value.style
    loaded = yaml.safe_load(str(value.value)) if is_plain else value.value
    if "${" in str(value.value) or loaded is None or loaded == "???":
        return ""
    return _TYPES.get(type(loaded).__name__, "list")


def _comment(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """The comment behind a value, else the one above it, which is not the one at the top of the file."""
    end = value.end_mark
    _, mark, behind = lines[end.line][end.column :].partition("#") if end.line < len(lines) else ("", "", "")
    if mark:
        return _sentence([behind])
    return _sentence(_above(key.start_mark.line, lines))


def _above(line: int, lines: list[str]) -> list[str]:
    """Lines of the comment that ends just above `line`; none if it begins the file."""
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return [each.lstrip(" #") for each in lines[first:line]] if first else []


def _header(lines: list[str]) -> str:
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "#  ", "# python")):
            comment.append(line.lstrip("# "))
    return _sentence(comment)


def _sentence(lines: list[str]) -> str:
    return " ".join(" ".join(line.split()) for line in lines).strip()


# --- what the code says ---


@cache
def _module(name: str) -> tuple[ast.Module, list[str]]:
    source = (ROOT / "src" / Path(*name.split("."))).with_suffix(".py")
    text = source.read_text("utf-8")
    return ast.parse(text), text.splitlines()


def source_file(target: str) -> str:
    """The file of the repository in which a class or function is."""
    return f"src/{target.rpartition('.')[0].replace('.', '/')}.py"


@cache
def describe(target: str) -> dict[str, tuple[str, str]]:
    """Type and meaning of what a class or function is built from: of a dataclass its fields, else its arguments."""
    module, _, name = target.rpartition(".")
    tree, lines = _module(module)
    node = next(each for each in tree.body if getattr(each, "name", None) == name)
    if isinstance(node, ast.FunctionDef):
        return _arguments(node, module)
    assert isinstance(node, ast.ClassDef), f"{target} must be a class or a function"
    described: dict[str, tuple[str, str]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and (found := _find(base.id, module)) and isinstance(found[0], ast.ClassDef):
            described |= describe(f"{found[1]}.{base.id}")
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            described[each.target.id] = (_type(each.annotation, module), _field_comment(each, lines))
        elif isinstance(each, ast.FunctionDef) and each.name == "__init__":
            described |= _arguments(each, module)
    return described


def _field_comment(node: ast.AnnAssign, lines: list[str]) -> str:
    assert node.end_lineno is not None, "the parser says where a node ends"
    # Columns of the parser count bytes.
    _, mark, behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")
    return _sentence([behind] if mark else _above(node.lineno - 1, lines))


def _arguments(node: ast.FunctionDef, module: str) -> dict[str, tuple[str, str]]:
    """Arguments of a function, with what the section `Args` of its docstring says of them."""
    section = re.search(r"Args:\n(.*?)(\n\s*\n|\Z)", ast.get_docstring(node) or "", flags=re.DOTALL)
    meanings = {}
    for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", flags=re.MULTILINE):
        meanings[match[1]] = _sentence(match[2].splitlines()).replace("None:", "null:")
    return {
        argument.arg: (_type(argument.annotation, module), meanings.get(argument.arg, ""))
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None
    }


def _find(name: str, module: str) -> tuple[ast.AST, str] | None:
    """What a name in a module stands for, and in which module; None if it is not the project's."""
    for node in _module(module)[0].body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return node.value, module
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dalle1"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(alias.name, str(node.module))
    return None


def _type(node: ast.expr | None, module: str) -> str:
    """A type in words: choices of a Literal, "whole number or `null`", ..."""
    if isinstance(node, ast.BinOp):  # X | Y
        return _joined([_type(node.left, module), _type(node.right, module)])
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        choices: list[Any] = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _joined([f"`{ast.literal_eval(choice)}`" for choice in choices])
    if isinstance(node, ast.Subscript):
        kind = ast.unparse(node.value)
        return {"dict": "mapping", "tuple": "list", "list": "list"}.get(kind, kind)
    name = ast.unparse(node) if node else ""
    if isinstance(node, ast.Name) and name not in _TYPES and (found := _find(name, module)):
        return name if isinstance(found[0], ast.ClassDef) else _type(found[0], found[1])  # type: ignore[arg-type]
    return _TYPES.get(name, name)


def _joined(parts: list[str]) -> str:
    flat = [part for each in parts for part in re.split(r", | or ", each)]
    unique = list(dict.fromkeys(flat))
    return " or ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)
