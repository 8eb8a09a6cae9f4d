"""`grasp recover` from end to end: a pruned model learns from the dense one's predictions."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from grasp.checkpoint.record import Record
from grasp.checkpoint.save import try_saving
from grasp.compress.distil import Recovery, distance, distil, learnable
from grasp.config import RecoverConfig
from grasp.errors import GraspError
from grasp.gates.memory import memory_mode
from grasp.gates.objective import Batch, last_hidden
from grasp.machine import disk_errors, memory_errors
from grasp.model.load import cast, pick_device, pick_dtype, torch_dtype, widened
from grasp.model.units import UnitSpace
from grasp.report.results import add_reports
from grasp.run.folder import Result, Run, Show, open_run
from grasp.run.prune import Start, finish, inputs_of, load_dense, measure_once, read_texts
from grasp.run.ready import check_recovery


def recover(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    show: Show = lambda record: None,
    **options: Any,
) -> Result:
    """Train the pruned checkpoint in `folder` by distillation from `teacher`; write it to `out`.

    `teacher` is the dense model that it was pruned from, `calibration` the text to train on, which
    should not be the one that it was pruned with; `options` are the other fields of
    `RecoverConfig`. Widths and the number of parameters stay. Held-out blocks of the text are
    watched: the weights that are best there are written, and nothing if those are the ones it
    started from. Interrupted at any moment, the same call resumes and ends in the same weights.
    `show` receives each log record. Raises GraspError.
    """
    config = RecoverConfig.of(folder, teacher=teacher, calibration=calibration, **options)
    check_recovery(config, out)
    device = pick_device(config.device)
    config = replace(config, device=device, dtype=pick_dtype(config.dtype, device))
    fix = (
        f"lower `batch_size` (now {config.batch_size}) or `seq_len` (now {config.seq_len}), or use "
        f"`lora_rank`; other options need a new start: remove {out}.run"
    )
    with memory_errors(config.device, fix), open_run(Path(out), config.to_json(), show) as run:
        return _recover(config, run)


def _recover(config: RecoverConfig, run: Run) -> Result:
    model, tokenizer = load_dense(config)
    teacher, _ = load_dense(replace(config, model=config.teacher))
    record = Record.read(Path(config.model))
    _check_head(config, record, model, teacher)
    try_saving(model, tokenizer, run.checkpoint, UnitSpace.of(model))
    start = read_texts(config, teacher, tokenizer, run)
    _warn(config, record, start, run)
    run.same_inputs(inputs_of(start, model, teacher))
    dense = measure_once(start, teacher, "dense", run)
    before = measure_once(start, model, "before", run)
    found = _train(model, teacher, config, start, run)
    entry = {
        "teacher": config.teacher,
        "text": start.calibration.to_json(),
        **asdict(found),
        "perplexity_before": before,
        "recipe": config.to_json(),
    }
    record = replace(record, recovery=[*(record.recovery or ()), entry], results={})
    record = finish(config, model, record, start, dense, run, run.checkpoint)
    record = record.measured(seconds=run.seconds())
    with disk_errors(run.checkpoint):
        record.write(run.checkpoint)
    if record.recipe:  # a model that a program saved has no reports
        add_reports(run.checkpoint, record, run.records())
    run.log(event="finished", folder=str(run.out), **record.results)
    run.publish()
    return Result(run.out, Record.read(run.out))


def _train(
    model: PreTrainedModel, teacher: PreTrainedModel, config: RecoverConfig, start: Start, run: Run
) -> Recovery:
    """Distil, and return to the stored dtype. Raises GraspError if the model is no better then.

    Weights that learn are fp32. The teacher has `config.dtype`; in bf16, a model under adapters
    stays as stored. Both losses that decide are of fp32 weights: another rounding of the same ones
    would be a gain or a loss.
    """
    stored, working = model.dtype, torch_dtype(config.dtype)
    cast(teacher, working)
    if config.dtype == "fp32" or config.lora_rank is None:
        cast(model, torch.float32)
    blocks = start.blocks(config)
    watched, rest = blocks[: config.held_out], blocks[config.held_out :]
    held_out = Batch(watched.to(model.device), last_hidden(teacher, watched))
    with widened(model, torch.float32):
        before = distance(model, held_out, config)
    with memory_mode(model, config), learnable(model, config) as learned:
        found = distil(model, teacher, learned, rest, held_out, config, run.stage("recover"))
    cast(model, stored)
    with widened(model, torch.float32):
        found = replace(found, before=before, after=distance(model, held_out, config))
    if not found.after < found.before:
        raise GraspError(
            f"nothing is written: the loss on held-out blocks is {found.before:.4f} for "
            f"{config.model} and {found.after:.4f} at best after it: use other or more text, or "
            f"another `lr`; other options need a new start: remove {run.out}.run"
        )
    return found


def _check_head(
    config: RecoverConfig, record: Record, model: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """Refuse a teacher whose hidden states mean other tokens under the pruned model's head."""
    own, other = (m.get_output_embeddings().weight for m in (model, teacher))
    if own.shape != other.shape or not torch.equal(own, other.to(own.dtype)):
        raise GraspError(
            f"the head of {config.teacher} is not that of {config.model}: give the model that it "
            f"was pruned from ({record.model}) as `teacher`"
        )


def _warn(config: RecoverConfig, record: Record, start: Start, run: Run) -> None:
    """Say where the text to train on is the one that the checkpoint was pruned with."""
    seen = record.calibration or {}
    known = {text["sha256"] for text in (seen, *seen.get("parts", ())) if text}
    for corpus in start.calibration.corpora:
        if corpus.sha256 in known:
            run.log(
                event="note",
                text=f"{config.model} was pruned with {corpus.name}: learning from the same text "
                "once more may make it worse on others: give another `calibration`",
            )
    if not start.evaluation_sets:
        run.log(event="note", text="no text is left to evaluate on: give `eval_text`")
