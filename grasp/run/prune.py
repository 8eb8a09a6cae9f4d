"""`grasp prune` from end to end: a model and a text in, a smaller dense checkpoint out."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from grasp import __version__, criteria
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.checkpoint.record import Record
from grasp.checkpoint.save import Saved, record_of, save_checkpoint, try_saving
from grasp.checkpoint.verify import check_saved
from grasp.compress.biases import mean_biases
from grasp.compress.calibrate import learn_scales
from grasp.compress.edit import Bias, Cut, Edit, Layers, Refit, Scale
from grasp.compress.fold import check_fold
from grasp.compress.reconstruct import reconstruct
from grasp.compress.refit import refit
from grasp.config import PruneConfig, RunConfig, window
from grasp.data.corpus import Corpus, read_corpus
from grasp.data.mixture import Mixture, read_mixture
from grasp.data.sampling import sample_corpus
from grasp.distributed import check_same, from_first, ranks
from grasp.errors import GraspError
from grasp.evaluate.perplexity import perplexity
from grasp.gates.fidelity import (
    check_cut,
    check_gates,
    check_layers,
    gated_passes,
)
from grasp.gates.memory import memory_mode
from grasp.gates.objective import last_hidden
from grasp.gates.training import TrainSettings
from grasp.machine import disk_errors, free_memory, memory_errors
from grasp.model.header import of_model, read_header
from grasp.model.load import (
    ShardMode,
    cast,
    check_launched,
    environment,
    load_model,
    longest,
    move,
    pick_device,
    pick_dtype,
    torch_dtype,
    widened,
)
from grasp.model.places import Places, places_of
from grasp.model.sharding import free, is_sharded, own_part
from grasp.model.source import read_json
from grasp.model.stored import INDEX
from grasp.model.units import UnitSpace
from grasp.planning.check import check_fit
from grasp.planning.layouts import least
from grasp.planning.ranks import over_layers
from grasp.report.results import add_reports
from grasp.run.by_layer import add_record, write_pruned
from grasp.run.chosen import Chosen
from grasp.run.folder import Result, Run, Show, open_run
from grasp.run.ready import ready
from grasp.select import select


@dataclass(frozen=True)
class PruneResult(Result):
    """The result of `prune`."""

    mask: Mask


@overload
def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: Sequence[float],
    show: Show = ...,
    **options: Any,
) -> list[PruneResult]: ...
@overload
def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: float | None = ...,
    show: Show = ...,
    **options: Any,
) -> PruneResult: ...
def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: float | Sequence[float] | None = None,
    show: Show = lambda record: None,
    **options: Any,
) -> PruneResult | list[PruneResult]:
    """Prune `model` to a budget: write a smaller dense checkpoint to `out`, complete or absent.

    `keep` (default 0.5), `params` or `kv_cache` is the budget (see `Budget`); `options` are these,
    the budget's multiples and layout, the other fields of `PruneConfig`, and `as_published`, which
    sets those that the paper sets. Interrupted at any moment, the same call resumes and ends in the
    same mask. `show` receives each log record.

    Several budgets as `keep` give a list of results, out/keep-0.8 and so on, in the order given,
    from one selection: units are scored once, learned gates under the smallest budget, and the
    scores are projected to each, as are scales that learned along with gates; compensation, scales
    after the mask and evaluation are each budget's own. A GPU holds one model at a time, the host's
    memory another. Raises GraspError.
    """
    configs = [on_device(config) for config in ready(model, out, keep, **options)]
    config = min(configs, key=lambda config: config.budget.asked)
    if not isinstance(keep, Iterable):
        with open_job(config, out, config.to_json(), show) as run:
            return _prune(config, {"": config.budget}, run)[0]
    if criteria.get(config.method).updates_weights:
        raise GraspError(f"{config.method} fits weights to one budget: give one number as `keep`")
    budgets = {f"keep-{config.budget.asked}": config.budget for config in configs}
    asked = [budget.asked for budget in budgets.values()]
    with open_job(config, out, {**config.to_json(), "keep": asked}, show) as run:
        return _prune(config, budgets, run)


def on_device(config: PruneConfig) -> PruneConfig:
    """Return the config with `auto` device and dtype resolved. Raises GraspError."""
    device = pick_device(config.device)
    if criteria.get(config.method).learns or config.scale_epochs:
        _check_step(config)
    check_launched(config.shard)
    return replace(config, device=device, dtype=pick_dtype(config.dtype, device))


def _check_step(config: PruneConfig) -> None:
    """Refuse steps with fewer blocks than ranks: the options alone say how many a step has."""
    blocks, of = config.batch_size * config.accumulate, ranks()
    if blocks < of:
        raise GraspError(
            f"a step of {blocks} blocks (`batch_size` times `accumulate`) leaves some of the {of} "
            f"ranks without work: use `accumulate={math.ceil(of / config.batch_size)}`"
        )


@contextmanager
def open_job(
    config: PruneConfig, out: str | os.PathLike[str], asked: dict[str, Any], show: Show
) -> Iterator[Run]:
    """Open the run; if memory runs out, raise a one-line error that names the fix."""
    fix = (
        f"lower `batch_size` (now {config.batch_size}) or `seq_len` (now {config.seq_len}), or use "
        f"`dtype='bf16'`; other options need a new start: remove {out}.run"
    )
    with memory_errors(config.device, fix), open_run(Path(out), asked, show) as run:
        yield run


def _prune(config: PruneConfig, budgets: dict[str, Budget], run: Run) -> list[PruneResult]:
    """Select once, by `config`, and make a checkpoint for each of `budgets`.

    The keys of `budgets` are the names of the folders in `out`; "" means `out` itself.
    """
    model, start = begin(config, run)
    for budget in budgets.values():
        check_budget(replace(config, budget=budget), model)
    check_fidelity([config], model, start, run)
    dense = measure_dense(model, start, run)
    cast(model, torch_dtype(config.dtype))
    blocks = start.blocks(config)
    with memory_mode(model, config) as mode:
        if config.memory == "auto" and mode != "fast":
            run.log(event="note", text=f"`memory={mode!r}`, for what is free on {config.device}")
        teacher = last_hidden(model, blocks) if config.distils else None
        projection = start.projection(config)
        selection = select(model, projection, blocks, config, run.stage, teacher)
    places = places_of(model)
    copied = "" not in budgets and not is_sharded(model)
    if copied:
        move(model, "cpu")  # the device holds the copy that is pruned
    results = []
    for name, budget in budgets.items():
        own = replace(config, budget=budget)
        mask = start.projection(own).mask(selection.scores)
        check_same("the mask", mask.digest())
        folder = run.finished(name) if name else run.checkpoint
        if not from_first(folder.exists):
            part = run.part(name) if name else run
            chosen = Chosen(own, mask, selection.scales, blocks, teacher)
            last = budget is [*budgets.values()][-1]
            source = move(copy.deepcopy(model), places) if copied else model
            pruned = make(source, chosen, start, part, run.checkpoint, last=last)
            record = pruned_record(own, start, mask, pruned, config.budget.asked)
            record = finish(own, pruned, record, start, dense, part, run.checkpoint)
            record = record.measured(seconds=run.seconds())
            from_first(partial(_write, run.checkpoint, record, part))
            part.log(event="finished", folder=str(run.out / name), **record.results)
            if name:
                run.finish(name)
                part.forget_states()
        results.append(PruneResult(run.out / name, Record.read(folder), mask))
    run.publish()
    return results


def _write(folder: Path, record: Record, part: Run) -> None:
    with disk_errors(folder):
        record.write(folder)
    add_reports(folder, record, part.records())


@dataclass(frozen=True)
class Start:
    """Inputs that all results of a run share."""

    space: UnitSpace
    tokenizer: Any
    stored_dtype: torch.dtype
    calibration: Mixture
    evaluation_sets: tuple[EvaluationSet, ...]  # empty if no text is left

    def blocks(self, config: RunConfig) -> Tensor:
        """Return the calibration blocks that `config.seed` draws: int64 [samples, seq_len]."""
        return self.calibration.blocks(seq_len=config.seq_len, seed=config.seed)

    def projection(self, config: PruneConfig) -> Projection:
        return Projection(self.space, config.budget, seed=config.seed, device=config.device)


def begin(config: PruneConfig, run: Run) -> tuple[PreTrainedModel, Start]:
    """Load the model as stored, and the texts; refuse here what must fail after the long work."""
    model, tokenizer = load_dense(config, where(config, run))
    check_budget(config, model)
    if is_sharded(model) and torch_dtype(config.dtype) != model.dtype:
        raise GraspError(
            f"`shard` keeps weights as they are stored, in {model.dtype}, and `dtype` is "
            f"{config.dtype}: give the stored one, or `shard='none'`"
        )
    space = UnitSpace.of(model)
    uniform = config.budget.for_space(space).layout == "uniform"
    result = least(space, config.budget, first_only=not uniform)
    try_saving(model, tokenizer, run.checkpoint, result)
    return model, read_texts(config, model, tokenizer, run)


def check_budget(config: PruneConfig, model: PreTrainedModel) -> None:
    """Refuse a budget that the loaded model cannot meet, and a dtype too narrow for the method."""
    check_fit(config, of_model(model))  # for GGUF and remote code, the live model says more
    working = torch_dtype(config.dtype)
    updates = criteria.get(config.method).updates_weights
    if updates and torch.promote_types(working, model.dtype) != working:
        raise GraspError(
            f"{config.method} updates weights, which {config.dtype} would round: use `dtype='fp32'`"
        )


def where(config: PruneConfig, run: Run) -> Places:
    """Where the model goes: over all GPUs if "cuda" means one process and a GPU too small for it.

    Raises GraspError if they are too small together.
    """
    if config.device != "cuda" or ranks() > 1:
        return config.device
    own, count = torch.cuda.current_device(), torch.cuda.device_count()
    gpus = [f"cuda:{(own + other) % count}" for other in range(count)]
    width = torch_dtype(config.dtype).itemsize
    found = over_layers(read_header(config.model), config, width, gpus, free_memory)
    if found is None:
        return config.device
    places, note = found
    run.log(event="note", text=note)
    return places


def load_dense(config: RunConfig, places: Places | None = None) -> tuple[PreTrainedModel, Any]:
    """Load the model as stored, and its tokenizer. Raises GraspError if it cannot be pruned."""
    model, tokenizer = load_model(
        config.model,
        dtype=None,
        device=places or config.device,
        trust_remote_code=config.trust_remote_code,
        shard=getattr(config, "shard", "none"),
    )
    UnitSpace.of(model)
    _check_weights(config, model)
    return model, tokenizer


def read_texts(config: RunConfig, model: PreTrainedModel, tokenizer: Any, run: Run) -> Start:
    """Read or sample the calibration text, and read the evaluation texts."""
    eval_texts = [
        read_corpus(text, tokenizer, text_field=config.text_field, split="test")
        for text in config.eval_text
    ]
    calibration = read_mixture(
        config.calibration,
        tokenizer,
        samples=config.samples,
        text_field=config.text_field,
        sample=partial(_own_text, config, model, tokenizer, run),
    )
    notes = [*calibration.notes, *(note for text in eval_texts for note in text.notes)]
    learned_from = {corpus.sha256 for corpus in calibration.corpora}
    notes += [
        f"{text.name} is calibrated on, too: its perplexity says little about new text"
        for text in eval_texts
        if text.sha256 in learned_from
    ]
    for note in dict.fromkeys(notes):
        run.log(event="note", text=note)
    sets = _evaluation_sets(config, eval_texts, calibration, longest(model))
    start = Start(UnitSpace.of(model), tokenizer, model.dtype, calibration, sets)
    start.blocks(config)
    return start


def check_fidelity(
    configs: Sequence[PruneConfig], model: PreTrainedModel, start: Start, run: Run
) -> None:
    """Refuse a model whose outputs change under gates, in a cut, or when its layers run one by one.

    The check runs in the dtype in which gates learn, or in the stored dtype if that is wider.
    """
    config, ids = configs[0], start.blocks(configs[0])[:1]
    stored, working = model.dtype, torch_dtype(config.dtype)
    with widened(model, working if torch.promote_types(stored, working) == working else stored):
        found = {"gates": check_gates(model, config.scales, config.gate_site, ids)}
        if not is_sharded(model):  # a layer in shards cannot be copied
            a_cut = Mask.first(start.space, least(start.space, config.budget, first_only=True))
            found["fold"] = check_fold(model, a_cut, ids)
        if needed_by := next(filter(None, map(_runs_layers, configs)), None):
            found["layers"] = check_layers(model, ids, *needed_by)
        run.log(event="fidelity", **found)


def _runs_layers(config: PruneConfig) -> tuple[str, str] | None:
    """The option, if any, that runs layers one by one, and what to use where they cannot."""
    if criteria.get(config.method).layerwise:
        return f"`method='{config.method}'`", ": use another `method`"
    if config.compensation in ("refit", "blocks"):
        return f"`compensate='{config.compensation}'`", ": use `compensate='none'`"
    return None


def measure_dense(model: PreTrainedModel, start: Start, run: Run) -> list[dict[str, Any]]:
    """Bind the run to its inputs, and return the dense model's perplexity on each text."""
    if not start.evaluation_sets:
        run.log(event="note", text="no text is left to evaluate on: give `eval_text`")
    run.same_inputs(inputs_of(start, model))
    return measure_once(start, model, "dense", run)


