"""Write docs/configuration.md, all options of conf/: `python tools/configuration_reference.py`, as `make docs` does."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from configuration_source import CONF, ROOT, ConfigFile, Option, read_config, source_file

PAGE = ROOT / "docs" / "configuration.md"
# Where a group, or its part for a stage, is explained.
EXPLAINED = {
    "model of stage=tokenizer": "text.md",
    "model of stage=dvae": "dvae.md",
    "model of stage=transformer": "transformer.md",
    "optim": "training.md",
    "optim of stage=dvae": "dvae.md",
    "compute": "transformer.md#large-models",
    "data": "data.md",
    "filters": "data.md#filters",
    "trainer": "launching.md",
    "communication": "scaling.md#sending-less",
    "logger": "training.md#watching-runs",
    "callbacks": "training.md#checkpoints",
    "rerank": "sampling.md#ranking",
}
# Groups whose files are for one stage each and are named after it.
BY_STAGE = ("model", "optim")
_INTRODUCTION = """# Configuration reference

All options of the commands that take `name=value`. This page is written by `tools/configuration_reference.py` from
`conf/` and from the comments in the code; change those, then `make docs`.

- An option is set as `group.option=value`, as in `optim.lr=1e-3`; a whole group by its name, as in `trainer=ddp`.
  `null` is no value, and `???` must be given. A value `${other}` is that of another option, unless it is set itself.
- `--help` after any of the commands shows what it would use.
- `+trainer.accumulate_grad_batches=4` passes another argument to Lightning's `Trainer`; `~callbacks.best` leaves a part
  out. Commas and brackets need quotes inside quotes: `'prompt="red, blue"'`; prompts and paths do not.
- `-m` makes a run for each combination of values with commas, see [sweeps](sweeps.md).

