"""Measure the effect of each of our differences from the published method, one at a time.

    python -m benchmarks.ablation --text FILE --eval-text FILE [--seeds 0,1,2] [--rows NAME,...]
    python -m benchmarks.ablation --table --out JSON

A row is `ours` or `published` with one choice changed, or `published code`. The last is the eager
form of `benchmarks.published` with its own scales, whereas `published` is the same setting in
grasp's own loop. Each row learns a mask and then scales on the same blocks as every other row of
its seed, in fp32, and is evaluated on the same windows as the dense model. Results are written
after every row, and a second call runs only the missing rows.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import published
from benchmarks.rows import Bench, Score, measured_in, row_parser
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.compress.calibrate import learn_scales
from grasp.compress.fold import fold_mask
from grasp.compress.refit import refit
from grasp.config import PruneConfig
from grasp.data.blocks import token_blocks
from grasp.data.corpus import Corpus
from grasp.gates.scales import fold_scales
from grasp.gates.training import TrainSettings
from grasp.journal import Journal
from grasp.model.units import UnitSpace
from grasp.report.comparison import span
from grasp.report.summary import markdown_table
from grasp.select import select


@dataclass(frozen=True)
class Row:
    """One way to prune, measured against the row named `against`."""

    name: str
    against: str
    config: PruneConfig
    ties: Literal["random", "position"] = "random"
    floors: Literal["inside", "outside"] = "inside"
    published_code: bool = False


class FloorsOutside(Projection):
    """The published cut under any other choice: floors come on top of the budget."""

    def __init__(self, space: UnitSpace, budget: Budget, *, device: torch.device, tie_rank: Tensor):
        super().__init__(space, budget, device=device, tie_rank=tie_rank)
        self.by_tie = tie_rank.argsort().to(device)
        self.costs, self.parts = published.unit_costs(space, budget, device)

    def __call__(self, scores: Tensor, limit: int | Tensor | None = None) -> Tensor:
        p = torch.sigmoid(scores.detach() / published.TAU)
        order = self.by_tie[p[self.by_tie].argsort(descending=True, stable=True)]
        limit = self.limit if limit is None else int(limit)
        return published.cut_then_floors(order, p, self.costs, limit, self.parts)


def ablation_rows(ours: PruneConfig) -> list[Row]:
    paper = ours.as_published()
    blocked = replace(ours.budget, ffn_multiple=32)

    def off(name: str, config: PruneConfig = ours, **choice: Any) -> Row:
        return Row(f"ours/{name}", "ours", config, **choice)

    def on(name: str, config: PruneConfig = paper, **choice: Any) -> Row:
        choices = {"ties": "position", "floors": "outside", **choice}
        return Row(f"published/{name}", "published", config, **choices)

    def faster(batch: int) -> Row:
        """A batch whose rate grows with it: scores can move as far in fewer steps."""
        alone, lr = f"ours/batch_size={batch}", batch * ours.lr
        return Row(f"{alone}+lr={lr}", alone, replace(ours, batch_size=batch, lr=lr))

    return [
        Row("ours", "ours", ours),
        off("ties=position", ties="position"),
        off("floors=outside", floors="outside"),
        off("gate_site=kv", replace(ours, gate_site="kv")),
        off("init_scores=equal", replace(ours, init_scores="equal")),
        off("anneal=0", replace(ours, anneal=0.0)),
        off("schedule=constant", replace(ours, schedule="constant")),
        off("lr=0.02", replace(ours, lr=0.02)),
        off("compensate=none", replace(ours, compensate="none")),
        off("scales=unit", replace(ours, scales="unit")),
        off("scale_decay=0", replace(ours, scale_decay=0.0)),
        off("batch_size=2", replace(ours, batch_size=2)),
        faster(2),
        off("batch_size=4", replace(ours, batch_size=4)),
        faster(4),
        off(f"epochs={2 * ours.epochs}", replace(ours, epochs=2 * ours.epochs)),
        off("ffn_multiple=32", replace(ours, budget=blocked)),
        Row("published", "ours", paper, ties="position", floors="outside"),
        on("ties=random", ties="random"),
        on("floors=inside", floors="inside"),
        on("gate_site=output", replace(paper, gate_site="output")),
        on("init_scores=fisher", replace(paper, init_scores="fisher")),
        on("anneal=0.5", replace(paper, anneal=0.5)),
        Row("published code", "published", paper, published_code=True),
    ]


def run_row(
    row: Row, seed: int, dense: PreTrainedModel, corpus: Corpus, score: Score
) -> dict[str, Any]:
    """Prune a copy of `dense` as the row says; how much it keeps and what `score` gives for it."""
    config = replace(row.config, seed=seed)
    blocks = token_blocks(corpus, seq_len=config.seq_len, samples=config.samples, seed=seed)
    model = copy.deepcopy(dense)
    began = time.monotonic()
    mask, scales = choose(row, config, model, blocks)
    seconds = time.monotonic() - began
    if scales is not None:
        fold_scales(model, config.scales, scales)
    if config.compensate == "refit":
        refit(model, mask, blocks)
    fold_mask(model, mask)
    alone = score(model)
    settings = TrainSettings.of(config, config.scale_epochs)
    if row.published_code:
        published.learn_scales(model, blocks, settings)
    else:
        scales = learn_scales(model, config.scales, blocks, settings, Journal())
        fold_scales(model, config.scales, scales)
    return {
        "row": row.name,
        "against": row.against,
        "seed": seed,
        "kept": mask.pruned_space().prunable_params / mask.space.prunable_params,
        "before_last_epoch": alone,
        "after": score(model),
        "select_seconds": round(seconds, 1),
        "mask_sha256": mask.digest(),
    }


def choose(
    row: Row, config: PruneConfig, model: PreTrainedModel, blocks: Tensor
) -> tuple[Mask, Tensor | None]:
    """The mask, and the scales that learned with it."""
    if row.published_code:
        return published.learn_mask(
            model, blocks, keep=config.budget.asked, epochs=config.epochs, seed=config.seed
        ), None
    space = UnitSpace.of(model)
    tie_rank = torch.arange(space.size)
    if row.ties == "random":
        tie_rank = torch.randperm(space.size, generator=torch.Generator().manual_seed(config.seed))
    kind = Projection if row.floors == "inside" else FloorsOutside
    projection = kind(space, config.budget, device=model.device, tie_rank=tie_rank)
    scores, scales = select(model, projection, blocks, config, lambda stage: Journal())
    return projection.mask(scores), scales


def table(results: dict[str, Any]) -> str:
    """Markdown: mean over seeds (least to most); `x` is the last perplexity over its base row's."""
    dense, evaluation = results["dense"], results["settings"]["evaluation"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in results["rows"]:
        runs.setdefault(record["row"], []).append(record)
    rows = [["dense", "100 %", f"{dense:.2f}", "", "", ""]]
    for name, records in runs.items():
        base = {r["seed"]: r["after"] for r in runs.get(records[0]["against"], [])}
        paired = [r["after"] / base[r["seed"]] for r in records if r["seed"] in base]
        ratio = f"{mean(paired):.3f} {records[0]['against']}" if paired else ""
        kept, before, after = (
            [r[k] for r in records] for k in ("kept", "before_last_epoch", "after")
        )
        seeds = ", ".join(str(r["seed"]) for r in records)
        rows.append([name, f"{mean(kept):.2%}", span(before), span(after), ratio, seeds])
    head = ["row", "kept", "before the last epoch", "after it", "×", "seeds"]
    return f"{measured_in(evaluation)}\n\n{markdown_table(head, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = row_parser(__doc__, "ablation.json")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", help="names separated by commas; all by default")
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    if not (options.text and options.eval_text):
        parser.error("--text and --eval-text are needed")

    ours = PruneConfig(
        options.model,
        Budget("keep", options.keep, ffn_multiple=1),
        samples=options.samples,
        seq_len=options.seq_len,
        epochs=options.epochs,
        compensate="refit",
    )
    rows = {row.name: row for row in ablation_rows(ours)}
    names = options.rows.split(",") if options.rows else list(rows)
    unknown = [name for name in names if name not in rows]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there is {', '.join(rows)}")
    bench = Bench.begin(options, "ours", ours)
    results = bench.results
    done = {(record["row"], record["seed"]) for record in results["rows"]}
    for seed in map(int, options.seeds.split(",")):  # one seed of everything first
        for name in names:
            if (name, seed) not in done:
                bench.add(run_row(rows[name], seed, bench.dense, bench.corpus, bench.score))
    print(table(results))


if __name__ == "__main__":
    main()