def measure_once(
    start: Start, model: PreTrainedModel, which: str, run: Run
) -> list[dict[str, Any]]:
    """Return the perplexity on each text, measured once per run."""
    found: list[dict[str, Any]] = run.remember(
        which, partial(_measure, start.evaluation_sets, model, which, run)
    )
    return found


def make(
    model: PreTrainedModel, chosen: Chosen, start: Start, run: Run, folder: Path, *, last: bool
) -> PreTrainedModel:
    """The pruned model, as `apply_mask` gives it.

    If `model` is sharded, by `write_pruned`, which writes the weights into the new `folder`.
    """
    if is_sharded(model):
        return write_pruned(model, chosen, start.tokenizer, run, folder, last=last)
    return apply_mask(model, chosen, start.stored_dtype, run)


def apply_mask(
    model: PreTrainedModel, chosen: Chosen, stored_dtype: torch.dtype, run: Run
) -> PreTrainedModel:
    """Scale, compensate, cut and calibrate; return the pruned model in `stored_dtype`.

    `model` cannot be used afterwards.
    """
    config, mask, blocks = chosen.config, chosen.mask, chosen.blocks
    edits: list[Edit] = []

    def edit(found: Edit) -> None:
        found.apply(model)
        edits.append(found)

    if chosen.scales is not None and config.compensation != "blocks":
        edit(Scale(config.scales, chosen.scales))
    compensation: list[Edit] = []
    if config.compensation == "bias":
        compensation = [Bias(mean_biases(model, mask, blocks, run.stage("bias")))]
    elif config.compensation == "refit":
        columns = refit(model, mask, blocks, run.steps_of("refit"))
        compensation = [Refit(columns)]
    if config.compensation == "blocks":  # from the dense weights: scales learn anew after it
        reconstruct(model, mask, blocks, config.seed, run.stage("blocks"))
        edits.append(Cut(mask))
    else:
        gated = gated_passes(model, mask, blocks)
        edit(Cut(mask))
        run.log(event="fidelity", cut=check_cut(model, gated, blocks))
    for found in compensation:
        edit(found)
    last: list[Edit] = []
    if config.scale_epochs:
        settings = TrainSettings.of(config, config.scale_epochs)
        with memory_mode(model, config):
            scales = learn_scales(
                model, config.scales, blocks, settings, run.stage("calibrate"), chosen.teacher
            )
        last = [Scale(config.scales, scales)]
    if torch.promote_types(model.dtype, stored_dtype) != model.dtype:
        # the working dtype has rounded the weights: apply all edits again, to the stored ones
        places = places_of(model)
        if config.compensation == "blocks":
            edits.append(Layers.of(model))
        _release(model)
        model = load_dense(config, places)[0]
        last = [*edits, *last]
    for found in last:
        found.apply(model)
    return cast(model, stored_dtype)


