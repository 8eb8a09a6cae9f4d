"""Block reconstruction: the kept weights of each layer learn what the dense layer computes.

A layer's inputs are those that the pruned layers before it give. Its targets are the dense model's
hidden states after that layer, so that a layer also makes up for errors of the layers before it.
All of its weights move by Adam, through its non-linearities, from where refit left them. A layer
keeps what it learned only if that is better on blocks held out from the text. Layers go in depth
order, one in memory at a time. The result has no more parameters.

Source: A Free Lunch (arXiv 2510.14444), which finds that reconstructing what holds a non-linearity
beats least squares on single matrices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import GraspError
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, layer_options, runner

HELD_OUT = 16  # every so many blocks, one is held out
WARM_UP = 10  # steps
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class BlockSettings:
    """How a layer learns; `lr` is Adam's, which falls to 0 along a half cosine."""

    epochs: int = 3
    batch_size: int = 4
    lr: float = 3e-4
    seed: int = 0


def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    blocks: Tensor,
    settings: BlockSettings,
    stage: Callable[[str], Journal],
) -> list[Weights]:
    """Train the layers of `model`, which is cut, in place; returns their weights, fp32 on the CPU.

    `dense` is the model before pruning, on any device; blocks: int64 [samples, seq_len].
    `stage(name)` returns a layer's journal: a run that resumes goes on with the first layer that is
    not done. Raises GraspError if a loss is not finite.
    """
    layers, options = model.get_decoder().layers, layer_options(model, blocks[:1])
    dense_options = layer_options(dense, blocks[:1])
    inputs, states = first_hidden(model, blocks), first_hidden(dense, blocks).to(model.device)
    found: list[Weights] = []
    for index, (layer, taught) in enumerate(zip(layers, dense.get_decoder().layers, strict=True)):
        _pass(runner(taught.to(model.device), _to(dense_options[index], model.device)), states)
        if dense.device != model.device:
            taught.to(dense.device)
        journal = stage(f"block {index}")
        weights = journal.load()
        if weights is None:
            task = _Task(layer, options[index], inputs, states, settings.seed + index)
            weights = task.learn(settings, journal)
            journal.save(partial(_same, weights), final=True)
        layer.load_state_dict(weights)
        found.append(weights)
        _pass(runner(layer, options[index]), inputs)
    return found


@torch.no_grad()
def _pass(run: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    """Replace hidden states [samples, seq_len, hidden] by what a layer makes of them, in place."""
    for x in hidden.split(1):
        x.copy_(run(x))


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in keyword arguments of a layer, on a device."""
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _same(weights: Weights) -> Weights:
    return weights


class _Task:
    """A layer, its inputs and the outputs that it should give, [samples, seq_len, hidden]."""

    def __init__(
        self, layer: nn.Module, options: dict[str, Any], inputs: Tensor, targets: Tensor, seed: int
    ) -> None:
        self._student = copy.deepcopy(layer).float().requires_grad_()
        self._run = runner(self._student, options)
        self._inputs, self._targets, self._seed = inputs, targets, seed
        samples = torch.arange(len(inputs))
        self._held_out = samples[::HELD_OUT]
        self._others = samples[samples % HELD_OUT != 0] if len(inputs) > 1 else samples
        change = _squares(targets - inputs)
        self._floor = change.flatten()[:: max(1, change.numel() // 2**16)].median()

    def learn(self, settings: BlockSettings, journal: Journal) -> Weights:
        """The weights of the better of the layer as it came and the layer as trained."""
        before = self._weights()
        first = self._held_out_loss()
        optimizer = torch.optim.AdamW(
            self._student.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        batches = list(self._batches(settings))
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _rate(step, len(batches))
            optimizer.zero_grad()
            self._loss(rows).backward()
            optimizer.step()
        last = self._held_out_loss()
        if not math.isfinite(last):
            raise GraspError(f"a layer's error is {last}: use `dtype='fp32'` or `compensate='refit'`")
        journal.progress(len(batches), len(batches), last, 0, before=first)
        return self._weights() if last < first else before

    def _batches(self, settings: BlockSettings) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(settings.epochs):
            order = torch.randperm(len(self._others), generator=generator)
            yield from self._others[order].split(settings.batch_size)

    def _loss(self, rows: Tensor) -> Tensor:
        """Mean squared error relative to what the layer changes, per token.

        Where a layer changes little, the median over tokens is the measure. So tokens of massive
        activations do not decide alone.
        """
        x, y = self._inputs[rows], self._targets[rows]
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            out = self._run(x)
        return (_squares(out - y) / (_squares(y - x) + self._floor)).mean()

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        losses = [self._loss(rows) * len(rows) for rows in self._held_out.split(4)]
        return float(torch.stack(losses).sum() / len(self._held_out))

    def _weights(self) -> Weights:
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in self._student.state_dict().items()
        }


def _squares(x: Tensor) -> Tensor:
    return x.float().square().sum(-1)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
