"""`grasp sparsify` from end to end: the same model with zeros where the pattern wants them."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from grasp.checkpoint.hf import save_checkpoint, write_json
from grasp.config import SparsifyConfig
from grasp.data import Corpus, token_blocks
from grasp.errors import GraspError
from grasp.models import cast, load_model, pick_device
from grasp.pipeline import (
    _calibration_text,
    _check_weights,
    _eval_text,
    _inputs,
    _longest,
    _measure,
    _ruler,
)
from grasp.run import Run, Show, disk_errors, memory_errors, open_run
from grasp.sparsity.blocks import linears_of, sparsify_blocks
from grasp.sparsity.methods import method_of
from grasp.sparsity.pattern import Pattern
from grasp.units import UnitSpace


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
    model, tokenizer = load_model(
        config.model,
        dtype=None,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    stored_dtype, space, pattern = model.dtype, UnitSpace.of(model), Pattern.parse(config.pattern)
    _check_weights(config, model)
    for name, linear in linears_of(model).items():
        pattern.check(name, linear.in_features)
    zeros = count_zeros(model)
    eval_text = _eval_text(config, tokenizer)
    corpus = _calibration_text(config, model, tokenizer, run)
    blocks = token_blocks(corpus, seq_len=config.seq_len, samples=config.samples, seed=config.seed)
    ruler = _ruler(config, eval_text, corpus, _longest(model))
    if ruler is None:
        run.log(event="note", text="no text is left to evaluate on: give --eval-text")
    run.same_inputs(_inputs(model, corpus, ruler))
    dense = run.remember("dense", partial(_measure, ruler, model, "dense", run))

    errors = sparsify_blocks(
        cast(model, stored_dtype),
        pattern,
        method_of(config),
        blocks,
        seed=config.seed,
        stage=run.stage,
    )
    check_pattern(model, pattern)
    sparsity = {
        "pattern": config.pattern,
        "weights": sum(linear.weight.numel() for linear in linears_of(model).values()),
        "zeros_before": zeros,
        "zeros_after": count_zeros(model),
        "errors": errors,
    }
    summary = _summary(config, corpus, space, sparsity)
    kept = [(list(range(layer.ffn)), list(range(layer.kv_groups))) for layer in space.layers]
    run.checkpoint.mkdir()
    saved = save_checkpoint(model, tokenizer, run.checkpoint, kept=kept, grasp_json=summary)
    del model

    reread, _ = load_model(run.checkpoint, dtype=torch.float32, device=config.device)
    check_pattern(reread, pattern)
    summary["results"] = {
        "dense": dense,
        "pruned": _measure(ruler, reread, "sparse", run),
        "seconds": run.seconds(),
        **asdict(saved),
    }
    with disk_errors(run.checkpoint):
        stored = json.loads((run.checkpoint / "grasp.json").read_text())
        stored["results"] = summary["results"]
        write_json(run.checkpoint / "grasp.json", stored)
    run.log(event="finished", folder=str(run.out), **summary["results"])
    run.publish()
    return SparsifyResult(run.out, stored)


def count_zeros(model: PreTrainedModel) -> int:
    return sum(int((linear.weight == 0).sum()) for linear in linears_of(model).values())


def check_pattern(model: PreTrainedModel, pattern: Pattern) -> None:
    """Raises GraspError where a linear does not have the zeros of the pattern."""
    for name, linear in linears_of(model).items():
        if not pattern.holds(linear.weight):
            raise GraspError(f"{name} does not hold the pattern {pattern.text}: please report this")


def _summary(
    config: SparsifyConfig, corpus: Corpus, space: UnitSpace, sparsity: dict[str, Any]
) -> dict[str, Any]:
    """All of grasp.json but the kept indices, which are all, and the results."""
    params, cache = (space.prunable_params, space.total_params), space.kv_cache_bytes_per_token()
    widths = [[layer.ffn, layer.kv_groups] for layer in space.layers]
    return {
        "format": 1,
        "grasp_version": version("grasp"),
        "model": config.model,
        "recipe": config.to_json(),
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "calibration": corpus.to_json(),
        "sparsity": sparsity,
        "params": {
            "prunable_before": params[0],
            "prunable_after": params[0],
            "total_before": params[1],
            "total_after": params[1],
        },
        "kv_cache_bytes_per_token": {"before": cache, "after": cache},
        "widths": {"before": widths, "after": widths},
        "results": {},
    }
