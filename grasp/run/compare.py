"""`grasp compare`: every method at every budget with every seed, under equal conditions.

A cell is a method (`fisher`, or `fisher+refit`) with a budget and a seed. A bare name means no
compensation, so `learned+blocks` is the default of `grasp prune`. All cells share the dense results
and the calibration text. Cells of the same seed share its blocks, and all budgets of a one-shot
method share its scores. Each cell ends like `grasp prune`, with a checkpoint that is measured after
it is read back from disk; only the figures are kept.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grasp import criteria
from grasp.budget.projection import Projection
from grasp.config import COMPARED_WIDTHS, KEEP, SEEDS, SET_BY_COMPARE, PruneConfig
from grasp.distributed import from_first
from grasp.errors import GraspError
from grasp.evaluate.zero_shot import check_tasks, evaluate_tasks
from grasp.gates.memory import memory_mode
from grasp.gates.objective import last_hidden
from grasp.machine import disk_errors, peak_memory, reset_peak_memory
from grasp.model.load import ShardMode, cast, move, torch_dtype
from grasp.model.places import Places, places_of
from grasp.model.sharding import is_sharded
from grasp.planning.check import check_fit
from grasp.report.comparison import figure, page
from grasp.run.chosen import Chosen
from grasp.run.folder import Run, Show
from grasp.run.prune import (
    Start,
    begin,
    check_budget,
    check_fidelity,
    finish,
    load_dense,
    make,
    measure_dense,
    on_device,
    open_job,
    pruned_record,
)
from grasp.run.ready import check_run
from grasp.select import select
from grasp.select.selection import Selection

Score = Callable[[str], dict[str, Any] | None]  # zero-shot results of a model or folder
Cost = dict[str, Any]  # seconds, peak_memory in bytes

TASK_BATCH = 16  # requests per batch: they are short, and scores hardly depend on it


@dataclass(frozen=True)
class Cell:
    """One method, as named by the user, with one budget and one seed."""

    method: str
    config: PruneConfig

    @property
    def name(self) -> str:
        return f"{self.method}, keep {self.config.budget.asked}, seed {self.config.seed}"

    @property
    def selection(self) -> str:
        """Name of everything that its scores depend on."""
        method, seed = self.config.method, self.config.seed
        if criteria.get(method).per_budget:
            return f"selection of {method}, keep {self.config.budget.asked}, seed {seed}"
        return f"selection of {method}, seed {seed}"

    @property
    def rewrites(self) -> bool:
        return criteria.get(self.config.method).updates_weights


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; `summary` is the content of compare.json."""

    folder: Path
    summary: dict[str, Any]


def compare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: float | Sequence[float] = KEEP,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    tasks: str | None = None,
    tasks_data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    show: Show = lambda record: None,
    **options: Any,
) -> Comparison:
    """Measure perplexity, and accuracy on `tasks`, of each method at each budget with each seed.

    A method is a criterion, optionally followed by `+refit`, `+blocks` or `+bias`; by default,
    `all_methods` of this kind of model. `options` are the fields of `PruneConfig` that all cells
    share; `tasks`, `tasks_data` and `limit` are passed to
    `evaluate_tasks`. Writes README.md (tables), compare.json and compare.png into the folder `out`,
    which is complete or absent. After an interruption, the same call resumes; methods, budgets and
    seeds may differ. Methods that fit weights run in fp32 whatever the `dtype`. A GPU holds one
    model at a time, host memory another. Raises GraspError.
    """
    parts = [*keep] if isinstance(keep, Iterable) else [keep]
    for name, values in (("keep", parts), ("methods", methods), ("seeds", seeds)):
        if values is not None and not values:
            raise GraspError(f"`{name}` must name at least one, got none")
    if own := options.keys() & SET_BY_COMPARE:
        raise GraspError(
            f"`{min(own)}` is set for each cell of compare: use `keep`, `methods` and `seeds`"
        )
    base = PruneConfig.of(model, keep=parts[0], **COMPARED_WIDTHS | options)
    if base.shard != "none" and tasks:
        raise GraspError(
            f"`tasks` runs on one rank, which holds no model in `shard={base.shard!r}`"
        )
    header = check_run(base, out)
    base = on_device(base)
    if methods is None:
        methods = all_methods(mixture=bool(header.space.experts), shard=base.shard)
    cells = _cells(base, parts, methods, seeds)
    if tasks:  # a mistyped one is told before the work
        data = None if tasks_data is None else Path(tasks_data)
        from_first(partial(check_tasks, tasks, data, limit))
    for cell in cells:
        check_fit(cell.config, header)
    asked = {
        "config": _shared(base),
        "tasks": tasks and {"names": tasks, "data": tasks_data and str(tasks_data), "limit": limit},
    }
    with open_job(base, out, asked, show) as run:
        dense, start = begin(base, run)
        for cell in cells:
            check_budget(cell.config, dense)
        check_fidelity([cell.config for cell in cells], dense, start, run)
        if not start.evaluation_sets:
            raise GraspError("the samples leave no text to evaluate on: give `eval_text`")
        perplexities = measure_dense(dense, start, run)
        cast(dense, torch_dtype(base.dtype))
        score = partial(_score, base, run, tasks, tasks_data, limit)
        grid = _Grid(run, dense, start, perplexities, score)
        summary = {
            "model": base.model,
            **asked,
            "calibration": start.calibration.to_json(),
            "parameters": {
                "prunable": base.budget.cost(start.space) * start.space.hidden_size,
                "total": start.space.total_params,
            },
            "dense": {
                "perplexity": perplexities[0],
                "other_texts": perplexities[1:],
                "tasks": run.remember("dense tasks", partial(score, base.model)),
            },
            "cells": [grid.measure(cell) for cell in cells],
            "seconds": run.seconds(),
        }
        from_first(partial(_write, run.checkpoint, summary))
        run.log(event="finished", folder=str(run.out))
        run.publish()
    return Comparison(Path(out), summary)