def finish(
    config: RunConfig,
    model: PreTrainedModel,
    record: Record,
    start: Start,
    dense: list[dict[str, Any]],
    run: Run,
    folder: Path,
) -> Record:
    """Check and measure the checkpoint of the pruned `model`, as it is read back from `folder`.

    With `config.shard`, it has been written there; else it is saved now. Returns the record with
    the results, beside those of `dense`. `model` cannot be used afterwards. Raises GraspError if
    `grasp verify` would fail.
    """
    shard: ShardMode = getattr(config, "shard", "none")
    if shard == "none":
        saved, record, reread = _save(model, record, start, run, folder)
    else:
        reread, tokenizer = load_model(folder, dtype=None, device=config.device, shard=shard)
        record = add_record(folder, reread, tokenizer, record)
        check_saved(folder, reread, tokenizer)  # on all ranks, whose layers it runs
        weight_bytes = read_json(folder / INDEX)["metadata"]["total_size"]
        saved = Saved(type(model).__name__, weight_bytes, None)
    pruned = _measure(start.evaluation_sets, reread, "pruned", run)
    if is_sharded(reread):
        free(reread)
    return record.measured(**asdict(saved)).evaluated(dense, pruned)


def _save(
    model: PreTrainedModel, record: Record, start: Start, run: Run, folder: Path
) -> tuple[Saved, Record, PreTrainedModel]:
    """Save `model` in the new `folder`, where its record is, and check what is read back."""
    places = places_of(model)

    def save() -> tuple[Saved, Record]:
        folder.mkdir(parents=True)
        return save_checkpoint(model, start.tokenizer, folder, record)

    saved, record = from_first(save)
    if saved.note:
        run.log(event="note", text=saved.note)
    _release(model)
    reread, tokenizer = load_model(folder, dtype=None, device=places)
    from_first(lambda: check_saved(folder, reread, tokenizer))
    return saved, record, reread


