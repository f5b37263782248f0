"""Write the table of libraries in THIRD_PARTY.md from what is installed: `python tools/third_party.py`."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "THIRD_PARTY.md"
# Extras that no user of the project needs.
_FOR_DEVELOPERS = ("dev", "browser")
_HEAD = "| library | needed for | licence |\n|---|---|---|\n"
# What packages without an SPDX expression write, by what it stands for.
_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-like",
}
_LONGEST_NAME = 30  # a longer field holds the licence's text


def dependencies() -> dict[str, str]:
    """Libraries that pyproject.toml names, each with the extra that first needs it, or `always`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"always": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, str] = {}
    for group, requirements in groups.items():
        if group not in _FOR_DEVELOPERS:
            for requirement in requirements:
                name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
                if name != project["name"]:
                    found.setdefault(name, group)
    return found


def licence(package: PackageMetadata) -> str:
    """A package's licence, by its SPDX name where it says one.

    Raises: ValueError if it names none."""
    if "License-Expression" in package:
        return package["License-Expression"]
    name = package["License"].strip() if "License" in package else ""
    if name in ("", "UNKNOWN") or len(name) > _LONGEST_NAME:  # what old tools write for none
        classifiers = [each for each in package.get_all("Classifier") or [] if each.startswith("License :: ")]
        name = classifiers[-1].rpartition(" :: ")[2] if classifiers else ""
    if not name:
        raise ValueError(f"{package['Name']} must name its licence, it does not; look it up, and add its row by hand")
    return _SPDX.get(name, name)


def write_page(text: str) -> str:
    """The page with its table renewed; rows of libraries that are not installed stay."""
    start = text.index(_HEAD) + len(_HEAD)
    end = text.index("\n\n", start)
    rows = {row.split("|")[1].strip(): row for row in text[start:end].splitlines()}
    for name, group in dependencies().items():
        try:
            rows[name] = f"| {name} | {group} | {licence(metadata(name))} |"
        except PackageNotFoundError:
            if name not in rows:
                raise ValueError(f"'{name}' must be installed to read its licence; pip install '.[{group}]'") from None
    return text[:start] + "\n".join(rows[name] for name in dependencies()) + text[end:]


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text("utf-8")), "utf-8")
