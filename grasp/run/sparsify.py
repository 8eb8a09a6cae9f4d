"""`grasp sparsify` from end to end: the same model with zeros where the pattern wants them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from grasp.budget.pattern import Pattern
from grasp.budget.projection import Mask
from grasp.checkpoint.verify import check_sparsity
from grasp.config import SparsifyConfig
from grasp.errors import GraspError
from grasp.gates.fidelity import check_layers
from grasp.machine import memory_errors
from grasp.model.load import pick_device
from grasp.report.results import add_results
from grasp.report.summary import read_summary
from grasp.run.folder import Run, Show, open_run
from grasp.run.prune import (
    finish,
    load_dense,
    measure_dense,
    read_texts,
    summary_of,
)
from grasp.sparsity.blocks import linears_of, sparsify_blocks
from grasp.sparsity.methods import method_of


@dataclass(frozen=True)
class SparsifyResult:
    """What `sparsify` made. `summary` is the content of the checkpoint's grasp.json."""

    folder: Path
    summary: dict[str, Any]


def sparsify(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    show: Show = lambda record: None,
    **options: Any,
) -> SparsifyResult:
    """Sparsify the linears of all decoder blocks, save, evaluate. `out` is complete or absent.

    `options` are the other fields of `SparsifyConfig`, first of all `pattern` and `method`. The
    result is a checkpoint of the model's own class and config, with dense storage. Interrupted at
    any moment, the same call goes on behind the last finished block and ends in the same weights.
    `show` receives each log record. Raises GraspError.
    """
    plain = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    config = SparsifyConfig(os.fspath(model), **plain)
    config = replace(config, device=pick_device(config.device))
    fix = (
        f"lower --samples (now {config.samples}) or --seq-len (now {config.seq_len}), and start "
        f"anew: remove {out}.run"
    )
    with memory_errors(config.device, fix), open_run(Path(out), config.to_json(), show) as run:
        return _sparsify(config, run)


def _sparsify(config: SparsifyConfig, run: Run) -> SparsifyResult:
    model, tokenizer = load_dense(config)
    pattern, linears = Pattern.parse(config.pattern), linears_of(model)
    for name, linear in linears.items():
        pattern.check(name, linear.in_features)
    sparsity = {
        "pattern": config.pattern,
        "weights": sum(linear.weight.numel() for linear in linears.values()),
        "zeros_before": _zeros(model),
    }
    start = read_texts(config, model, tokenizer, run)
    found = check_layers(model, start.blocks(config), "grasp sparsify")
    run.log(event="fidelity", layers=found)
    if start.ruler is None:
        run.log(event="note", text="no text is left to evaluate on: give --eval-text")
    dense = measure_dense(model, start, run)

    sparsity["errors"] = sparsify_blocks(
        model,
        pattern,
        method_of(config),
        start.blocks(config),
        seed=config.seed,
        stage=run.stage,
    )
    sparsity["zeros_after"] = _zeros(model)
    everything = Mask(start.space, torch.ones(start.space.size, dtype=torch.bool))
    summary = {**summary_of(config, start, everything), "sparsity": sparsity}
    summary = finish(model, everything, summary, start, run, run.checkpoint)
    written = check_sparsity(run.checkpoint, sparsity)
    if not written.passed:
        raise GraspError(f"{run.checkpoint} is not as written ({written.detail}): check the disk")
    summary["results"] |= {"dense": dense, "seconds": run.seconds()}
    add_results(run.checkpoint, summary)
    run.log(event="finished", folder=str(run.out), **summary["results"])
    run.publish()
    return SparsifyResult(run.out, read_summary(run.out))


def _zeros(model: PreTrainedModel) -> int:
    return sum(int((linear.weight == 0).sum()) for linear in linears_of(model).values())
