"""Measure what it changes to keep short documents apart inside a block, by Fisher scores of gates.

    python -m benchmarks.documents --texts FILE.jsonl,FILE.txt --eval-texts FILE.txt,FILE.txt

A document is a row of a JSON-lines file (its `text`), or a paragraph of a text. `joined`: blocks of
one text, documents joined by two newlines, as everywhere in grasp. `apart`: each starts with a BOS,
positions restart there, attention does not cross it, and no loss counts it. `other`: joined, but
other documents. Compared are the units that a budget keeps: those of `joined` and `apart` should
differ more than those of `joined` and `other`, or the draw of the text matters more. With
`--eval-texts`, gates and scales also learn on each, and the cut model's perplexity is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import grasp
from benchmarks.gate_training import machine
from benchmarks.rows import RESULTS, write
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.journal import Journal
from grasp.model.load import load_model
from grasp.model.units import UnitSpace
from grasp.select.fisher import fisher_scores

objective: Any = import_module("grasp.gates.objective")
of_all = objective.linear_cross_entropy


def documents(file: Path, seed: int) -> list[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        rows = [json.loads(line)["text"] for line in text.splitlines()]
    else:
        rows = [row for row in text.split("\n\n") if row.strip()]
    random.Random(seed).shuffle(rows)
    return rows


@contextmanager
def apart(model: Any, bos: int) -> Iterator[None]:
    """Within the context, positions restart at a BOS, attention and loss do not cross it."""
    decoder = model.get_decoder()
    whole = decoder.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        starts = torch.where(input_ids == bos, places, 0).cummax(1).values
        # without a mask, transformers keeps apart what restarts
        return whole(
            input_ids, **kwargs | {"attention_mask": None, "position_ids": places - starts}
        )

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return of_all(hidden[targets != bos], weight, targets[targets != bos])

    decoder.forward, objective.linear_cross_entropy = forward, loss
    try:
        yield
    finally:
        del decoder.forward
        objective.linear_cross_entropy = of_all


@dataclass(frozen=True)
class Found:
    """What a stream of documents gives."""

    mask: Mask  # of Fisher scores
    loss: float  # of the dense model
    perplexity: list[float]  # of a model that learned on it, on each evaluation text


class Losses(Journal):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        self.found.append(loss)


def compare(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    model, tokenizer = load_model(options.model, dtype=torch.bfloat16)
    space, length, bos = UnitSpace.of(model), options.seq_len, tokenizer.bos_token_id
    projection = Projection(space, Budget.of(keep=options.keep, ffn_multiple=1))
    rows = documents(file, options.seed)
    half = len(rows) // 2

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def found(stream: list[int], way: Any = nullcontext) -> Found:
        blocks = torch.tensor(stream[: options.samples * length]).view(options.samples, length)
        losses = Losses()
        with way(model):
            scores = fisher_scores(model, space, blocks, losses)
        mask = projection.mask(projection.ranked(scores))
        if not options.eval_texts:
            return Found(mask, mean(losses.found), [])
        own = copy.deepcopy(model)
        with way(own):
            learned = grasp.learn(
                own,
                blocks,
                keep=options.keep,
                ffn_multiple=1,
                epochs=options.epochs,
                seed=options.seed,
            )
        cut = grasp.fold(own, learned)
        texts = options.eval_texts.split(",")
        how = {"seq_len": 1024, "windows": options.eval_windows}
        measured = [grasp.perplexity(cut, tokenizer, text, **how).value for text in texts]
        return Found(mask, mean(losses.found), measured)

    alone = [[bos, *ids(row)] for row in rows[:half]]
    joined = found(ids("\n\n".join(rows[:half])))
    kept_apart = found([token for row in alone for token in row], partial(apart, bos=bos))
    other = found(ids("\n\n".join(rows[half:])))
    lengths = [min(len(row), length) for row in alone]
    return {
        "text": file.name,
        "tokens_of_a_document": mean(lengths),
        "padding": 1 - sum(lengths) / (len(lengths) * length),
        "loss": {"joined": joined.loss, "apart": kept_apart.loss},
        "kept_by_both": {
            "apart": shared(joined.mask, kept_apart.mask),
            "other": shared(joined.mask, other.mask),
        },
        "perplexity": {
            "joined": joined.perplexity,
            "apart": kept_apart.perplexity,
            "other": other.perplexity,
        },
    }


def shared(one: Mask, other: Mask) -> float:
    """The part of the units that `one` keeps, which `other` keeps too; 0.5 by chance at half."""
    return float((one.keep & other.keep).sum() / one.keep.sum())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", required=True, help="files of documents, separated by commas")
    parser.add_argument("--eval-texts", help="files, separated by commas")
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "documents.json")
    options = parser.parse_args(argv)
    names = "samples", "seq_len", "keep", "seed", "epochs", "eval_windows"
    settings = {name: getattr(options, name) for name in names}
    results: dict[str, Any] = {"settings": settings, "machine": machine("cpu"), "rows": []}
    for file in map(Path, options.texts.split(",")):
        results["rows"].append(compare(options, file))
        write(results, options.out)
        print(json.dumps(results["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