| environment variable | |
|---|---|
| `DALLE1_CACHE_DIR` | where indices of shards are kept, instead of the user's cache directory |
| `DALLE1_DEBUG=1` | errors with their traceback |
"""


def write_page() -> str:
    """The whole page."""
    primary = {name: read_config(CONF / f"{name}.yaml") for name in _primary_names()}
    parts, written = [_INTRODUCTION], set[str]()
    for name, config in primary.items():
        parts.append(_section_of_command(name, config))
        for group in _groups_of(config):
            if group not in written:
                parts += list(_section_of_group(group, primary["train"], config))
                written.add(group)
    left = sorted({path.parent.name for path in CONF.glob("*/*.yaml")} - written)
    for group in left:
        parts += list(_section_of_group(group, primary["train"], primary["train"]))
    return "\n".join(parts)


def without_meaning() -> list[str]:
    """Options that neither a file of conf/ nor the code says anything about."""
    files = sorted(CONF.rglob("*.yaml"))
    known = read_config(CONF / "train.yaml").options
    return [
        f"{option.name} in {path.relative_to(ROOT)}"
        for path in files
        for option in read_config(path).options.values()
        if not option.meaning and not (path.parent.name == "experiment" and option.name in known)
    ]


def _primary_names() -> list[str]:
    """Files at the top of conf/, one for each command, those that one begins with first."""
    first = ["train", "sample"]
    return [*first, *sorted({path.stem for path in CONF.glob("*.yaml")} - set(first))]


def _command(name: str) -> str:
    """The command that a file configures, as its first comment writes it."""
    text = (CONF / f"{name}.yaml").read_text("utf-8")
    command = re.search(r"^#.*?\b(python (?:-m )?[\w.]+)", text, flags=re.MULTILINE)
    if command is None:
        raise ValueError(f"conf/{name}.yaml must begin with a comment that has its command, got none; write it there")
    return command[1]


def _groups_of(config: ConfigFile) -> list[str]:
    return [name for name in config.groups if (CONF / name).is_dir()]


def _section_of_command(name: str, config: ConfigFile) -> str:
    lines = [f"## {_command(name)}", "", f"`conf/{name}.yaml`", ""]
    groups = {group: config.groups[group] for group in _groups_of(config)}
    if groups:
        rows = [
            (
                f"[`{group}`](#{group.replace('/', '')})",
                _default(choice),
                _code(_choices(group)),
                _text(_remark(comment, group)),
            )
            for group, (choice, comment) in groups.items()
        ]
        lines += [*_table(("group", "default", "choices", ""), rows), ""]
    overrides = [f"`{key.split()[1]}={choice}`" for key, (choice, _) in config.groups.items() if _overrides(key)]
    parents = [each for each in config.groups if (CONF / f"{each}.yaml").is_file()]
    if parents:
        lines += [f"Also all options of `{parents[0]}`{', with ' + ', '.join(overrides) if overrides else ''}.", ""]
    inherited = {key for parent in parents for key in read_config(CONF / f"{parent}.yaml").options}
    options = [option for key, option in config.options.items() if key not in inherited]
    if name == "train":
        options = [_with_experiments(option) for option in options]
    return "\n".join([*lines, *_option_table(options, "", name), ""])


def _overrides(key: str) -> bool:
    return key.startswith("override ") and "hydra/" not in key


def _with_experiments(option: Option) -> Option:
    """An option of train.yaml with what each experiment makes of it."""
    files = {path.stem: read_config(path).options for path in sorted((CONF / "experiment").glob("*.yaml"))}
    values = {name: options[option.name].values[name] for name, options in files.items() if option.name in options}
    if not values:
        return option
    default = option.values["train"]
    return replace(option, values=values if default == "???" else {"else": default, **values})


def _section_of_group(group: str, train: ConfigFile, owner: ConfigFile) -> Iterator[str]:
    default = owner.groups.get(group, ("", ""))[0]
    yield f"### {group}\n{_explained(group)}"
    files = {path.stem: read_config(path) for path in sorted((CONF / group).glob("*.yaml"))}
    rows = [(f"`{group}={name}`", _text(each.header)) for name, each in files.items() if each.header]
    if rows:
        yield "\n".join([*_table(("choice", ""), rows), ""])
    kinds = sorted({name.partition("_")[0] for name in files}) if group in BY_STAGE else [""]
    for kind in kinds:
        of_kind = {name: each for name, each in files.items() if name.partition("_")[0] == kind or not kind}
        if kind:
            yield f"#### {group} of stage={kind}\n{_explained(f'{group} of stage={kind}')}"
        targets = sorted({target for each in of_kind.values() for target in each.targets})
        if targets:
            yield "Read by " + ", ".join(f"`{_name(target)}` in `{source_file(target)}`" for target in targets) + ".\n"
        options = _merge(of_kind, first=default)
        if group == "experiment":
            options = [option for option in options if option.name not in train.options]
        prefix = "" if group == "experiment" else f"{group}."
        yield "\n".join([*_option_table(options, prefix, kind), ""])


def _explained(heading: str) -> str:
    page = EXPLAINED.get(heading)
    return f"\nExplained in [{page.partition('#')[0]}]({page}).\n" if page else ""


def _name(target: str) -> str:
    return target.rpartition(".")[2]


def _merge(files: Mapping[str, ConfigFile], *, first: str) -> list[Option]:
    """Options of several files, each with its values in all that have it and the first file's meaning."""
    merged: dict[str, Option] = {}
    for name in sorted(files, key=lambda name: (name != first, name)):
        for option in files[name].options.values():
            before = merged.get(option.name, option)
            types = [each for each in dict.fromkeys((before.type, option.type)) if each]
            merged[option.name] = replace(
                before,
                values={**before.values, **option.values},
                type=" or ".join(types),
                meaning=before.meaning or option.meaning,
            )
    return list(merged.values())


def _option_table(options: Iterable[Option], prefix: str, kind: str) -> list[str]:
    rows = [(f"`{prefix}{each.name}`", each.type, _values(each.values, kind), _text(each.meaning)) for each in options]
    return _table(("option", "type", "value", "meaning"), rows) if rows else []


def _values(values: Mapping[str, str], kind: str) -> str:
    """A value, or each different one with the files that have it."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(" ".join(value.split()), []).append(name.removeprefix(f"{kind}_"))
    if len(by_value) == 1:
        return f"`{next(iter(by_value))}`"
    return "; ".join(f"{', '.join(names)}: `{value}`" for value, names in by_value.items())


def _choices(group: str) -> list[str]:
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [] if group in BY_STAGE else names


def _remark(comment: str, group: str) -> str:
    """A comment that says more than which choices there are."""
    return "" if sorted(re.findall(r"\w+", comment)) == _choices(group) else comment


def _default(choice: str) -> str:
    return "must be given" if choice == "???" else f"`{choice}`"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "below"


def _text(text: str) -> str:
    """Plain text as Markdown shows it unchanged: no tags, no bars that end a cell; names of pages become links."""
    parts = re.split(r"(`[^`]*`)", text.replace(" | ", ", "))
    plain = [part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts]
    linked = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", "".join(plain))
    return linked.replace("data/README.md", "[recipes](../data/README.md)")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    first, *rest = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [first, "|---" * len(head) + "|", *rest]


def main() -> None:
    """Write the page, if it is not there as it should be."""
    missing = without_meaning()
    if missing:
        sys.exit(f"error: every option needs a comment beside it, got none of {', '.join(missing)}; write them")
    text = write_page()
    if not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        Path(PAGE).write_text(text, "utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
