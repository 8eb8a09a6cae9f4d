"""After the mask, for a model that no rank holds whole: one decoder layer at a time.

A layer is gathered on all ranks, scaled, refitted and cut there, or reconstructed on the first, and
written by the first. The cut model is then read again in shards, its scales learn, and a second
pass multiplies them in.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.checkpoint.probe import Probe
from grasp.checkpoint.record import Record
from grasp.checkpoint.save import seal, write_pretrained
from grasp.checkpoint.shards import ShardWriter
from grasp.compress.calibrate import learn_scales
from grasp.compress.edit import Cut, Edit, Refit, Scale
from grasp.compress.fold import kept_in
from grasp.compress.layer_fit import Streams
from grasp.compress.reconstruct import reconstruct_layer
from grasp.compress.refit import Hidden, refit_layer, text_of_refit
from grasp.config import ScaleKind
from grasp.distributed import after_first, from_first, is_first
from grasp.gates.memory import memory_mode
from grasp.gates.scales import scale_count
from grasp.gates.training import TrainSettings, finite_mean
from grasp.machine import disk_errors
from grasp.model.classes import without_weights
from grasp.model.layerwise import layer_options, runner
from grasp.model.load import cast, environment, load_model
from grasp.model.sharding import free, one_layer, whole
from grasp.model.units import UnitSpace, decoder_layers, layers_name
from grasp.run.chosen import Chosen
from grasp.run.folder import Run


def write_pruned(
    model: PreTrainedModel, chosen: Chosen, tokenizer: Any, run: Run, folder: Path, *, last: bool
) -> PreTrainedModel:
    """Write the pruned checkpoint into the new `folder`, without grasp.json.

    `model` is sharded, and cannot be used afterwards if this is the `last` of its checkpoints.
    Returns the model of the checkpoint without weights, as the class that loads it. Raises
    GraspError.
    """
    config = chosen.config
    target, note = without_weights(model, chosen.mask.pruned_space())
    cast(target, model.dtype)  # which config.json names
    if note:
        run.log(event="note", text=note)
    layers = _cut_layers(model, chosen, run)
    cut = folder / "cut" if config.scale_epochs else folder
    write_layers(cut, model, target, tokenizer, layers)
    if last:
        free(model)
    if config.scale_epochs:
        pruned = load_model(cut, dtype=None, device=config.device, shard=config.shard)[0]
        settings = TrainSettings.of(config, config.scale_epochs)
        with memory_mode(pruned, config):
            journal = run.stage("calibrate")
            learned = learn_scales(
                pruned, config.scales, chosen.blocks, settings, journal, chosen.teacher
            )
        layers = _scaled_layers(pruned, config.scales, learned)
        write_layers(folder, pruned, target, tokenizer, layers)
        free(pruned)
        from_first(lambda: shutil.rmtree(cut))
    return target


def add_record(folder: Path, model: PreTrainedModel, tokenizer: Any, record: Record) -> Record:
    """Write the probe of the model read back from `folder`, and grasp.json with the hashes."""
    probe = Probe.of(model, tokenizer, environment(model.device), record.seed)

    def write() -> Record:
        with disk_errors(folder):
            return seal(folder, probe, record)

    return from_first(write)


def _cut_layers(model: PreTrainedModel, chosen: Chosen, run: Run) -> Iterator[nn.Module]:
    """Each layer, cut, and changed as the rest of the recipe says."""
    if chosen.config.compensation == "blocks":
        return _reconstructed_layers(model, chosen, run)
    return _refitted_layers(model, chosen, run)


def _reconstructed_layers(model: PreTrainedModel, chosen: Chosen, run: Run) -> Iterator[nn.Module]:
    """Each layer, reconstructed from its dense weights, which only the first rank does."""
    blocks, journal = chosen.blocks, run.stage("blocks")
    options, streams = layer_options(model, blocks[:1]), Streams.of(model, blocks)
    for index in range(len(options)):
        after_first()  # waits longer than the gathering of a layer may
        one = one_layer(model, index)
        if is_first():
            (cut,) = kept_in(one, _of_layer(chosen.mask, index, one))
            before, after = reconstruct_layer(
                one, 0, cut, options[index], streams, chosen.config.seed
            )
            mean = finite_mean([torch.tensor(after)], index + 1)
            journal.progress(index + 1, len(options), mean, blocks.numel(), fitted=before)
        yield one.get_decoder().layers[0]


def _refitted_layers(model: PreTrainedModel, chosen: Chosen, run: Run) -> Iterator[nn.Module]:
    """Each layer, scaled, refitted and cut."""
    config, mask, blocks = chosen.config, chosen.mask, chosen.blocks
    if config.compensation == "refit":
        options = layer_options(model, blocks[:1])
        hidden = Hidden.of(model, text_of_refit(mask, blocks))
    for index, (one, own) in enumerate(_with_scales(model, config.scales, chosen.scales)):
        if own is not None:
            Scale(config.scales, own).apply(one)
        part = _of_layer(mask, index, one)
        edits: list[Edit] = [Cut(part)]
        if config.compensation == "refit":
            (layer,) = one.get_decoder().layers
            (modules,) = decoder_layers(one)
            run_layer = runner(layer, options[index])
            columns = refit_layer(
                run_layer, modules, part.space.layers[0], part.layers()[0], hidden
            )
            edits.append(Refit(columns))
            run.log(stage="refit", step=index + 1, steps=len(options))
        for edit in edits:
            edit.apply(one)
        yield one.get_decoder().layers[0]


def _of_layer(mask: Mask, index: int, one: PreTrainedModel) -> Mask:
    """The mask of a layer that is a model of its own."""
    _, ffn, kv = [*mask.space.segments()][index]
    return Mask(UnitSpace.of(one), mask.keep[ffn.start : kv.stop])


def _scaled_layers(model: PreTrainedModel, kind: ScaleKind, scales: Tensor) -> Iterator[nn.Module]:
    for one, own in _with_scales(model, kind, scales):
        assert own is not None
        Scale(kind, own).apply(one)
        yield one.get_decoder().layers[0]


def _with_scales(
    model: PreTrainedModel, kind: ScaleKind, scales: Tensor | None
) -> Iterator[tuple[PreTrainedModel, Tensor | None]]:
    """Each layer as a model of one layer, with its part of the scales in the order of `Scales`."""
    units = UnitSpace.of(model).size
    done_units, done = 0, units
    for index in range(len(model.get_decoder().layers)):
        one = one_layer(model, index)
        if scales is None:
            yield one, None
            continue
        own = UnitSpace.of(one).size
        more = scale_count(one, kind) - own
        yield one, torch.cat([scales[done_units : done_units + own], scales[done : done + more]])
        done_units, done = done_units + own, done + more


def write_layers(
    folder: Path,
    model: PreTrainedModel,
    target: PreTrainedModel,
    tokenizer: Any,
    layers: Iterator[nn.Module],
) -> None:
    """Write `layers`, and what `model` has beside its layers, as a checkpoint of `target`."""
    from_first(partial(_write_configs, folder, target, tokenizer))
    writer = ShardWriter(folder)
    prefix = layers_name(target)
    for index, layer in enumerate(layers):  # all ranks gather, the first writes
        if is_first():
            writer.add({f"{prefix}.{index}.{k}": v for k, v in layer.state_dict().items()})

    for name, parameter in model.named_parameters():
        if not name.startswith(f"{prefix}."):
            value = whole(parameter)
            if is_first():
                writer.add({name: value})
    from_first(writer.close)


def _write_configs(folder: Path, target: PreTrainedModel, tokenizer: Any) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_pretrained(target, tokenizer, folder, state_dict={})
        for empty in folder.glob("*.safetensors"):
            empty.unlink()
