"""Compare many budgets from one selection with learning each budget alone.

    python -m benchmarks.budgets --text FILE --eval-text FILE [--keep 0.8,0.6,0.5] [--seeds 0,1,2]

For each seed, `grasp prune` runs once with all budgets (scores are learned under the smallest) and
once per budget. Checkpoints stay in --out; a second call runs only what is missing. The table goes
to standard output and to README.md in --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import grasp
from benchmarks.rows import keep_settings
from grasp.checkpoint.record import Record
from grasp.report.comparison import span
from grasp.report.summary import how_measured, markdown_table


def measure(model: str, out: Path, keep: list[float], seed: int, **options: Any) -> None:
    """One run for all budgets, and one for each but the smallest, which would be the same."""
    together = out / f"seed-{seed}"
    if not together.exists():
        grasp.prune(model, together, keep=keep, seed=seed, **options)
    for part in keep:
        alone = out / f"seed-{seed}-alone-{part}"
        if part != min(keep) and not alone.exists():
            grasp.prune(model, alone, keep=part, seed=seed, **options)


def table(out: Path, keep: list[float], seeds: list[int]) -> str:
    rows, last = [], {}
    for part in keep:
        together = [Record.read(out / f"seed-{s}" / f"keep-{part}") for s in seeds]
        alone = together
        if part != min(keep):
            alone = [Record.read(out / f"seed-{s}-alone-{part}") for s in seeds]
        one, other = ([s.results["pruned"]["value"] for s in runs] for runs in (together, alone))
        paired = mean(a / b for a, b in zip(one, other, strict=True))
        rows.append([f"{part}", span(one), span(other), f"{paired:.3f}"])
        last = together[-1].results["dense"]
    head = ["keep", f"learned under {min(keep)}, projected", "learned alone", "×"]
    return (
        f"{markdown_table(head, rows)}\n\n{how_measured(last)} Dense {last['value']:.2f}; mean of "
        f"seeds {', '.join(map(str, seeds))} (least to most); × is seed by seed.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--keep", default="0.8,0.6,0.5", help="budgets separated by commas")
    parser.add_argument("--seeds", default="0", help="numbers separated by commas")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/budgets"))
    options = vars(parser.parse_args(argv))
    options["calibration"] = options.pop("text")
    model, out = options.pop("model"), options.pop("out")
    keep = [float(part) for part in options.pop("keep").split(",")]
    seeds = [int(seed) for seed in options.pop("seeds").split(",")]
    keep_settings(out, {"model": model, "keep": keep, **options})
    for seed in seeds:
        measure(model, out, keep, seed, ffn_multiple=1, compensate="refit", **options)
    found = table(out, keep, seeds)
    (out / "README.md").write_text(found, encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
