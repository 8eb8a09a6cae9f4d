"""Means and variances of the inputs or outputs of linear layers on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.distributed import in_order
from grasp.gates.objective import next_token_loss
from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.places import device_of, joined
from grasp.model.units import UnitSpace, decoder_layers

Tap = tuple[nn.Linear, Literal["input", "output"]]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel over all tokens, fp32 [channels]."""

    mean: Tensor
    var: Tensor

    @property
    def second(self) -> Tensor:
        """E[x^2]."""
        return self.var + self.mean**2


@torch.no_grad()
def channel_moments(
    model: PreTrainedModel, taps: Sequence[Tap], blocks: Tensor, journal: Journal
) -> list[Moments]:
    """Moments of the input or output of each tapped linear; blocks: int64 [samples, seq_len].

    Blocks run one at a time; their means and variances are merged in fp32. Sums of squares would
    lose digits for a channel whose mean is far from 0. Resumes from its journal, bit for bit.
    Raises GraspError if the loss is not finite.
    """
    seen: dict[int, tuple[Tensor, ...]] = {}

    def see(place: int, side: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            values = args[0] if side == "input" else output
            seen[place] = torch.var_mean(values.flatten(0, -2).float(), 0, correction=0)

        return hook

    sizes = [linear.weight.shape[side == "input"] for linear, side in taps]
    mean, var = torch.zeros(2, sum(sizes), device=model.device)
    done = journal.load()
    start = 0
    if done is not None:
        mean, var = done["mean"].to(mean.device), done["var"].to(var.device)
        start = int(done["step"])
    with ExitStack() as hooks:
        for place, (linear, side) in enumerate(taps):
            hooks.enter_context(linear.register_forward_hook(see(place, side)))

        def of_block(block: Tensor) -> Tensor:  # variances, means, the loss
            loss = next_token_loss(model, block[None].to(model.device))
            parts = zip(*(seen[place] for place in range(len(taps))), strict=True)
            return joined([mean[:0], *(part for kind in parts for part in kind), loss[None]])

        for step, found in enumerate(in_order(of_block, blocks[start:]), start + 1):
            block_var, block_mean, losses = found.split([len(var), len(mean), 1])
            loss = finite_mean([losses[0]], step)
            delta = block_mean - mean
            var = var + (block_var - var) / step + delta**2 * (step - 1) / step**2
            mean = mean + delta / step
            journal.progress(step, len(blocks), loss, blocks.shape[1])
            state = {"mean": mean, "var": var, "step": torch.tensor(step)}
            journal.save(state.copy, final=step == len(blocks))
    found_of = zip(taps, mean.split(sizes), var.split(sizes), strict=True)
    return [Moments(*(x.to(device_of(tap[0])) for x in pair)) for tap, *pair in found_of]


def column_moments(
    model: PreTrainedModel, space: UnitSpace, blocks: Tensor, journal: Journal
) -> list[tuple[Tensor, Moments, int]]:
    """(weight, moments of its input, units) of each down_proj and o_proj, in UnitSpace order.

    A unit's columns are adjacent: `columns.view(units, -1)` has one row per unit.
    """
    linears = [linear for modules in decoder_layers(model) for linear in modules.outputs]
    units = [n for layer in space.layers for n in (layer.ffn, layer.kv_groups) if n]
    moments = channel_moments(model, [(linear, "input") for linear in linears], blocks, journal)
    return [(x.weight, m, n) for x, m, n in zip(linears, moments, units, strict=True)]
