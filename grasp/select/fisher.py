"""Fisher information of the gates: squared gradient of the loss with respect to each gate.

F_i = sum over samples of (dL/dz_i)^2 at z = 1, with one backward pass per sample. The value of a KV
group or an expert is divided by its cost in channels, so that units compete per parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.distributed import in_order
from grasp.gates.gating import gated
from grasp.gates.objective import next_token_loss
from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.units import FFN_COST, UnitSpace


def fisher_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return scores, fp32 [units] on the model's device; blocks: int64 [samples, seq_len]."""
    done = journal.load()
    if done is not None:
        return done["fisher"].to(model.device)
    z = torch.ones(units.size, device=model.device, requires_grad=True)
    fisher = torch.zeros_like(z, requires_grad=False)
    with gated(model, units) as gates:

        def of_block(block: Tensor) -> Tensor:  # [units + 1]: the gradient, then the loss
            gates.set(z)
            loss = next_token_loss(model, block[None].to(z.device))
            return torch.cat([torch.autograd.grad(loss, z)[0], loss.detach()[None]])

        for step, found in enumerate(in_order(of_block, blocks), 1):
            value = finite_mean([found[-1]], step)
            fisher += found[:-1] ** 2
            journal.progress(step, len(blocks), value, blocks.shape[1])
    for index, _, kv in units.segments():
        fisher[kv] *= FFN_COST / units.layers[index].kv_cost
    for index, experts in units.expert_segments():
        fisher[experts] *= FFN_COST / units.layers[index].expert_cost
    journal.save(lambda: {"fisher": fisher}, final=True)
    return fisher
