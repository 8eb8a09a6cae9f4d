"""What verbs print on stdout: JSON, lines and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from grasp.cli.app import as_options

out_console = Console()


def print_json(value: Any) -> None:
    """Indented JSON."""
    print(json.dumps(value, indent=2, default=str))


def print_line(text: str | Text) -> None:
    """A line as it is: not wrapped, and brackets in paths are not markup."""
    if isinstance(text, str):
        text = as_options(text)
    out_console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: object = None) -> None:
    """A table whose cells are printed as they are."""
    table = Table(*map(escape, head), title=None if title is None else Text(str(title)))
    for row in rows:
        table.add_row(*row)
    out_console.print(table)
