"""What benchmarks made of rows share: one model, its texts, and results written after every row."""

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
from grasp.data import Corpus, read_corpus
from grasp.evaluate import perplexity
from grasp.models import load_model, pick_device

Score = Callable[[PreTrainedModel], float]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Bench:
    """The dense model in fp32, the calibration text, perplexity, and the results so far."""

    dense: PreTrainedModel
    corpus: Corpus
    score: Score
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
        evaluation = read_corpus(options.eval_text, tokenizer, split="test")
        windows, length = options.eval_windows, options.eval_seq_len

        def score(model: PreTrainedModel) -> float:
            return perplexity(model, evaluation, seq_len=length, windows=windows).value

        settings = {
            # where the files lie does not matter, what they hold does
            recipe: config.to_json() | {"calibration": corpus.to_json()},
            "evaluation": {"data": evaluation.to_json(), "windows": windows, "seq_len": length},
        }
        results = resume(options.out, settings)
        if results is None:
            results = {"settings": settings, "machine": machine(device), "rows": []}
            results["dense"] = score(dense)
        return cls(dense, corpus, score, results, options.out)

    def add(self, row: dict[str, Any]) -> None:
        self.results["rows"].append(row)
        write(self.results, self.out)
        print(json.dumps(row), flush=True)


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
