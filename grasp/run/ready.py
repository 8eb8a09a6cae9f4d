"""Check, before anything is loaded and without torch: a free `out`, the model, its texts."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from grasp.checkpoint.record import Record
from grasp.config import PruneConfig, RecoverConfig, RunConfig
from grasp.errors import GraspError
from grasp.model.header import Header, read_header
from grasp.model.source import check_readable, resolve
from grasp.planning.check import check, check_fit, check_plain


def ready(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    keep: float | Iterable[float] | None,
    **options: Any,
) -> list[PruneConfig]:
    """One config per budget of `keep`, where options and files allow them. Raises GraspError."""
    asked = [*dict.fromkeys(keep)] if isinstance(keep, Iterable) else [keep]
    if not asked:
        raise GraspError("`keep` must hold at least one number, got none")
    configs = [PruneConfig.of(model, keep=part, **options) for part in asked]
    header = check_run(configs[0], out)
    for config in configs[1:]:
        check_fit(config, header)
    return configs


def check_run(config: RunConfig, out: str | os.PathLike[str]) -> Header:
    """Return the model's header if the options and files allow the run. Raises GraspError."""
    check_out(Path(out))
    check_readable(resolve(config.model))
    return check(config)


def check_recovery(config: RecoverConfig, out: str | os.PathLike[str]) -> tuple[Header, Header]:
    """Return the headers of the pruned model and its teacher. Raises GraspError if they differ."""
    record = Record.read(Path(config.model))
    if record.sparsity:
        raise GraspError(
            f"{config.model} has zeros in a pattern ({record.sparsity['pattern']}), which training "
            "would fill: see LoRA in docs/sparsify.md"
        )
    pruned = check_run(config, out)
    check_readable(resolve(config.teacher))
    teacher = read_header(config.teacher)
    check_plain(config.teacher, teacher, "compared")
    sizes = [(h.space.hidden_size, h.vocab_size, len(h.space.layers)) for h in (pruned, teacher)]
    if sizes[0] != sizes[1]:
        raise GraspError(
            f"`teacher` must be the model that {config.model} was pruned from ({record.model}), "
            f"got {config.teacher}, which differs in hidden size, vocabulary or layers "
            f"({sizes[1]}, expected {sizes[0]})"
        )
    if config.lora_rank and not any(n.ffn or n.kv_groups for n in pruned.space.layers):
        raise GraspError(
            f"`lora_rank` finds no linear layer to adapt in {config.model}, whose units are routed "
            "experts: leave it out"
        )
    if teacher.space.prunable_params <= pruned.space.prunable_params:
        raise GraspError(
            f"`teacher` must be the dense model that {config.model} was pruned from "
            f"({record.model}), got {config.teacher}, which is no larger"
        )
    return pruned, teacher


def check_out(out: Path) -> None:
    """Raise GraspError if the result exists already, after removing what its run has left."""
    if os.path.lexists(out):
        _remove_published(out)
        raise GraspError(f"{out} exists already: choose another `out` or remove it first")


def run_folder(out: Path) -> Path:
    """Return the folder where the run works until its result is complete."""
    return out.with_name(out.name + ".run")


def _remove_published(out: Path) -> None:
    """Remove a run folder that was left by a kill right after the result was renamed."""
    with suppress(OSError, ValueError):
        if filecmp.cmp(out / "log.jsonl", run_folder(out) / "log.jsonl", shallow=False):
            shutil.rmtree(run_folder(out))
