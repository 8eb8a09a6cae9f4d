"""Write what `grasp plan` says into the pages of docs/: `python tools/planned.py`.

A page names what it wants, and it is written between that line and the next mark:

    <!-- plan: FILE --keep 0.5 -->      what the command prints
    <!-- plans: FILE, FILE -->          a table of memory
    <!-- gpus: FILE, FILE -->           a table of memory over several GPUs
    <!-- until here -->
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from grasp.cli.main import as_options
from grasp.planning.plan import plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs/budget.md", ROOT / "docs/scale.md"]
WANTED = re.compile(
    r"(^<!-- (plan|plans|gpus): ([^\n]+) -->\n).*?(^<!-- until here -->$)", re.MULTILINE | re.DOTALL
)


def written(page: Path) -> str:
    """The page with all that it wants."""
    makers = {"plan": _printed, "plans": _memory, "gpus": _over_gpus}

    def fill(wanted: re.Match[str]) -> str:
        return f"{wanted[1]}\n{makers[wanted[2]](wanted[3])}\n\n{wanted[4]}"

    return WANTED.sub(fill, page.read_text(encoding="utf-8"))


def _plan(config: str, *options: str) -> Any:
    """What `grasp plan CONFIG` decides; its options are `--name value`."""
    names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
    values = [json.loads(v) if re.fullmatch(r"[\d.]+", v) else v for v in options[1::2]]
    return plan(str(ROOT / config), **dict(zip(names, values, strict=True)))


def _printed(command: str) -> str:
    said = as_options(str(_plan(*shlex.split(command)))).replace(f"{ROOT}/", "")
    return f"```text\n{said}\n```"


def _memory(configs: str) -> str:
    lines = [
        "| model | parameters, dense → at 0.5 | gates learn: fast | balanced | low | blocks "
        "| evaluation |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for config in configs.split(", "):
        modes = [_plan(config, "--memory", mode) for mode in ("fast", "balanced", "low")]
        first = modes[0]
        sizes = [own.memory.total for own in modes]
        sizes += [first.compensation_memory, first.evaluation_memory]
        params = f"{first.params.before / 1e9:.2f} → {first.params.after.most / 1e9:.2f} B"
        row = [Path(config).stem, params, *(f"{size / 1e9:.1f} GB" for size in sizes)]
        lines.append(f"| {' | '.join(row)} |")
    learning = f"Learning takes {first.learning_tokens:,} tokens, forward and backward, and block"
    learning += f" reconstruction {first.block_tokens:,}."
    return "\n".join([*lines, "", learning])


def _over_gpus(configs: str) -> str:
    """The best way that fits on GPUs of 80 GB, or the one that takes the least, and its peak."""
    machines = [(1, 1), (2, 1), (8, 1), (8, 2)]
    names = ["1 GPU", "2 GPUs", "8 GPUs", "2 × 8 GPUs"]
    lines = [f"| model | {' | '.join(names)} |", f"|{' --- |' * (len(names) + 1)}"]
    for config in configs.split(", "):
        row = [Path(config).stem]
        for each, nodes in machines:
            given = f"--gpus {each} --nodes {nodes} --gpu-memory 80"
            ways = _plan(config, *given.split()).gpus.ways
            best = next((way for way in ways if way.fits), ways[-1])
            fits = f"`{best.shard}`" if best.fits else "no"
            row.append(f"{fits}, {best.peak / 1e9:.1f} GB")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")
