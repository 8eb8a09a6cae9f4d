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

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Projection
from grasp.compress.fold import expand
from grasp.compress.layer_fit import LayerFit, adds_up
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
    in the dropped columns of o_proj and down_proj. Memory: see `planning.memory.greedy_memory`.
    After an interruption it starts over. Raises GraspError if activations are not finite.
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
    scored, fitted, held = parted(len(blocks))

    def best(linear: nn.Linear, raw: Tensor, module: int) -> Tensor:
        """Rank the units of a module; return the columns of the highest."""
        order = raw.argsort(stable=True)
        scores[module][order.to(ladder.device)] = ladder.split(sizes)[module]
        kept = order[len(order) - count[module] :]
        return expand(kept.sort().values, linear.in_features // len(raw))

    with returning_maps(model) if similar_heads else nullcontext():
        options = layer_options(model, blocks[:1])
        for index, (layer, modules) in enumerate(zip(layers, decoder_layers(model), strict=True)):
            run, device = runner(layer, options[index]), device_of(layer)
            dense, pruned = dense.to(device), pruned.to(device)
            plain = adds_up(layer, options[index], modules.outputs, dense[:1])
            fit = LayerFit.of(run, modules.outputs, plain, pruned, dense, fitted, held)
            own = _Scored(run, pruned[scored])
            if (attention := modules.attention) is not None:
                out, groups = attention.out, space.layers[index].kv_groups
                if similar_heads:
                    heads = distance_to_nearest_later(attention.module, groups, run, own.hidden)
                else:
                    heads = own.columns(out).view(groups, -1).sum(1)
                fit.keep(out, best(out, heads, 2 * index + 1))
            if (ffn := modules.ffn) is not None:
                fit.keep(ffn.down, best(ffn.down, own.channels(ffn), 2 * index))
            fit.advance()
            error = finite_mean([(pruned - dense).norm() / dense.norm()], index + 1)
            journal.progress(index + 1, len(layers), error, blocks.numel())
    return torch.cat(scores)


def parted(samples: int) -> tuple[slice, range, range]:
    """Which samples score units, which fit, and which are held out from the fits."""
    scored = max(1, min(SCORED, samples // 4))
    held = max(1, (samples - scored) // 4)
    return slice(scored), range(scored, samples - held), range(samples - held, samples)


@dataclass(frozen=True)
class _Scored:
    """The inputs that score the units of a decoder layer."""

    run: Callable[[Tensor], Tensor]  # the layer
    hidden: Tensor  # its inputs, [samples, len, hidden]

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
        return inputs_of(linear, self.run, self.hidden.split(1))


def _second_moment(parts: Iterable[Tensor]) -> Tensor:
    """E[x^2] of each channel; parts: [..., channels] with equally many tokens."""
    squares = [part.flatten(0, -2).float().square().mean(0) for part in parts]
    return torch.stack(squares).mean(0)
