"""Head similarity: drop KV groups whose attention is close to a later group of the same layer.

Source: Greedy Output Approximation (Li, Dong, Lei, arXiv 2407.19126). D_ij is the Jensen-Shannon
divergence of the attention maps of heads i and j, averaged over query rows. The paper visits pairs
(i, j) in row order and drops i if D_ij < tau, i != j and neither is dropped yet. Since D is
symmetric, this drops exactly the heads whose distance to the nearest later head is below tau. That
distance is the score here: the budget sets how many heads to drop, at the same ratio in every
layer, whereas the paper has one tau for all layers. The map of a KV group is the mean over the maps
of its query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def returning_maps(model: PreTrainedModel) -> Iterator[None]:
    """Make the model's attention return its maps, which only the eager implementation does."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def distance_to_nearest_later(
    attention: nn.Module, kv_groups: int, run: Callable[[Tensor], Any], hidden: Tensor
) -> Tensor:
    """Return the distance of each KV group to its nearest later one: fp32 [kv_groups], last inf.

    `run` runs the layer on hidden [samples, len, d]. Call this within `returning_maps`. Extra
    memory: a few copies of one sample's maps [heads, len, len].
    """
    seen: list[Tensor] = []
    distance = torch.zeros(kv_groups, kv_groups, device=hidden.device)
    hook = attention.register_forward_hook(lambda _, args, out: seen.append(out[1]))
    with hook:
        for x in hidden.split(1):
            run(x)
            heads = seen.pop()[0].float()
            distance += divergences(heads.unflatten(0, (kv_groups, -1)).mean(1))
    return distance.amin(1) / len(hidden)


def divergences(maps: Tensor) -> Tensor:
    """Return divergences [n, n] of maps [n, rows, keys], averaged over rows; inf at j <= i.

    Jensen-Shannon divergence in nats: JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2.
    """
    found = maps.new_full((len(maps), len(maps)), torch.inf)
    own = _entropy(maps)
    for i in range(len(maps) - 1):
        both = _entropy((maps[i] + maps[i + 1 :]) / 2)
        found[i, i + 1 :] = both - (own[i] + own[i + 1 :]) / 2
    return found


def _entropy(maps: Tensor) -> Tensor:
    return -torch.xlogy(maps, maps).sum(-1).mean(-1)
