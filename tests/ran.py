"""The table of what was run, model by model: docs/families.json, and its forms in Markdown.

Tests of every family compare their outcome with its cell; no cell says yes without a run. To write
the cells and the tables instead: `WRITE_TABLE=1 make test-vllm` for the cells of vLLM, then
`WRITE_TABLE=1 pytest tests/test_brought.py` for the others and the tables.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "families.json"
WRITE = bool(os.environ.get("WRITE_TABLE"))
KINDS = {"ffn": "channels", "kv": "KV groups", "experts": "experts"}
COLUMNS = {  # layout -> runtime -> its head
    "per-layer": {
        "transformers": "transformers",
        "remote": "without grasp",
        "llama.cpp": "llama.cpp",
        "vLLM": "vLLM",
    },
    "uniform": {"transformers": "transformers", "llama.cpp": "llama.cpp"},
}
NOT_RUN = "–"
Table = dict[str, Any]


def read() -> Table:
    found: Table = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return found


def check(name: str, layout: str, **found: Any) -> None:
    """Compare what ran with the cells of a model, or write them."""
    table = read()
    cells = table.setdefault(name, {}).setdefault(layout, {})
    if WRITE:
        cells |= found
        FILE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert {cell: cells.get(cell) for cell in found} == found, (
        f"{FILE.name} differs from what ran: WRITE_TABLE=1 pytest tests/test_brought.py"
    )


def whole(table: Table) -> str:
    """The table of docs/runtimes.md: a row for each model, then why the cells say no."""
    heads = [f"{layout}: {head}" for layout, own in COLUMNS.items() for head in own.values()]
    lines = [f"| model | what goes | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 2)}"]
    reasons: dict[str, list[str]] = {}
    for name, row in sorted(table.items(), key=lambda item: item[0].lower()):
        goes = next((own["goes"] for own in row.values() if own.get("goes")), NOT_RUN)
        cells = [
            row.get(layout, {}).get(runtime, NOT_RUN)
            for layout, own in COLUMNS.items()
            for runtime in own
        ]
        lines.append(f"| {name} | {goes} | {' | '.join(cells)} |")
        for layout in COLUMNS:
            if why := row.get(layout, {}).get("why"):
                reasons.setdefault(why, []).append(f"{name} ({layout})")
    lines += ["", "Why not:", ""]
    lines += [f"- {'; '.join(of)}: {why}." for why, of in sorted(reasons.items())]
    return "\n".join(lines)


def short(table: Table) -> str:
    """The table of the README: how many of the models run, or the families that do where few."""

    def ran(layout: str, runtime: str) -> list[str]:
        return [name for name, row in table.items() if row.get(layout, {}).get(runtime) == "yes"]

    def count(layout: str, runtime: str) -> str:
        return f"{len(ran(layout, runtime))} of {len(table)} models"

    def families(layout: str) -> str:
        found = sorted({name.partition(",")[0] for name in ran(layout, "llama.cpp")})
        return ", ".join(found)

    rows = [
        "| run by the tests | widths per layer | `--layout uniform` |",
        "| --- | --- | --- |",
        f"| transformers | {count('per-layer', 'transformers')}, with `import grasp` | "
        f"{count('uniform', 'transformers')}, as the stock class |",
        f"| transformers without grasp | {count('per-layer', 'remote')}, with "
        "`trust_remote_code=True` | the same |",
        f"| vLLM | {count('per-layer', 'vLLM')}, with grasp's plugin | {NOT_RUN} |",
        f"| llama.cpp | {families('per-layer')} | {families('uniform')} |",
    ]
    return "\n".join(rows)


def check_page(page: Path, rendered: str) -> None:
    """Compare what stands between the marks of a page with `rendered`, or write it."""
    text = page.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- what ran -->\n).*?(\n<!-- until here -->)", re.DOTALL)
    assert marks.search(text), f"{page} has no place for the table"
    wanted = marks.sub(lambda m: m[1] + rendered + m[2], text)
    if WRITE:
        page.write_text(wanted, encoding="utf-8")
    assert text == wanted or WRITE, (
        f"{page.name} differs from what ran: WRITE_TABLE=1 pytest tests/test_brought.py"
    )
