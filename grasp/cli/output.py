"""What verbs print on stdout: JSON, lines and tables.

Rich is imported by what prints with it, so that `grasp plan` answers without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from grasp.cli.app import as_options

if TYPE_CHECKING:
    from rich.text import Text


def print_json(value: Any) -> None:
    """Indented JSON."""
    print(json.dumps(value, indent=2, default=str))


def print_line(text: str | Text) -> None:
    """A line as it is: not wrapped, and brackets in paths are not markup."""
    from rich.console import Console

    if isinstance(text, str):
        text = as_options(text)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: object = None) -> None:
    """A table whose cells are printed as they are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(*map(escape, head), title=None if title is None else Text(str(title)))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
