"""`grasp sparsify` from end to end: the same model with weights set to zero by a pattern."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from grasp.budget.pattern import Pattern
from grasp.budget.projection import Mask
from grasp.checkpoint.record import Record
from grasp.checkpoint.save import try_saving
from grasp.config import SparsifyConfig
from grasp.distributed import from_first
from grasp.gates.fidelity import check_layers
from grasp.machine import disk_errors, memory_errors
from grasp.model.classes import without_weights
from grasp.model.load import cast, check_launched, pick_device
from grasp.model.sharding import free, is_sharded, whole, whole_layers
from grasp.model.units import UnitSpace
from grasp.run.by_layer import write_layers
from grasp.run.folder import Result, Run, Show, open_run
from grasp.run.prune import (
    finish,
    load_dense,
    measure_dense,
    read_texts,
    run_record,
)
from grasp.run.ready import check_run
from grasp.sparsity.blocks import linears_of, sparse_layers, sparsify_blocks
from grasp.sparsity.methods import method_of


def sparsify(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    show: Show = lambda record: None,
    **options: Any,
) -> Result:
    """Sparsify all linear layers of decoder blocks, save, evaluate. `out` is complete or absent.

    `options` are the other fields of `SparsifyConfig`, above all `pattern` and `method`. The result
    is a checkpoint of the model's own class and config, with dense storage. If the call is
    interrupted at any moment, the same call resumes after the last finished block and ends with the
    same weights. `show` receives each log record. Raises GraspError.
    """
    config = SparsifyConfig.of(model, **options)
    check_run(config, out)
    check_launched(config.shard)
    config = replace(config, device=pick_device(config.device))
    fix = (
        f"lower `samples` (now {config.samples}) or `seq_len` (now {config.seq_len}); other "
        f"options need a new start: remove {out}.run"
    )
    with memory_errors(config.device, fix), open_run(Path(out), config.to_json(), show) as run:
        return _sparsify(config, run)


def _sparsify(config: SparsifyConfig, run: Run) -> Result:
    model, tokenizer = load_dense(config)
    pattern, linears = Pattern.parse(config.pattern), linears_of(model)
    for name, linear in linears.items():
        pattern.check(name, linear.in_features)
    sparsity: dict[str, Any] = {
        "pattern": config.pattern,
        "weights": sum(linear.weight.numel() for linear in linears.values()),
        "zeros_before": _zeros(model),
    }
    try_saving(model, tokenizer, run.checkpoint, UnitSpace.of(model))
    start = read_texts(config, model, tokenizer, run)
    found = check_layers(model, start.blocks(config), "grasp sparsify")
    run.log(event="fidelity", layers=found)
    dense = measure_dense(model, start, run)

    how: Any = (pattern, method_of(config), start.blocks(config))
    more: Any = {"seed": config.seed, "stage": run.stage}
    if is_sharded(model):
        model, written = _write_sparse(model, tokenizer, run, *how, **more)
        sparsity |= written
    else:
        sparsity["errors"] = sparsify_blocks(model, *how, **more)
        sparsity["zeros_after"] = _zeros(model)
    everything = Mask.first(start.space, start.space)
    record = run_record(config, start, everything, model, sparsity=sparsity)
    record = finish(config, model, record, start, dense, run, run.checkpoint)
    record = record.measured(seconds=run.seconds())
    from_first(partial(_write, run.checkpoint, record))
    run.log(event="finished", folder=str(run.out), **record.results)
    run.publish()
    return Result(run.out, Record.read(run.out))


def _write_sparse(
    model: PreTrainedModel, tokenizer: Any, run: Run, *how: Any, **more: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Write the sparse layers of a sharded model one by one; returns it without weights.

    And the error of each layer and their zeros. `model` cannot be used afterwards.
    """
    target, _ = without_weights(model, UnitSpace.of(model))
    cast(target, model.dtype)
    found: dict[str, Any] = {"errors": [], "zeros_after": 0}

    def sparse() -> Iterator[nn.Module]:
        for layer, error in sparse_layers(model, whole_layers(model), *how, **more):
            found["errors"].append(error)
            linears = [m for m in layer.modules() if type(m) is nn.Linear]
            found["zeros_after"] += sum(int((m.weight == 0).sum()) for m in linears)
            yield layer

    write_layers(run.checkpoint, model, target, tokenizer, sparse())
    free(model)
    return target, found


def _write(folder: Path, record: Record) -> None:
    with disk_errors(folder):
        record.write(folder)


def _zeros(model: PreTrainedModel) -> int:
    return sum(int(whole((m.weight == 0).sum())) for m in linears_of(model).values())
