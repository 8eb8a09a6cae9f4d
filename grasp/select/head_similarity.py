"""Head similarity: KV groups that attend where a later group of their layer attends go first.

Source: Greedy Output Approximation (Li, Dong, Lei, arXiv 2407.19126). D_ij is the Jensen-Shannon
divergence of the attention maps of heads i and j, averaged over query rows; for (i, j) in row order
i is dropped where D_ij < tau, i != j and neither is dropped yet. D is symmetric, so that drops
exactly the heads whose distance to the nearest later one is below tau: a score, and any number to
drop has its tau. Here that number is the budget's, the same ratio in every layer, where the paper
has one tau for all. A KV group's map is the mean of its query heads' maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.model.layerwise import inputs_of
from grasp.model.units import LayerModules

SAMPLES = 16  # that maps are compared on, as published


@contextmanager
def returning_maps(model: PreTrainedModel) -> Iterator[None]:
    """Attention of this instance returns its maps, which only transformers' eager one does."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def distance_to_nearest_later(
    modules: LayerModules, kv_groups: int, run: Callable[[Tensor], Any], hidden: Tensor
) -> Tensor:
    """fp32 [kv_groups], inf for the last, of a layer that is `run` on hidden [samples, len, d].

    Within `returning_maps`. In memory at one time: maps [heads, len, len] of a sample, a few times.
    """
    seen: list[Tensor] = []
    distance = torch.zeros(kv_groups, kv_groups, device=hidden.device)
    hook = modules.attention.register_forward_hook(lambda _, args, out: seen.append(out[1]))
    with hook:
        for _ in inputs_of(modules.mlp, run, hidden[:SAMPLES].split(1)):
            heads = seen.pop()[0].float()
            distance += divergences(heads.unflatten(0, (kv_groups, -1)).mean(1))
    return distance.amin(1) / len(hidden[:SAMPLES])


def divergences(maps: Tensor) -> Tensor:
    """Jensen-Shannon, in nats, of maps [n, rows, keys] averaged over rows: [n, n], inf at j <= i.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2.
    """
    found = maps.new_full((len(maps), len(maps)), torch.inf)
    own = _entropy(maps)
    for i in range(len(maps) - 1):
        both = _entropy((maps[i] + maps[i + 1 :]) / 2)
        found[i, i + 1 :] = both - (own[i] + own[i + 1 :]) / 2
    return found


def _entropy(maps: Tensor) -> Tensor:
    return -torch.xlogy(maps, maps).sum(-1).mean(-1)
