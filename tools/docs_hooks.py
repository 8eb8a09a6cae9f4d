"""What the site takes from the repository when mkdocs builds it.

A page asks for it by a comment on a line of its own:

    <!-- include: CONTRIBUTING.md -->             the file, with its links made to fit
    <!-- cli -->                                  the command's reference, by typer
    <!-- api: grasp -->                           the docstrings of all public names

Links to files outside of docs/ lead to the page that includes them, or to a copy in the site.
Blocks of ```math become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # repository path -> page of the site that shows it
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "results.md",
}
REQUEST = re.compile(r"^<!-- (include|cli|api)(?:: (.+))? -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?(?=\))")
FOREIGN = re.compile(
    r"<(?:script|img)\b[^>]*\bsrc=[\"']?https?:|<link\b[^>]*stylesheet[^>]*https?:"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fence = {"name": "math", "class": "math", "format": _math}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Copies of the repository's files that pages link to."""
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    unread, copied = [*sorted(pages), *PAGES], set(PAGES)
    unread.remove("README.md")  # stands in no page
    while unread:
        own = unread.pop()
        for link in LINK.finditer((ROOT / own).read_text(encoding="utf-8")):
            path = _target(link[1], own)
            if path.startswith("docs/") or path in copied or not (ROOT / path).is_file():
                continue
            copied.add(path)
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                unread.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("files/"):  # a copy, whose neighbours are copied beside it
        return markdown
    markdown = _links(markdown, f"docs/{page.file.src_uri}", page)
    return REQUEST.sub(lambda request: _answer(request[1], request[2], page), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    if found := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads from the network: {found[0]}")
    return output


def _answer(what: str, about: str, page: Page) -> str:
    if what == "include":
        return _links((ROOT / about).read_text(encoding="utf-8"), about, page)
    if what == "cli":
        return _cli()
    return _api(about)


def _links(markdown: str, own: str, page: Page) -> str:
    """`own` is the repository's path of the text, `page` where it is shown."""
    here = posixpath.dirname(page.file.src_uri)

    def fit(link: re.Match[str]) -> str:
        path, anchor = _target(link[1], own), link[2] or ""
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            path = f"files/{path}"
        return posixpath.relpath(path, here or ".") + anchor

    return LINK.sub(fit, markdown)


def _target(link: str, own: str) -> str:
    """The repository's path that a link in the file `own` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(own), link))


def _cli() -> str:
    command = [sys.executable, "-m", "typer", "grasp.cli.main", "utils", "docs", "--name", "grasp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    _, head, verbs = done.stdout.partition("\n## ")
    if not head:
        raise PluginError(done.stderr or "typer finds no verbs in grasp.cli.main")
    return head + verbs


def _api(package: str) -> str:
    """A mkdocstrings block for each public name, by the module where it is defined."""
    module = importlib.import_module(package)
    blocks = []
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        if inspect.ismodule(value):
            continue
        home = f"{value.__module__}.{value.__qualname__}"
        blocks.append(f"::: {home}\n    options:\n      heading: {package}.{name}\n")
    return "\n".join(blocks)


def _math(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'
