"""Hooks of mkdocs: pages of the repository's root are part of the site, and tutorials are notebooks, too.

Markdown stays as it is read in the repository, where links go from file to file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OF_THE_ROOT = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages outside docs/, and where they stand in the site."""
_TUTORIALS = "tutorials/"
_HTML = re.compile(r"^print\((\w+)\._repr_html_\(\)\)$", re.MULTILINE)  # what a notebook shows by itself
_LINK = re.compile(r"\]\((?!https?:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the root, and a notebook of each tutorial."""
    for path, uri in OF_THE_ROOT.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for page in files.documentation_pages():
        if page.src_uri.startswith(_TUTORIALS):
            notebook = jupytext.reads(_HTML.sub(r"\1", page.content_string), fmt="md")
            notebook.metadata["kernelspec"] = {
                "name": "python3",
                "display_name": "Python 3",
                "language": "python",
            }
            uri = page.src_uri.removesuffix(".md") + ".ipynb"
            files.append(File.generated(config, uri, content=jupytext.writes(notebook, fmt="ipynb")))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site.

    A tutorial gets a link to its notebook below its title.
    """
    uri = page.file.src_uri
    in_repository = {site: path for path, site in OF_THE_ROOT.items()}.get(uri, f"docs/{uri}")

    def linked(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link["path"]))
        target = OF_THE_ROOT.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{link['anchor'] or ''})"

    markdown = _LINK.sub(linked, markdown)
    if uri.startswith(_TUTORIALS):
        title, _, text = markdown.partition("\n")
        link = f"[Download as a notebook]({Path(uri).stem}.ipynb){{ download }}"
        markdown = f"{title}\n\n{link}, to be run in a checkout.\n{text}"
    return markdown