def _score(
    base: PruneConfig,
    run: Run,
    tasks: str | None,
    tasks_data: str | os.PathLike[str] | None,
    limit: int | None,
    name: str,
) -> dict[str, Any] | None:
    """Return the zero-shot results of the model or folder `name`, if there are tasks."""
    if not tasks:
        return None
    evaluate = partial(
        evaluate_tasks,
        name,
        tasks,
        tasks_data=None if tasks_data is None else Path(tasks_data),
        limit=limit,
        batch_size=TASK_BATCH,
        device=base.device,
        trust_remote_code=base.trust_remote_code,
        progress=run.steps_of("evaluate tasks"),
    )
    return from_first(lambda: evaluate().to_json())


def all_methods(*, mixture: bool, shard: ShardMode = "none") -> tuple[str, ...]:
    """Our criteria that score what can go, where the weights lie so; the best two with `blocks`."""
    able = [c for c in criteria.OURS if c.shardable or shard == "none"]
    ours = (c.name for c in able if criteria.suits(c.name, mixture=mixture))
    return (*ours, "learned+blocks", "fisher+blocks")


def _cells(
    base: PruneConfig, parts: Sequence[float], methods: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    return [
        Cell(
            method, replace(of_method(base, method, seed), budget=replace(base.budget, asked=part))
        )
        for seed in dict.fromkeys(seeds)  # all methods with the first seed, then the next
        for method in dict.fromkeys(methods)
        for part in dict.fromkeys(parts)
    ]


def of_method(config: PruneConfig, name: str, seed: int) -> PruneConfig:
    """Return `config` for a method such as fisher or fisher+refit. Raises GraspError."""
    options = ("refit", "blocks", "bias")
    more = next((option for option in options if name.endswith(f"+{option}")), "")
    method = name.removesuffix(f"+{more}") if more else name
    if method not in criteria.names():
        raise GraspError(
            f"`methods` must be among {', '.join(criteria.names())}, each alone or with +refit, "
            f"+blocks or +bias, got {name!r}"
        )
    updates = criteria.get(method).updates_weights
    if more and updates:
        raise GraspError(
            f"`methods` must name {method} alone, which fits weights as it chooses, got {name!r}"
        )
    choice: Any = {"method": method, "compensate": more or "none"}
    if updates:
        choice["dtype"] = "fp32"  # a narrower dtype would round the fitted weights
    return replace(config, seed=seed, **choice)


class _Grid:
    """Measures each cell of a run once, and computes shared results once."""

    def __init__(
        self,
        run: Run,
        dense: PreTrainedModel,
        start: Start,
        perplexities: list[dict[str, Any]],
        score: Score,
    ) -> None:
        self._run, self._start, self._score = run, start, score
        self._perplexities = perplexities  # of the dense model, on each text
        self._places = places_of(dense)
        self._dense = _moved(dense, "cpu")  # the device holds the model in use
        self._chosen: dict[str, tuple[Selection, Cost]] = {}
        self._taught: tuple[Any, Tensor] | None = None  # a seed and dtype, and what they gave

    def measure(self, cell: Cell) -> dict[str, Any]:
        part = self._run.part(cell.name)
        result: dict[str, Any] = part.remember("result", partial(self._measure, cell))
        part.forget_states()
        return result

    def _choose(
        self,
        cell: Cell,
        model: PreTrainedModel,
        projection: Projection,
        blocks: Tensor,
        teacher: Tensor | None,
    ) -> tuple[Selection, Cost]:
        """Return the selection of the cell's method, and its cost."""
        if cell.rewrites or cell.selection not in self._chosen:
            part = self._run.part(cell.selection)
            reset_peak_memory()
            _moved(model, self._places)
            with memory_mode(model, cell.config):
                selection = select(model, projection, blocks, cell.config, part.stage, teacher)
            self._chosen[cell.selection] = selection, part.remember("cost", partial(_cost, part))
        _moved(self._dense, "cpu")
        return self._chosen[cell.selection]

    def _teacher(
        self, config: PruneConfig, dense: PreTrainedModel, blocks: Tensor
    ) -> Tensor | None:
        """Return the `last_hidden` of the dense model on the blocks; only the last one is kept."""
        if not config.distils:
            return None
        key = config.seed, dense.dtype
        if self._taught is None or self._taught[0] != key:
            self._taught = key, last_hidden(_moved(dense, self._places), blocks)
        return self._taught[1]

    def _own_model(self, config: PruneConfig) -> PreTrainedModel:
        """A copy of the dense model in the cell's dtype; loaded again if it has another dtype.

        A sharded model is no copy, since its layers are cut one by one as they are written.
        """
        dtype = torch_dtype(config.dtype)
        if is_sharded(self._dense):
            return self._dense
        if self._dense.dtype == dtype:
            return move(copy.deepcopy(self._dense), self._places)
        return cast(load_dense(config, self._places)[0], dtype)

    def _measure(self, cell: Cell) -> dict[str, Any]:
        config, run, part = cell.config, self._run, self._run.part(cell.name)
        run.log(event="cell", name=cell.name)  # its seconds count from here
        blocks, projection = self._start.blocks(config), self._start.projection(config)
        model = self._own_model(config) if cell.rewrites else self._dense
        teacher = self._teacher(config, model, blocks)
        selection, choosing = self._choose(cell, model, projection, blocks, teacher)
        if not cell.rewrites:
            model = self._own_model(config)
        mask = projection.mask(selection.scores)
        chosen = Chosen(config, mask, selection.scales, blocks, teacher)
        reset_peak_memory()
        folder = run.checkpoint / "cell"
        pruned = make(model, chosen, self._start, part, folder, last=False)
        making = part.remember("cost", partial(_cost, part))
        record = pruned_record(config, self._start, mask, pruned, config.budget.asked)
        record = finish(config, pruned, record, self._start, self._perplexities, run, folder)
        tasks = self._score(str(folder))
        from_first(lambda: shutil.rmtree(run.checkpoint))
        perplexity, *others = [pruned for _, pruned in record.perplexities]
        values = " and ".join(f"{found['value']:.2f}" for found in (perplexity, *others))
        run.log(event="note", text=f"{cell.name}: perplexity {values}")
        return {
            "method": cell.method,
            "keep": config.budget.asked,
            "seed": config.seed,
            "kept": config.budget.cost(mask.pruned_space()) / config.budget.cost(mask.space),
            "parameters": record.params["total_after"],
            "perplexity": perplexity,
            "other_texts": others,
            "tasks": tasks,
            "choosing": choosing,
            "making": making,
            "mask_sha256": record.mask_sha256,
        }


def _moved(model: PreTrainedModel, places: Places) -> PreTrainedModel:
    """`move`, for a model that no rank holds in part."""
    return model if is_sharded(model) else move(model, places)


def _cost(part: Run) -> Cost:
    """Return seconds and peak memory of a part of the run that has just ended."""
    part.log(event="done", peak_memory=peak_memory())
    return {"seconds": part.seconds(), "peak_memory": peak_memory()}


def _shared(config: PruneConfig) -> dict[str, Any]:
    """Return the options that are the same for all cells."""
    shared = config.to_json()
    for own in ("method", "compensate", "seed"):
        del shared[own]
    del shared["budget"]["asked"]
    return shared


def _write(folder: Path, summary: dict[str, Any]) -> None:
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        (folder / "compare.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(page(summary), encoding="utf-8")
        figure(summary).savefig(folder / "compare.png", dpi=120)
