"""The published gate training in its eager form, the baseline of our comparisons.

Written from descriptions of the method (GRASPrune, arXiv 2604.19398) and of its public code,
including the code's faults: gates multiply K (after RoPE) and V; the backbone requires gradients,
so every step computes them for all weights; units are sorted by probability with ties in order of
position; floors are added after the cut, beyond the budget; and every layer syncs with the host.
grasp does none of this. Where the description leaves a choice, this file takes the cheaper one: one
score vector for all layers, two syncs per layer (the public code makes about six), and weight
gradients that are dropped after each step, not summed. It supports families with Llama's attention,
with or without biases (Qwen2) and norms on q and k (Qwen3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grasp.budget.budget import Budget
from grasp.budget.projection import Mask
from grasp.gates.gating import gated
from grasp.gates.objective import next_token_loss
from grasp.gates.scales import scale
from grasp.gates.training import TrainSettings, train_gates
from grasp.journal import Journal
from grasp.model.units import LayerModules, UnitSpace, decoder_layers

TAU = 1.5


class Trainer:
    """The state of a gate training on a patched model (see `training`)."""

    def __init__(self, model: PreTrainedModel, keep: float):
        self.model, self.space = model, UnitSpace.of(model)
        budget = Budget("keep", keep, ffn_multiple=1)
        self.costs, self.segments = unit_costs(self.space, budget, model.device)
        self.limit = budget.limit(self.space)
        self.scores = torch.zeros(self.space.size, device=model.device, requires_grad=True)
        self.optimizer = torch.optim.AdamW(
            [self.scores], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
        )

    def step(self, ids: Tensor) -> float:
        """One optimiser step on ids, int64 [1, seq_len]; returns the loss."""
        p = torch.sigmoid(self.scores / TAU)
        set_gates(self.model, self.space, self.project(p.detach()) + p - p.detach())
        loss = next_token_loss(self.model, ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return loss.item()

    def project(self, p: Tensor) -> Tensor:
        order = p.argsort(descending=True, stable=True)
        return cut_then_floors(order, p, self.costs, self.limit, self.segments)

    def mask(self) -> Mask:
        p = torch.sigmoid(self.scores.detach() / TAU)
        return Mask(self.space, self.project(p).cpu())


def learn_mask(
    model: PreTrainedModel, blocks: Tensor, *, keep: float, epochs: int, seed: int
) -> Mask:
    """The published mask; blocks int64 [samples, seq_len], one sample a step."""
    generator = torch.Generator().manual_seed(seed)
    with training(model, keep) as trainer:
        for _ in range(epochs):
            for index in torch.randperm(len(blocks), generator=generator):
                trainer.step(blocks[index][None].to(model.device))
        return trainer.mask()


def learn_scales(model: PreTrainedModel, blocks: Tensor, settings: TrainSettings) -> None:
    """Fit the published scales to a model cut to its mask and fold them in, in place.

    A group's scale is on K and V and goes into the rows of k_proj and v_proj; biases are left as
    they are, which for a biased family is not the model that was calibrated.
    """
    space = UnitSpace.of(model)
    theta = torch.zeros(space.size, device=model.device)
    with gated(model, space, "kv") as gates:
        theta = train_gates(model, gates, theta, lambda t, _: scale(t), blocks, settings, Journal())
    gamma = scale(theta)
    with torch.no_grad():
        for m, (index, ffn, kv) in zip(decoder_layers(model), space.segments(), strict=True):
            rows = gamma[kv].repeat_interleave(space.layers[index].head_dim)[:, None]
            ffn_module, attention = _dense(m)
            attention.k_proj.weight.mul_(rows)
            attention.v_proj.weight.mul_(rows)
            ffn_module.down_proj.weight.mul_(gamma[ffn])


def cut_then_floors(
    order: Tensor, scores: Tensor, costs: Tensor, limit: int, segments: Sequence[slice]
) -> Tensor:
    """bool [units]: the longest prefix of `order` within `limit`, and then the floors on top."""
    fits = int((costs[order].cumsum(0) <= limit).sum().item())
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[:fits]] = True
    for units in segments:
        if not mask[units].any():  # a host sync for each kind of unit in each layer
            mask[units.start + int(scores[units].argmax().item())] = True
    return mask


def unit_costs(
    space: UnitSpace, budget: Budget, device: torch.device | str
) -> tuple[Tensor, list[slice]]:
    """Cost of every unit, int64 [units], and the slice of each kind in each layer."""
    segments = list(budget.segments(space))
    lengths = torch.tensor([s.units.stop - s.units.start for s in segments])
    costs = torch.tensor([s.unit_cost for s in segments]).repeat_interleave(lengths)
    return costs.to(device), [s.units for s in segments]


@contextmanager
def training(model: PreTrainedModel, keep: float) -> Iterator[Trainer]:
    """Patch this instance for a training, and take everything off again on leaving."""
    layers = decoder_layers(model)
    for m in layers:
        ffn, attention = _dense(m)
        ffn.forward = partial(_ffn_forward, ffn)
        attention.forward = partial(_attention_forward, attention)
    model.requires_grad_(True)
    try:
        yield Trainer(model, keep)
    finally:
        model.requires_grad_(False)
        model.zero_grad()
        for m in layers:
            for module in _dense(m):
                module.__dict__.pop("forward")
                module.__dict__.pop("published_gate", None)


def _dense(modules: LayerModules) -> tuple[Any, Any]:
    """The FFN and the attention of a layer that has both."""
    assert modules.ffn is not None and modules.attention is not None
    return modules.ffn.module, modules.attention.module


def set_gates(model: PreTrainedModel, space: UnitSpace, z: Tensor) -> None:
    z = z.to(model.dtype)
    for m, (_, ffn, kv) in zip(decoder_layers(model), space.segments(), strict=True):
        for module, gate in zip(_dense(m), (z[ffn], z[kv]), strict=True):
            module.published_gate = gate


def _ffn_forward(mlp: Any, x: Tensor) -> Tensor:
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.down_proj(hidden * mlp.published_gate)


def _attention_forward(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (p(hidden_states).view(heads) for p in projections)
    if hasattr(attention, "q_norm"):  # Qwen3
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    gate = attention.published_gate[:, None, None]
    out, _ = sdpa_attention_forward(
        attention, q, k * gate, v * gate, attention_mask, scaling=attention.scaling
    )
    return attention.o_proj(out.flatten(2)), None
