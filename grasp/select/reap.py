"""REAP and frequency: scores of routed experts from what the router does on calibration text.

Source: REAP (arXiv 2510.13999). An expert's score is the mean, over the tokens that are routed to
it, of its weight from the router times the norm of its output; an expert with no token gets 0. The
frequency of an expert is the number of its tokens, the baseline there. Both only rank the experts
of a layer: a score here is the rank within it, as the paper prunes every layer at one ratio. KV
groups and FFN channels, which the paper keeps, rank above all experts.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.distributed import in_order
from grasp.gates.objective import next_token_loss
from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.experts import all_routed_experts
from grasp.model.units import UnitSpace
from grasp.select.ratio import uniform_ratio


def reap_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return scores, fp32 [units] on the model's device; blocks: int64 [samples, seq_len]."""
    tokens, norms = routed(model, units, blocks, journal)
    return _ranked(units, norms / tokens.clamp(min=1))


def frequency_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return scores, fp32 [units] on the model's device; blocks: int64 [samples, seq_len]."""
    tokens, _ = routed(model, units, blocks, journal)
    return _ranked(units, tokens)


def _ranked(units: UnitSpace, raw: Tensor) -> Tensor:
    """Scores of all units from raw scores of the experts, [experts of all layers]."""
    per_layer = [own for own in raw.split([layer.experts for layer in units.layers]) if len(own)]
    return torch.cat([raw.new_full((units.size - units.experts,), 2.0), uniform_ratio(per_layer)])


@torch.no_grad()
def routed(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> tuple[Tensor, Tensor]:
    """Tokens of each expert, and the sum over them of router weight times norm of the output.

    fp32 [experts of all layers] each. Resumes from its journal. Raises GraspError if the loss is
    not finite.
    """
    mixtures = all_routed_experts(model)
    sums, start = torch.zeros(2 * units.experts, device=model.device), 0
    done = journal.load()
    if done is not None:
        sums, start = done["sums"].to(sums.device), int(done["step"])
    seen = torch.zeros_like(sums)  # of one block
    sizes = [mixture.count for mixture in mixtures]
    tokens, norms = (part.split(sizes) for part in seen.chunk(2))
    with ExitStack() as hooks:
        for mixture, *into in zip(mixtures, tokens, norms, strict=True):
            watch = _Watch(*into)
            hooks.enter_context(mixture.experts.register_forward_pre_hook(watch, with_kwargs=True))

        def of_block(block: Tensor) -> Tensor:  # tokens, norms, the loss
            loss = next_token_loss(model, block[None].to(model.device))
            return torch.cat([seen, loss[None]])

        for step, found in enumerate(in_order(of_block, blocks[start:]), start + 1):
            loss = finite_mean([found[-1]], step)
            sums = sums + found[:-1]
            journal.progress(step, len(blocks), loss, blocks.shape[1])
            state = {"sums": sums, "step": torch.tensor(step)}
            journal.save(state.copy, final=step == len(blocks))
    tokens_of, norms_of = sums.chunk(2)
    return tokens_of, norms_of


class _Watch:
    """A pre-hook on a layer's experts that writes the sums of a forward pass into its tensors.

    The output of a token's k-th expert is what the module computes for that expert alone, with
    weight 1.
    """

    def __init__(self, tokens: Tensor, norms: Tensor) -> None:
        self._tokens, self._norms = tokens, norms

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, weights = [*args, *kwargs.values()]  # [tokens, hidden], [tokens, k] twice
        tokens, norms = torch.zeros(2, len(self._tokens), device=hidden.device)
        for own, weight in zip(index.split(1, 1), weights.split(1, 1), strict=True):
            output = type(module).forward(module, hidden, own, torch.ones_like(weight))
            norm = output.float().norm(dim=1) * weight[:, 0].float()
            tokens.index_add_(0, own[:, 0], torch.ones_like(norm))
            norms.index_add_(0, own[:, 0], norm)
        self._tokens.copy_(tokens)
        self._norms.copy_(norms)
