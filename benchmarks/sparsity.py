"""Compare sparsity methods under one pattern, calibrated on the same text.

    python -m benchmarks.sparsity --text FILE --eval-text FILE [--eval-text FILE] \\
      [--patterns 2:4,4:8] [--seeds 0,1]
    python -m benchmarks.sparsity --table --out JSON

A row is a method, and may change one option: `wanda++/rounds=0`, `wanda++/lr=0.1`. Each sparsifies
a copy of one model on the same blocks as every other row of its seed, in fp32, and is evaluated on
the same windows as the dense model. Results are written after every row, and a second call runs
only the missing rows.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, get_args

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.rows import Bench, measured_in, row_parser
from grasp.budget.pattern import Pattern
from grasp.config import SparseMethod, SparsifyConfig
from grasp.data.blocks import token_blocks
from grasp.journal import Journal
from grasp.report.comparison import span
from grasp.report.summary import markdown_table
from grasp.sparsity.blocks import sparsify_blocks
from grasp.sparsity.methods import method_of


def row_config(name: str, base: SparsifyConfig) -> SparsifyConfig:
    """`wanda++/lr=1e-4` is `base` with that method and that option."""
    method, _, change = name.partition("/")
    option, _, value = change.partition("=")
    changed = {option: type(getattr(base, option))(value)} if option else {}
    return replace(base, method=method, **changed)  # type: ignore[arg-type]


def sparsified(model: PreTrainedModel, config: SparsifyConfig, blocks: Tensor) -> list[float]:
    return sparsify_blocks(
        model,
        Pattern.parse(config.pattern),
        method_of(config),
        blocks,
        seed=config.seed,
        stage=lambda name: Journal(),
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: perplexity on each text, mean over seeds (least to most), and over `wanda`'s."""
    texts = results["settings"]["evaluation"]
    names = [text["name"] for text in (texts["data"], *texts.get("other_texts", ()))]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in results["rows"]:
        runs.setdefault((record["pattern"], record["row"]), []).append(record)
    dense = [results["dense"], *results.get("dense_other_texts", ())]
    rows = [["", "dense", *(cell for value in dense for cell in (f"{value:.2f}", "")), "", "", ""]]
    for (pattern, name), records in runs.items():
        wanda = {r["seed"]: _values(r) for r in runs.get((pattern, "wanda"), [])}
        found = []
        for at in range(len(names)):
            paired = [_values(r)[at] / wanda[r["seed"]][at] for r in records if r["seed"] in wanda]
            found += [span([_values(r)[at] for r in records])]
            found += [f"{mean(paired):.3f}" if paired else ""]
        rows.append(
            [
                pattern,
                name,
                *found,
                f"{mean(mean(r['errors']) for r in records):.3f}",
                f"{mean(r['cpu_seconds'] for r in records):.0f}",
                ", ".join(str(r["seed"]) for r in records),
            ]
        )
    columns = [cell for text in names for cell in (text, "× wanda")]
    head = ["pattern", "row", *columns, "mean error", "CPU seconds", "seeds"]
    return f"{measured_in(results['settings']['evaluation'])}\n\n{markdown_table(head, rows)}"


def _values(record: dict[str, Any]) -> list[float]:
    """Perplexity on each text."""
    return [record["perplexity"], *record.get("other_texts", ())]


def main(argv: Sequence[str] | None = None) -> None:
    parser = row_parser(__doc__, "sparsity.json")
    parser.add_argument("--patterns", default="2:4", help="separated by commas")
    parser.add_argument("--rows", default=",".join(get_args(SparseMethod)))
    parser.add_argument("--samples", type=int, default=SparsifyConfig.samples)
    parser.add_argument("--seq-len", type=int, default=SparsifyConfig.seq_len)
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    if not (options.text and options.eval_text):
        parser.error("--text and --eval-text are needed")

    base = SparsifyConfig(options.model, samples=options.samples, seq_len=options.seq_len)
    bench = Bench.begin(options, "base", base)
    results = bench.results
    done = {(r["row"], r["pattern"], r["seed"]) for r in results["rows"]}
    for seed in map(int, options.seeds.split(",")):
        for pattern in options.patterns.split(","):
            for name in options.rows.split(","):
                if (name, pattern, seed) in done:
                    continue
                config = row_config(name, replace(base, pattern=pattern, seed=seed))
                blocks = token_blocks(
                    bench.corpus, seq_len=config.seq_len, samples=config.samples, seed=seed
                )
                model, began = copy.deepcopy(bench.dense), time.process_time()
                errors = sparsified(model, config, blocks)
                seconds = time.process_time() - began
                record = {"row": name, "pattern": pattern, "seed": seed}
                value, *others = bench.scores(model)
                record |= {"perplexity": value, "other_texts": others, "errors": errors}
                bench.add(record | {"cpu_seconds": round(seconds, 1)})
    print(table(results))


if __name__ == "__main__":
    main()
