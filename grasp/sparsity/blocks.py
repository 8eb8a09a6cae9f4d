"""Sparsify a decoder block by block, each with the outputs of the sparse blocks before it.

Every linear layer of a decoder block is sparsified; embeddings and head are not. Memory besides the
model: one block in fp32 with its statistics, and all hidden states before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.pattern import Pattern
from grasp.errors import NEW_START, GraspError
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, fp32_options, layer_options, runner
from grasp.model.load import widened
from grasp.model.units import layers_name


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder block in fp32 with its calibration data.

    hidden: fp32 [samples, seq_len, d], its inputs. dense: same shape, the outputs of the dense
    block, valid after `run_dense`.
    """

    linears: dict[str, nn.Linear]
    run: Callable[[Tensor], Tensor]
    hidden: Tensor
    dense: Tensor

    def run_dense(
        self,
        see: Callable[[str, Tensor], Any] = lambda name, x: None,
        after: Callable[[Tensor], Any] = lambda output: None,
    ) -> None:
        """Run the block, while it is still dense, on every sample.

        For one sample after the other, `see(name, x)` receives the input of each linear layer,
        [tokens, in], and `after(output)` the output of the block, [1, seq_len, d].
        """

        def hook(_: Any, args: tuple[Tensor, ...], name: str) -> None:
            see(name, args[0].detach().flatten(0, -2))

        for x, y in zip(self.hidden.split(1), self.dense.split(1), strict=True):
            with ExitStack() as hooks:  # removed before a backward pass that runs the block again
                for name, linear in self.linears.items():
                    own = partial(hook, name=name)
                    hooks.enter_context(linear.register_forward_pre_hook(own))
                output = self.run(x)
            after(output)
            y.copy_(output.detach())

    def advance(self) -> float:
        """Replace `hidden` by the block's current outputs; return the relative error.

        The error is ||output - dense output|| / ||dense output - input||.
        """
        lost, added = torch.zeros(2, dtype=torch.float64, device=self.hidden.device)
        for x, y in zip(self.hidden.split(1), self.dense.split(1), strict=True):
            output = self.run(x)
            lost += (output - y).square().sum()
            added += (y - x).square().sum()
            x.copy_(output)
        return math.sqrt(lost / added.clamp(min=torch.finfo().tiny))


# Calls `run_dense`, then sparsifies the linear layers of a block in place.
Method = Callable[[Block, Pattern, torch.Generator], None]


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of all decoder blocks by name.

    Raises GraspError if a block has a matrix outside of linear layers.
    """
    layers, prefix = model.get_decoder().layers, layers_name(model)
    found = {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if type(module) is nn.Linear  # a subclass may compute more, or pack its weight
    }
    matrices = {f"{prefix}.{name}" for name, p in layers.named_parameters() if p.dim() > 1}
    if others := sorted(matrices - {f"{name}.weight" for name in found}):
        raise GraspError(
            f"{type(model).__name__} is not supported: {others[0]} belongs to no plain nn.Linear"
        )
    return found


def sparsify_blocks(model: PreTrainedModel, *args: Any, **options: Any) -> list[float]:
    """`sparse_layers` of a model, in place; return the error of each block."""
    layers = model.get_decoder().layers
    return [error for _, error in sparse_layers(model, layers, *args, **options)]


@torch.no_grad()
def sparse_layers(
    model: PreTrainedModel,
    layers: Iterable[Any],
    pattern: Pattern,
    method: Method,
    blocks: Tensor,
    *,
    seed: int,
    stage: Callable[[str], Journal],
) -> Iterator[tuple[Any, float]]:
    """Sparsify `layers`, those of `model`, in place; yield each with its error.

    blocks: int64 [samples, seq_len]. `stage(name)` returns a journal. The journal `block N` stores
    the finished block, so that a resumed run ends with the same bits. Raises GraspError if
    activations are not finite.
    """
    dtype, progress = model.dtype, stage("sparsify")
    options = layer_options(model, blocks[:1])
    hidden = first_hidden(model, blocks).float()
    dense = torch.empty_like(hidden)
    for index, (layer, kwargs) in enumerate(zip(layers, options, strict=True)):
        journal, run = stage(f"block {index}"), runner(layer, fp32_options(kwargs))
        linears = {name: m for name, m in layer.named_modules() if type(m) is nn.Linear}
        with widened(layer, torch.float32):
            block, done = Block(linears, run, hidden, dense), journal.load()
            if done is None:
                method(block, pattern, torch.Generator().manual_seed(1_000_003 * seed + index))
            for name, linear in linears.items():
                weight = linear.weight if done is None else done[name]
                linear.weight.copy_(
                    weight.to(linear.weight.device, dtype)
                )  # the next block sees it
                if not pattern.holds(linear.weight):
                    raise ValueError(f"{name} of block {index} does not hold {pattern.text}")
            error = block.advance()
        if done is None:
            if not math.isfinite(error):
                raise GraspError(
                    f"activations are not finite in decoder block {index}: check that the dense "
                    f"model's own loss is finite, and use a smaller `lr`; {NEW_START}"
                )
            done = {"error": torch.tensor(error, dtype=torch.float64)}
            done |= {name: linear.weight for name, linear in linears.items()}
            journal.save(partial(dict, done), final=True)
            progress.progress(index + 1, len(options), error, blocks.numel())
        yield layer, done["error"].item()
