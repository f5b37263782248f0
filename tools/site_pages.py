"""Brings the pages that lie outside docs/ into the site, and points links at where pages are there.

MkDocs knows one directory. README.md and the others stay where GitHub shows them; here they become pages under other
names, without a copy of their text. Links in all pages are written for the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Collection
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.livereload import LiveReloadServer
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
# Paths in the repository to paths in the site.
OUTSIDE = {
    "README.md": "index.md",
    "data/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "THIRD_PARTY.md": "third_party.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
}
_LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    return rewrite_links(markdown, page.file.src_uri, set(files.src_uris))


def rewrite_links(markdown: str, page: str, names: Collection[str]) -> str:
    """A page's text with links that lead where its targets are in the site.

    Args:
        markdown: The text, whose links are those of the repository.
        page: Where the site has it.
        names: All that the site has.

    Raises: PluginError for a link to a file that is not in the site, which stops the build.
    """
    source = next((path for path, name in OUTSIDE.items() if name == page), DOCS + page)
    code = [match.span() for match in _CODE.finditer(markdown)]

    def rewrite(match: re.Match[str]) -> str:
        if any(start <= match.start() < end for start, end in code):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        name = OUTSIDE.get(target, target.removeprefix(DOCS) if target.startswith(DOCS) else "")
        if name not in names:
            raise PluginError(f"links must lead to pages of the site, got {match['path']!r} in {source}; correct it")
        return f"]({posixpath.relpath(name, posixpath.dirname(page) or '.')}{match['anchor'] or ''})"

    return _LINK.sub(rewrite, markdown)


def on_serve(server: LiveReloadServer, *, config: MkDocsConfig, builder: Callable[..., None]) -> LiveReloadServer:
    """Watch the pages outside docs/ too."""
    for path in OUTSIDE:
        server.watch(os.fspath(ROOT / path))
    return server
