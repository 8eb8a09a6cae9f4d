"""Greedy Output Approximation with recovery: each module is refitted, scored and cut in turn.

Source: Li, Dong, Lei (arXiv 2407.19126). Modules are visited in depth order, each with the outputs
of the pruned modules before it. The first level of a module (q, k, v or gate, up) is fitted by
least squares to the outputs of the dense model. The second level (o_proj or down_proj) is then
fitted on the resulting inputs. Then units are scored and the lowest ones dropped, at the same ratio
in every module. Channels are scored by their second moment (see output_approximation.py), heads by
second moment or by similarity (see head_similarity.py). Here KV groups replace heads. Left out: the
paper does not prune the blocks at both ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Projection
from grasp.compress.fold import expand
from grasp.compress.refit import ridge_solve
from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, inputs_of, layer_options, runner
from grasp.model.units import Rows, decoder_layers
from grasp.select.head_similarity import distance_to_nearest_later, returning_maps
from grasp.select.output_approximation import column_norms
from grasp.select.ratio import uniform_ratio
from grasp.select.selection import Selection


def greedy_output_approximation(
    model: PreTrainedModel, projection: Projection, blocks: Tensor, journal: Journal
) -> Selection:
    """Prune greedily, with KV groups scored by their second moment, like channels."""
    return Selection(prune_greedily(model, projection, blocks, journal))


def greedy_head_similarity(
    model: PreTrainedModel, projection: Projection, blocks: Tensor, journal: Journal
) -> Selection:
    """Prune greedily, with KV groups scored by their similarity."""
    return Selection(prune_greedily(model, projection, blocks, journal, similar_heads=True))


@torch.no_grad()
def prune_greedily(
    model: PreTrainedModel,
    projection: Projection,
    blocks: Tensor,
    journal: Journal,
    *,
    similar_heads: bool = False,
) -> Tensor:
    """Prune `model` in place; return scores, fp32 [units], for which `projection` drops the same.

    blocks: int64 [samples, len]. `similar_heads` scores KV groups by their similarity instead of
    their second moment. `model` keeps the recovered weights, with zeros in the dropped columns of
    o_proj and down_proj. Extra memory: a dense decoder layer, the hidden states of all samples with
    and without pruning, and two Gram matrices. After an interruption it starts over. Raises
    GraspError if activations are not finite.
    """
    space = projection.space
    sizes = space.sizes
    # the scores of a module are fixed up to their order, so the number of kept units is known
    ladder = uniform_ratio([torch.arange(n, device=model.device) for n in sizes])
    kept = [int(part.sum()) for part in projection(ladder).split(sizes)]
    scores = [torch.empty_like(rungs) for rungs in ladder.split(sizes)]
    layers = model.get_decoder().layers
    dense = first_hidden(model, blocks)
    pruned = dense.clone()

    def cut(linear: nn.Linear, raw: Tensor, module: int) -> None:
        order = raw.argsort(stable=True)
        scores[module][order] = ladder.split(sizes)[module]
        dropped = order[: len(order) - kept[module]]
        linear.weight[:, expand(dropped, linear.in_features // len(raw))] = 0

    with returning_maps(model) if similar_heads else nullcontext():
        options = layer_options(model, blocks[:1])
        for index, (layer, modules) in enumerate(zip(layers, decoder_layers(model), strict=True)):
            pair = _Pair.of(layer, options[index], pruned, dense)
            if (attention := modules.attention) is not None:
                groups = space.layers[index].kv_groups
                pair.recover([*attention.inputs])
                x = pair.recover([attention.out])
                if similar_heads:
                    heads = distance_to_nearest_later(
                        attention.module, groups, pair.run(layer), pruned
                    )
                else:
                    added = column_norms(attention.out) * x.second_moment
                    heads = added.view(groups, -1).sum(1)
                cut(attention.out, heads, 2 * index + 1)
            if (ffn := modules.ffn) is not None:
                x = pair.recover([*ffn.inputs])
                gate, up = (x.second_moment_after(rows) for rows in (ffn.gate, ffn.up))
                pair.recover([ffn.down])
                down = column_norms(ffn.down)
                cut(ffn.down, down * up * down * gate / 2, 2 * index)

            error = finite_mean([pair.advance()], index + 1)
            journal.progress(index + 1, len(layers), error, blocks.numel())
    return torch.cat(scores)


@dataclass(frozen=True)
class _Inputs:
    """Statistics of a linear layer's inputs over all samples, in the pruned model."""

    gram: Tensor  # fp32 [in, in]
    total: Tensor  # fp32 [in]
    tokens: int

    @property
    def second_moment(self) -> Tensor:
        return self.gram.diagonal() / self.tokens

    def second_moment_after(self, rows: Rows) -> Tensor:
        """E[y^2] of a projection's outputs y."""
        weight = rows.weight.float()
        squares = (weight @ self.gram * weight).sum(1) / self.tokens
        if rows.bias is None:
            return squares
        bias = rows.bias.float()
        return squares + 2 * bias * (weight @ self.total) / self.tokens + bias**2


@dataclass(frozen=True)
class _Pair:
    """A decoder layer that is being pruned, and its dense copy, each with its own inputs."""

    layer: nn.Module
    copy: nn.Module
    kwargs: dict[str, Any]
    pruned: Tensor  # [samples, len, hidden]
    dense: Tensor

    @classmethod
    def of(cls, layer: nn.Module, kwargs: dict[str, Any], pruned: Tensor, dense: Tensor) -> _Pair:
        return cls(layer, copy.deepcopy(layer), kwargs, pruned, dense)

    def run(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return runner(layer, self.kwargs)

    def recover(self, linears: list[nn.Linear]) -> _Inputs:
        """Fit linear layers that share their input, in place, to the outputs of their dense copies.

        The ridge penalises changes of a weight, so that directions absent from the text stay.
        """
        names = {module: name for name, module in self.layer.named_modules()}
        of_copy = {linear: self.copy.get_submodule(names[linear]) for linear in linears}
        width, device = linears[0].in_features, self.pruned.device
        gram, cross = torch.zeros(2, width, width, device=device)
        total = torch.zeros(width, device=device)
        for x, y in zip(
            inputs_of(linears[0], self.run(self.layer), self.pruned.split(1)),
            inputs_of(of_copy[linears[0]], self.run(self.copy), self.dense.split(1)),
            strict=True,
        ):
            x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, y)
            total += x.sum(0)
        for linear in of_copy:
            missing = (cross - gram).double() @ linear.weight.double().T  # [in, out]
            change = ridge_solve(gram.double(), gram.diagonal().mean(), missing).T
            linear.weight.copy_(linear.weight.double() + change)
        return _Inputs(gram, total, self.pruned.shape[0] * self.pruned.shape[1])

    def advance(self) -> Tensor:
        """Run both streams through their layers; return their relative distance."""
        for layer, hidden in ((self.layer, self.pruned), (self.copy, self.dense)):
            for x in hidden.split(1):
                x.copy_(self.run(layer)(x))
        return (self.pruned - self.dense).float().norm() / self.dense.float().norm()