def _release(model: PreTrainedModel) -> None:
    """Free a model's memory for the next model, even if references to it remain."""
    move(model, "meta")


def pruned_record(
    config: PruneConfig, start: Start, mask: Mask, model: PreTrainedModel, chosen_for: float
) -> Record:
    """Build the record of the pruned `model`, without results."""
    budget = config.budget
    obtained = {
        "kind": budget.kind,
        "asked": budget.asked,
        "limit": budget.limit(mask.space),
        "obtained": budget.cost(mask.pruned_space()),
        "of": budget.cost(mask.space),
        "chosen_for": chosen_for,
    }
    return run_record(config, start, mask, model, budget=obtained)


def run_record(
    config: RunConfig,
    start: Start,
    mask: Mask,
    model: PreTrainedModel,
    **more: Any,
) -> Record:
    """Build the record of a run: `record_of` with its options and its calibration text."""
    return record_of(
        mask,
        model,
        name=config.model,
        seed=config.seed,
        recipe=config.to_json(),
        calibration=start.calibration.to_json(),
        **more,
    )


def _check_weights(config: RunConfig, model: PreTrainedModel) -> None:
    """Check the weights and the family of the loaded model, which its config cannot show."""
    for name, weight in model.named_parameters():
        if not own_part(weight).isfinite().all():
            raise GraspError(
                f"{config.model} is damaged: {name} holds NaN or infinite values: download it again"
            )
    family = model.config.model_type.removeprefix("grasp_")
    if family not in CONFIG_MAPPING:
        raise GraspError(f"{family} is not in this transformers: its result could not be saved")


