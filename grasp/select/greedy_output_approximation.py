"""Greedy Output Approximation with recovery: each module is scored, cut and recovered in turn.

Source: Li, Dong, Lei (arXiv 2407.19126). Modules are visited in depth order, each with the outputs
of the pruned modules before it. Its units are scored, on text of their own, and the lowest ones
dropped, at the same ratio in every module that is not protected. Then what is kept of its second
level (o_proj or down_proj) is fitted by least squares to the dense model. Channels are scored by
their second moment (see output_approximation.py), heads by second moment or by similarity (see
head_similarity.py).

Differences from the paper: KV groups replace heads. The fit comes after the cut and not before it,
so it makes up for the cut. Its target is the dense model's hidden state and not the module's
output, so it makes up for earlier modules, too. Its ridge is chosen on held-out text, where a fit
that does not help is dropped. The first level (q, k, v, gate, up) stays as it is: fits of it, which
the paper has, change nothing that the second level does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Projection
from grasp.compress.fold import expand
from grasp.compress.refit import ridge_solve
from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, inputs_of, layer_options, runner
from grasp.model.units import FFN, decoder_layers
from grasp.select.head_similarity import distance_to_nearest_later, returning_maps
from grasp.select.output_approximation import column_norms
from grasp.select.ratio import uniform_ratio
from grasp.select.selection import Selection

SCORED = 16  # samples that score units, as published; the others are for the fits
RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # relative to the power of each input
TINY = torch.finfo(torch.float32).tiny


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

    blocks: int64 [samples, len], three or more (see `parted`). `similar_heads` scores KV groups by
    their similarity instead of their second moment. `model` keeps the recovered weights, with zeros
    in the dropped columns of o_proj and down_proj. Extra memory: a dense decoder layer, the hidden
    states of all samples with and without pruning, and four Gram matrices. After an interruption it
    starts over. Raises GraspError if activations are not finite.
    """
    space = projection.space
    sizes = space.sizes
    # the scores of a module are fixed up to their order, so the number of kept units is known
    ladder = uniform_ratio([torch.arange(n, device=model.device) for n in sizes])
    count = [int(part.sum()) for part in projection(ladder).split(sizes)]
    scores = [torch.empty_like(rungs) for rungs in ladder.split(sizes)]
    layers = model.get_decoder().layers
    dense = first_hidden(model, blocks)
    pruned = dense.clone()

    def cut(linear: nn.Linear, raw: Tensor, module: int) -> Tensor:
        """Zero the columns of the lowest units; return the columns of the others."""
        order = raw.argsort(stable=True)
        scores[module][order] = ladder.split(sizes)[module]
        dropped, kept = order.tensor_split([len(order) - count[module]])
        width = linear.in_features // len(raw)
        linear.weight[:, expand(dropped, width)] = 0
        return expand(kept.sort().values, width)

    with returning_maps(model) if similar_heads else nullcontext():
        options = layer_options(model, blocks[:1])
        for index, (layer, modules) in enumerate(zip(layers, decoder_layers(model), strict=True)):
            pair = Pair.of(layer, modules.outputs, options[index], pruned, dense)
            if (attention := modules.attention) is not None:
                out, groups = attention.out, space.layers[index].kv_groups
                if similar_heads:
                    run = runner(layer, options[index])
                    heads = distance_to_nearest_later(attention.module, groups, run, pair.scored)
                else:
                    heads = pair.columns(out).view(groups, -1).sum(1)
                pair.recover(out, cut(out, heads, 2 * index + 1))
            if (ffn := modules.ffn) is not None:
                pair.recover(ffn.down, cut(ffn.down, pair.channels(ffn), 2 * index))
            error = finite_mean([pair.advance()], index + 1)
            journal.progress(index + 1, len(layers), error, blocks.numel())
    return torch.cat(scores)


