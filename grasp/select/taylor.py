"""LLM-Pruner's Taylor: sum of |g w| over a unit's weights, with g the gradient of the mean loss.

Source: LLM-Pruner (arXiv 2305.11627), grouped importance, element-wise, first order. The sum is
divided by the unit's cost, so that groups and channels of all layers compete per parameter. The
paper cuts every layer at one ratio instead and does not prune the blocks at both ends.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.gates.objective import next_token_loss
from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.units import UnitSpace
from grasp.select.weights import prunable_weights, unit_means


def taylor_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return scores, fp32 [units] on the model's device; one backward pass per sample.

    blocks: int64 [samples, seq_len]. Extra memory: one copy of the prunable weights, in fp32.
    """
    done = journal.load()
    if done is not None:
        return done["taylor"].to(model.device)
    weights = prunable_weights(model)
    gradients = {w: torch.zeros_like(w, dtype=torch.float32) for w in weights}

    def collect(weight: Any) -> None:
        gradients[weight] += weight.grad
        weight.grad = None

    with ExitStack() as stack:
        for weight in weights:
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_()
            stack.enter_context(weight.register_post_accumulate_grad_hook(collect))
        for step, block in enumerate(blocks):
            loss = next_token_loss(model, block[None].to(model.device))
            value = finite_mean([loss.detach()], step + 1)
            (loss / len(blocks)).backward(inputs=weights)
            journal.progress(step + 1, len(blocks), value, block.numel())
    scores = unit_means(model, units, lambda w: (w * gradients[w]).abs())
    journal.save(lambda: {"taylor": scores}, final=True)
    return scores