def _own_text(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    run: Run,
    samples: int,
) -> Corpus:
    """Text of the model's own, sampled once per run."""
    done = run.stage("self").load()
    if done is None:
        corpus = sample_corpus(
            model,
            tokenizer,
            samples=samples,
            seq_len=config.seq_len,
            seed=config.seed,
            progress=run.steps_of("self"),
        )
        run.stage("self").save(lambda: {"ids": corpus.ids}, final=True)
        return corpus
    return Corpus.of_ids("self", done["ids"])


@dataclass(frozen=True)
class EvaluationSet:
    """A text and the settings with which both models are measured."""

    text: Corpus
    seq_len: int
    windows: int | None


def _evaluation_sets(
    config: RunConfig,
    eval_texts: Sequence[Corpus],
    calibration: Mixture,
    longest: int,
) -> tuple[EvaluationSet, ...]:
    """Use `eval_texts`, or text held out from calibration; empty if there is neither."""
    texts = eval_texts
    if not texts and (rest := calibration.held_out(seq_len=config.seq_len)):
        texts = [rest]
    length = window(config, longest)
    return tuple(EvaluationSet(text, length, config.eval_windows) for text in texts)


def inputs_of(start: Start, *models: PreTrainedModel) -> dict[str, Any]:
    """Return what determines the result besides the options: texts, weights, software, threads."""
    device = models[0].device
    software = environment(device)
    if device.type != "cpu":
        del software["threads"]  # they do not matter on a GPU
    weights = sha256()
    for parameter in chain.from_iterable(model.parameters() for model in models):
        first = own_part(parameter).flatten()[:64].to("cpu", torch.float32, copy=True)
        weights.update(first.numpy().tobytes())  # of a copy: numpy pins the storage that it sees
    return {
        "calibration text": start.calibration.sha256,
        "evaluation texts": [own.text.sha256 for own in start.evaluation_sets],
        "weights": from_first(weights.hexdigest),  # whose rows are the first, if any
        "grasp": __version__,
        **software,
    }


def _measure(
    sets: Sequence[EvaluationSet], model: PreTrainedModel, which: str, run: Run
) -> list[dict[str, Any]]:
    """Return the perplexity on each text."""
    found = []
    for own in sets:
        stage = f"evaluate {which}" + f", {own.text.name}" * (len(sets) > 1)
        measured = perplexity(
            model,
            own.text,
            seq_len=own.seq_len,
            windows=own.windows,
            progress=run.steps_of(stage),
        )
        found.append(measured.to_json())
    return found