def parted(samples: int) -> tuple[slice, slice, slice]:
    """Which samples score units, which fit, and which are held out from the fits."""
    scored = max(1, min(SCORED, samples // 4))
    held = max(1, (samples - scored) // 4)
    return slice(scored), slice(scored, samples - held), slice(samples - held, samples)


@dataclass(frozen=True)
class Sums:
    """Sums over tokens of inputs x of a linear layer, and of what a target lacks after it."""

    gram: Tensor  # x x^T, fp32 [in, in]
    missing: Tensor  # x (target - found)^T, fp32 [in, out]

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.missing + other.missing)

    def fit(self, ridge: float) -> Tensor:
        """The change of the weight by least squares, fp32 [in, out]."""
        power = self.gram.diagonal().mean()
        return ridge_solve(self.gram.double(), power, self.missing.double(), ridge).float()

    def rise(self, change: Tensor) -> float:
        """By how much a change of the weight raises the squared error on these tokens."""
        return float((change * (self.gram @ change - 2 * self.missing)).sum())


def checked_fit(fitted: Sums, held: Sums) -> Tensor | None:
    """The fit to all tokens with the ridge that has the least error on held-out ones.

    fp32 [in, out]; None if no ridge lowers that error.
    """
    rises = {ridge: held.rise(fitted.fit(ridge)) for ridge in RIDGES}
    best = min(rises, key=rises.__getitem__)
    return (fitted + held).fit(best) if rises[best] < 0 else None


@dataclass(frozen=True)
class Pair:
    """A decoder layer that is being pruned, and its dense copy, each with its own inputs."""

    layer: nn.Module
    copy: nn.Module
    names: dict[nn.Linear, str]  # o_proj and down_proj
    adds_up: bool  # what these two give is added to the hidden states as it is
    kwargs: dict[str, Any]
    pruned: Tensor  # [samples, len, hidden]
    dense: Tensor

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        ends: Sequence[nn.Linear],
        kwargs: dict[str, Any],
        pruned: Tensor,
        dense: Tensor,
    ) -> Pair:
        names = {module: name for name, module in layer.named_modules() if module in ends}
        adds_up = _adds_up(runner(layer, kwargs), ends, dense[:1])
        return cls(layer, copy.deepcopy(layer), names, adds_up, kwargs, pruned, dense)

    @property
    def scored(self) -> Tensor:
        return self.pruned[parted(len(self.pruned))[0]]

    def columns(self, linear: nn.Linear) -> Tensor:
        """Second moment of what each column of o_proj adds to the output, fp32 [in]."""
        return column_norms(linear) * _second_moment(self._inputs(linear))

    def channels(self, ffn: FFN) -> Tensor:
        """Second moment of what each channel of an FFN adds to the output, fp32 [channels]."""
        up, gate = (
            _second_moment(F.linear(x, rows.weight, rows.bias) for x in self._inputs(rows.linear))
            for rows in (ffn.up, ffn.gate)
        )
        down = column_norms(ffn.down)
        return down * up * down * gate / 2

    def _inputs(self, linear: nn.Linear) -> Iterator[Tensor]:
        return inputs_of(linear, runner(self.layer, self.kwargs), self.scored.split(1))

    def recover(self, linear: nn.Linear, kept: Tensor) -> None:
        """Fit the columns `kept` of o_proj or down_proj, in place."""
        _, fitted, held = parted(len(self.pruned))
        change = checked_fit(self._sums(linear, kept, fitted), self._sums(linear, kept, held))
        if change is not None:
            linear.weight[:, kept] += change.T.to(linear.weight.dtype)

    def _sums(self, linear: nn.Linear, kept: Tensor, part: slice) -> Sums:
        """Over the tokens of some samples, each token's error relative to its target.

        So the massive activations of a first position count no more than others.
        """
        gram = torch.zeros(len(kept), len(kept), device=kept.device)
        missing = torch.zeros(len(kept), linear.out_features, device=kept.device)
        for (x, found), (_, target) in zip(
            self._passing(self.layer, linear, self.pruned[part]),
            self._passing(self.copy, linear, self.dense[part]),
            strict=True,
        ):
            x = x[:, kept]
            weighted = x / target.square().sum(1, keepdim=True).clamp(min=TINY)
            gram.addmm_(x.T, weighted)
            missing.addmm_(weighted.T, target - found)
        return Sums(gram, missing)

    def _passing(
        self, layer: nn.Module, linear: nn.Linear, hidden: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each sample, the input of `linear` and the hidden states after it, fp32 [tokens, …].

        Where the layer does not add its outputs up as they are, its output replaces the latter.
        """
        own = layer.get_submodule(self.names[linear])
        run = runner(layer, self.kwargs)
        with _outputs([layer.get_submodule(name) for name in self.names.values()]) as added:
            for h, x in zip(hidden.split(1), inputs_of(own, run, hidden.split(1)), strict=True):
                # not `own(x)`, which would stop here
                after = F.linear(x, own.weight, own.bias)
                if self.adds_up:
                    after = sum(added, after + h)
                added.clear()
                yield x.flatten(0, -2).float(), after.flatten(0, -2).float()

    def advance(self) -> Tensor:
        """Run both streams through their layers; return their relative distance."""
        for layer, hidden in ((self.layer, self.pruned), (self.copy, self.dense)):
            for x in hidden.split(1):
                x.copy_(runner(layer, self.kwargs)(x))
        return (self.pruned - self.dense).float().norm() / self.dense.float().norm()


def _adds_up(run: Callable[[Tensor], Tensor], ends: Iterable[nn.Linear], x: Tensor) -> bool:
    """Whether a layer adds the outputs of `ends` to its input as they are, without a norm."""
    with _outputs(ends) as added:
        change = run(x) - x
    return bool((change - sum(added)).norm() < 1e-2 * change.norm())


@contextmanager
def _outputs(linears: Iterable[nn.Linear]) -> Iterator[list[Tensor]]:
    """The outputs of linear layers, in the order that they run."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for linear in linears:
            hook = linear.register_forward_hook(lambda _, args, out: seen.append(out))
            hooks.enter_context(hook)
        yield seen


def _second_moment(parts: Iterable[Tensor]) -> Tensor:
    """E[x^2] of each channel; parts: [..., channels] with equally many tokens."""
    squares = [part.flatten(0, -2).float().square().mean(0) for part in parts]
    return torch.stack(squares).mean(0)
