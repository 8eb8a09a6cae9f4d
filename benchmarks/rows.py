"""Shared by benchmarks made of rows: one model, its texts, and results written after every row."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.gate_training import machine
from grasp.config import PruneConfig, SparsifyConfig
from grasp.data.corpus import Corpus, read_corpus
from grasp.evaluate.perplexity import perplexity
from grasp.model.load import load_model, pick_device

Score = Callable[[PreTrainedModel], float]
RESULTS = Path(__file__).parent / "results"


def row_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options that all of them take; results go to `out`, a file in `RESULTS`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--table", action="store_true", help="print the table of --out, run nothing"
    )
    parser.add_argument("--text", help="calibration text")
    parser.add_argument("--eval-text", action="append", help="once for each text")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--seeds", default="0", help="numbers separated by commas")
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


@dataclass(frozen=True)
class Bench:
    """The dense model in fp32, the calibration text, perplexity, and the results so far.

    `score` measures on the first evaluation text, `scores` on all.
    """

    dense: PreTrainedModel
    corpus: Corpus
    score: Score
    scores: Callable[[PreTrainedModel], list[float]]
    results: dict[str, Any]
    out: Path

    @classmethod
    def begin(
        cls, options: argparse.Namespace, recipe: str, config: PruneConfig | SparsifyConfig
    ) -> Bench:
        """Read texts and model, and the results in `options.out`, which keep `config` as `recipe`.

        Where there are none yet the dense model is measured.
        """
        device = pick_device(options.device)
        dense, tokenizer = load_model(options.model, dtype=torch.float32, device=device)
        corpus = read_corpus(options.text, tokenizer)
        texts = [read_corpus(text, tokenizer, split="test") for text in options.eval_text]
        windows, length = options.eval_windows, options.eval_seq_len

        def score(model: PreTrainedModel, text: Corpus = texts[0]) -> float:
            return perplexity(model, text, seq_len=length, windows=windows).value

        def scores(model: PreTrainedModel) -> list[float]:
            return [score(model, text) for text in texts]

        settings = {
            # where the files lie does not matter, what they hold does
            recipe: config.to_json() | {"calibration": corpus.to_json()},
            "evaluation": {"data": texts[0].to_json(), "windows": windows, "seq_len": length},
        }
        if texts[1:]:
            settings["evaluation"]["other_texts"] = [text.to_json() for text in texts[1:]]
        results = resume(options.out, settings)
        here = machine(device)
        if results is not None and results["machine"] != here:
            sys.exit(f"{options.out} holds rows of another machine: choose another --out")
        if results is None:
            results = {"settings": settings, "machine": here, "rows": []}
            results["dense"], *others = scores(dense)
            results |= {"dense_other_texts": others} if others else {}
        return cls(dense, corpus, score, scores, results, options.out)

    def add(self, row: dict[str, Any]) -> None:
        self.results["rows"].append(row)
        write(self.results, self.out)
        print(json.dumps(row), flush=True)


def measured_in(evaluation: dict[str, Any]) -> str:
    """The line above a table."""
    names = [text["name"] for text in (evaluation["data"], *evaluation.get("other_texts", ()))]
    return (
        f"Perplexity on the first {evaluation['windows']} windows of {' and '.join(names)} "
        f"at length {evaluation['seq_len']}, no BOS, fp32; mean of the seeds (least to most)."
    )


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Note in the folder `out` what its checkpoints are made with; ends the program if other."""
    if resume(out / "settings.json", settings) is None:
        write({"settings": settings}, out / "settings.json")


def resume(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results in `out`, if any; ends the program if they are of other settings."""
    if not out.exists():
        return None
    results: dict[str, Any] = json.loads(out.read_text())
    if results["settings"] != json.loads(json.dumps(settings)):
        sys.exit(f"{out} holds results of other settings: choose another --out")
    return results


def write(results: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".new")
    beside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(beside, out)  # a stop at any moment leaves the rows that are done
