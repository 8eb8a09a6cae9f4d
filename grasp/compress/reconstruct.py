"""Block reconstruction: all weights of a pruned layer learn to give the dense hidden states.

Layers are fitted in depth order (see layer_fit.py), and each is cut and learns before the next is
fitted: its inputs are what the pruned layers before it give, its targets what the dense layer gives
on its own inputs. The gradient goes through the non-linearities of one decoder layer, the window
that A Free Lunch (arXiv 2510.14444) finds as good as retraining. AdamW's step is relative to the
weights of each tensor, so one rate suits models of any size. Text is read in one to three rounds,
the more the fewer. Held-out blocks are looked at after every round, and the best weights are kept.
Memory holds gradients and moments of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.compress.fold import fold_layer, fold_mask, kept_in
from grasp.compress.layer_fit import LayerFit, Streams
from grasp.compress.refit import columns_of
from grasp.config import block_rounds
from grasp.distributed import from_first, is_first, tensor_from_first
from grasp.gates.experts import closed_experts
from grasp.gates.fidelity import check_cut_layer
from grasp.gates.training import epoch_order, finite_mean
from grasp.journal import Journal
from grasp.model.layerwise import layer_options
from grasp.model.places import device_of
from grasp.model.units import LayerModules, LayerUnits

RATE = 2.5e-3  # the largest step, relative to the root mean square of a tensor
STEP_TOKENS = 1024
WARM_UP = 10  # steps


def reconstruct(
    model: PreTrainedModel, mask: Mask, blocks: Tensor, seed: int, journal: Journal
) -> None:
    """Fit, cut and train the layers of the dense `model` in place, to the units that `mask` keeps.

    blocks: int64 [samples, seq_len], of which every eighth is held out. The first rank does the
    work, and the others get its layers. A run that resumes from its journal goes on after the last
    layer saved, and ends where an uninterrupted one does, on a CPU bit for bit. Raises GraspError
    as `reconstruct_layer` does.
    """
    from_first(lambda: _reconstruct(model, mask, blocks, seed, journal))
    if not is_first():
        fold_mask(model, mask)
    for parameter in model.get_decoder().layers.parameters():
        tensor_from_first(parameter.data)


def _reconstruct(
    model: PreTrainedModel, mask: Mask, blocks: Tensor, seed: int, journal: Journal
) -> None:
    decoder, options = model.get_decoder().layers, layer_options(model, blocks[:1])
    streams, saved = Streams.of(model, blocks), journal.load_own() or {}
    if saved:
        streams.dense, streams.pruned = saved.pop("dense"), saved.pop("pruned")
    for index, cut in enumerate(kept_in(model, mask)):
        if _is_in(saved, index):
            fold_layer(*cut)
            _load(decoder[index], saved, index)
            continue
        before, after = reconstruct_layer(model, index, cut, options[index], streams, seed)
        mean = finite_mean([torch.tensor(after)], index + 1)
        journal.progress(index + 1, len(decoder), mean, blocks.numel(), fitted=before)
        journal.save(
            partial(_state, decoder[: index + 1], streams), final=index + 1 == len(decoder)
        )


def reconstruct_layer(
    model: PreTrainedModel,
    index: int,
    cut: tuple[LayerModules, LayerUnits, tuple[Tensor, Tensor], Tensor],
    options: dict[str, Any],
    streams: Streams,
    seed: int,
) -> tuple[float, float]:
    """Fit, cut and train one layer of `model` in place, and move `streams` behind it.

    `cut` is what `fold_layer` takes, `options` are the layer's keyword arguments. Returns the
    errors on held-out samples before and after training. Raises GraspError if activations are not
    finite, or if the cut layer computes something else than with its dropped units at zero.
    """
    layer, (modules, units, kept, experts) = model.get_decoder().layers[index], cut
    fit = streams.fit(layer, options, modules)
    with closed_experts(modules, experts):
        for linear, columns in columns_of(modules, units, kept).items():
            fit.keep(linear, columns)
        whole = fit.output(0)
    fold_layer(*cut)
    check_cut_layer(model, index, whole, fit.output(0))
    errors = _train(layer, fit, seed)
    fit.advance()
    return errors


def _train(layer: nn.Module, fit: LayerFit, seed: int) -> tuple[float, float]:
    """Train the layer in place, and return its errors on held-out samples, before and after.

    Weights learn in fp32, and are rounded to their own dtype at the end, in which the layer
    computes all along.
    """
    dtypes = {p: p.dtype for p in layer.parameters() if p.numel()}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    rates = [RATE * float(p.detach().square().mean().sqrt()) for p in dtypes]
    optimizer = torch.optim.AdamW(
        [{"params": [p]} for p in dtypes], betas=(0.9, 0.99), weight_decay=0.0
    )
    size = max(1, STEP_TOKENS // fit.pruned.shape[1])
    rounds = block_rounds(len(fit.fitted) * fit.pruned.shape[1])
    step, steps = 0, rounds * math.ceil(len(fit.fitted) / size)
    best, before = _copy(dtypes), _error(layer, fit)
    least = before
    for turn in range(rounds):
        for batch in epoch_order(len(fit.fitted), seed, turn).split(size):
            part = min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = part * rate
            with _as_run(layer, fit), torch.enable_grad():
                for sample in batch.tolist():
                    (fit.error(fit.fitted[sample]) / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        error = _error(layer, fit)
        if error < least:
            best, least = _copy(dtypes), error
    for parameter, own in dtypes.items():
        parameter.requires_grad_(False)
        parameter.data = best[parameter].to(own)
    return before, least


def _copy(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    return {parameter: parameter.detach().clone() for parameter in parameters}


def _as_run(layer: nn.Module, fit: LayerFit) -> torch.autocast:
    """A context in which fp32 weights are rounded as the layer is run.

    It remembers the rounded ones, so weights must not change inside.
    """
    device, dtype = device_of(layer), fit.pruned.dtype
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _error(layer: nn.Module, fit: LayerFit) -> float:
    """The mean over held-out samples."""
    with _as_run(layer, fit):
        return float(torch.stack([fit.error(sample) for sample in fit.held]).mean())


def _state(layers: Iterable[nn.Module], streams: Streams) -> dict[str, Tensor]:
    weights = {
        f"{index}.{name}": value
        for index, layer in enumerate(layers)
        for name, value in layer.named_parameters()
    }
    return {"dense": streams.dense, "pruned": streams.pruned, **weights}


def _is_in(state: dict[str, Tensor], index: int) -> bool:
    return any(name.startswith(f"{index}.") for name in state)


@torch.no_grad()
def _load(layer: nn.Module, state: dict[str, Tensor], index: int) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(state.pop(f"{index}.{name}"))
