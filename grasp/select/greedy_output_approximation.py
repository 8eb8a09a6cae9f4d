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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

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
from grasp.model.places import device_of
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
    in the dropped columns of o_proj and down_proj. Extra memory: four times the hidden states
    of all samples, and four Gram matrices. After an interruption it starts over. Raises GraspError
    if activations are not finite.
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
        scores[module][order.to(ladder.device)] = ladder.split(sizes)[module]
        dropped, kept = order.tensor_split([len(order) - count[module]])
        width = linear.in_features // len(raw)
        linear.weight[:, expand(dropped, width)] = 0
        return expand(kept.sort().values, width)

    with returning_maps(model) if similar_heads else nullcontext():
        options = layer_options(model, blocks[:1])
        for index, (layer, modules) in enumerate(zip(layers, decoder_layers(model), strict=True)):
            run, device = runner(layer, options[index]), device_of(layer)
            dense, pruned = dense.to(device), pruned.to(device)
            own = Module.of(run, modules.outputs, pruned, dense)
            if (attention := modules.attention) is not None:
                out, groups = attention.out, space.layers[index].kv_groups
                if similar_heads:
                    heads = distance_to_nearest_later(attention.module, groups, run, own.scored)
                else:
                    heads = own.columns(out).view(groups, -1).sum(1)
                own.recover(out, cut(out, heads, 2 * index + 1))
            if (ffn := modules.ffn) is not None:
                own.recover(ffn.down, cut(ffn.down, own.channels(ffn), 2 * index))
            own.advance()
            error = finite_mean([(pruned - dense).norm() / dense.norm()], index + 1)
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
class Module:
    """A decoder layer that is being pruned, and what the dense one makes of its own inputs."""

    run: Callable[[Tensor], Tensor]  # the layer
    ends: tuple[nn.Linear, ...]  # o_proj and down_proj
    adds_up: bool  # what these two give is added to the hidden states as it is
    pruned: Tensor  # inputs, [samples, len, hidden]
    targets: dict[nn.Linear, Tensor]  # hidden states after each end, like `pruned`

    @classmethod
    def of(
        cls,
        run: Callable[[Tensor], Tensor],
        ends: tuple[nn.Linear, ...],
        pruned: Tensor,
        dense: Tensor,
    ) -> Module:
        """`run` is the layer before it is pruned; it advances `dense` in place."""
        adds_up = _adds_up(run, ends, dense[:1])
        targets = {linear: torch.empty_like(dense) for linear in ends}
        found = cls(run, ends, adds_up, pruned, targets)
        with _outputs(ends) as seen:
            for index, x in enumerate(dense.split(1)):
                out = run(x)
                added = [own for _, own in seen]
                for place, (linear, _) in enumerate(seen, 1):
                    targets[linear][index] = found.state(x, added[:place])[0]
                seen.clear()
                x.copy_(out)
        return found

    def state(self, hidden: Tensor, added: Sequence[Tensor]) -> Tensor:
        """The hidden states after outputs of `ends`.

        Where the layer does not add these as they are, the last of them instead.
        """
        return hidden + sum(added) if self.adds_up else added[-1]

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
        return inputs_of(linear, self.run, self.scored.split(1))

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
        hidden = self.pruned[part].split(1)
        with _outputs(self.ends) as seen:
            for h, target, x in zip(
                hidden,
                self.targets[linear][part],
                inputs_of(linear, self.run, hidden),
                strict=True,
            ):
                own = F.linear(x, linear.weight, linear.bias)  # linear(x) would stop the pass
                lacking = target - self.state(h, [out for _, out in seen] + [own])[0]
                seen.clear()
                power = target.float().square().sum(1, keepdim=True).clamp(min=TINY)
                x = x[0, :, kept].float()
                gram.addmm_(x.T, x / power)
                missing.addmm_((x / power).T, lacking.float())
        return Sums(gram, missing)

    def advance(self) -> None:
        """Run the pruned layer on its inputs, in place."""
        for x in self.pruned.split(1):
            x.copy_(self.run(x))


def _adds_up(run: Callable[[Tensor], Tensor], ends: Iterable[nn.Linear], x: Tensor) -> bool:
    """Whether a layer adds the outputs of `ends` to its input as they are, without a norm."""
    with _outputs(ends) as seen:
        change = run(x) - x
    return bool((change - sum(out for _, out in seen)).norm() < 1e-2 * change.norm())


@contextmanager
def _outputs(linears: Iterable[nn.Linear]) -> Iterator[list[tuple[nn.Linear, Tensor]]]:
    """Linear layers with their outputs, in the order that they run."""
    seen: list[tuple[nn.Linear, Tensor]] = []
    with ExitStack() as hooks:
        for linear in linears:
            hook = linear.register_forward_hook(lambda own, _, out: seen.append((own, out)))
            hooks.enter_context(hook)
        yield seen


def _second_moment(parts: Iterable[Tensor]) -> Tensor:
    """E[x^2] of each channel; parts: [..., channels] with equally many tokens."""
    squares = [part.flatten(0, -2).float().square().mean(0) for part in parts]
    return torch.stack(squares).mean(0)
