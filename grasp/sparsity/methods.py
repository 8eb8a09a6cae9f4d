"""Methods that sparsify the linear layers of a decoder block in place.

Each drops the weights with the lowest scores in each group of the pattern. The scores:

- magnitude: |W_ij|
- wanda (arXiv 2306.11695): |W_ij| ||X_j||, with X_j the input j of a linear layer; the norm is over
  the tokens of a sample, then root mean square over samples
- sparsegpt (arXiv 2301.00774): see sparsegpt.py
- wanda++ (arXiv 2503.04992): (alpha G_ij + ||X_j||) |W_ij|, with G a gradient of the block; then a
  few optimiser steps bring the block's outputs back towards the dense outputs
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp.budget.pattern import Pattern
from grasp.config import SparsifyConfig
from grasp.sparsity.blocks import Block, Method
from grasp.sparsity.sparsegpt import sparsegpt

ALPHA = 100.0  # weight of gradients relative to activations in Wanda++


def method_of(config: SparsifyConfig) -> Method:
    """Return the function for `config.method`."""
    methods: dict[str, Method] = {
        "magnitude": by_magnitude,
        "wanda": by_wanda,
        "sparsegpt": by_sparsegpt,
        "wanda++": partial(by_wanda_plus_plus, rounds=config.rounds, lr=config.lr),
    }
    return methods[config.method]


def by_magnitude(block: Block, pattern: Pattern, generator: torch.Generator) -> None:
    """Prune the smallest weights."""
    block.run_dense()
    for linear in block.linears.values():
        _prune(linear.weight, pattern, linear.weight.abs())


def by_wanda(block: Block, pattern: Pattern, generator: torch.Generator) -> None:
    """Prune the smallest |W_ij| ||X_j|| (arXiv 2306.11695)."""
    powers = {name: torch.zeros_like(m.weight[0]) for name, m in block.linears.items()}
    block.run_dense(lambda name, x: powers[name].add_(x.square().sum(0)))
    for name, linear in block.linears.items():
        _prune(linear.weight, pattern, powers[name].sqrt() * linear.weight.abs())


def by_sparsegpt(block: Block, pattern: Pattern, generator: torch.Generator) -> None:
    """Prune and update weights with `sparsegpt` (arXiv 2301.00774)."""
    grams = {n: m.weight.new_zeros(2 * m.weight.shape[1:]) for n, m in block.linears.items()}
    block.run_dense(lambda name, x: grams[name].addmm_(x.T, x))
    for name, linear in block.linears.items():
        linear.weight.copy_(sparsegpt(linear.weight, grams[name], pattern))


@torch.enable_grad()
def regional_factors(block: Block, alpha: float = ALPHA) -> list[Tensor]:
    """Run the dense block; return alpha G_ij + ||X_j|| of each linear layer, fp32 [out, in].

    G is the gradient of ||f(x)||, with f the block; root mean square over samples.
    """
    samples = len(block.hidden)
    weights = [linear.weight.requires_grad_() for linear in block.linears.values()]
    powers = {name: torch.zeros_like(m.weight[0]) for name, m in block.linears.items()}
    gradients = [torch.zeros_like(weight, requires_grad=False) for weight in weights]

    def add_gradients(output: Tensor) -> None:
        if not weights:
            return
        of_sample = torch.autograd.grad(torch.linalg.vector_norm(output), weights)
        for total, gradient in zip(gradients, of_sample, strict=True):
            total += gradient.square() / samples

    block.run_dense(lambda name, x: powers[name].add_(x.square().sum(0) / samples), add_gradients)
    for weight in weights:
        weight.requires_grad_(False)
    return [alpha * g.sqrt() + p.sqrt() for g, p in zip(gradients, powers.values(), strict=True)]


def by_wanda_plus_plus(
    block: Block,
    pattern: Pattern,
    generator: torch.Generator,
    *,
    rounds: int,
    lr: float,
    alpha: float = ALPHA,
    drawn: int = 32,
) -> None:
    """Prune by `regional_factors`, with regional optimisation (arXiv 2503.04992).

    Each of `rounds` rounds prunes, then takes one RMSprop step per sample on the squared error to
    the dense outputs, for `drawn` random samples. Steps also move pruned weights, so these may come
    back. A final pruning ends the method.

    `lr` is relative, see `step_sizes`.
    """
    factors = regional_factors(block, alpha)
    samples = len(block.hidden)
    weights = [linear.weight.requires_grad_() for linear in block.linears.values()]

    def prune() -> None:
        for weight, factor in zip(weights, factors, strict=True):
            _prune(weight, pattern, factor * weight.abs())

    steps = step_sizes(weights, lr)
    groups = [{"params": w, "lr": step} for w, step in zip(weights, steps, strict=True)]
    optimizer = torch.optim.RMSprop(groups, eps=1e-15)  # the default outweighs small gradients
    for _ in range(rounds):
        prune()
        for sample in torch.randperm(samples, generator=generator)[:drawn].split(1):
            with torch.enable_grad():
                error = F.mse_loss(block.run(block.hidden[sample]), block.dense[sample])
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    prune()
    for weight in weights:
        weight.requires_grad_(False).grad = None


def step_sizes(weights: list[Tensor], lr: float) -> list[float]:
    """How far a step moves each weight of a matrix [out, in]: lr * RMS(W) / sqrt(in).

    So the output of the matrix moves by about `lr` of its size, whatever the scale and the width of
    the model; the first steps, before RMSprop knows the size of the gradients, are up to ten times
    as large. The published rate, 3e-7 for every weight of a 7B, is an `lr` of 1e-3.
    """
    return [lr * float(w.detach().square().mean().sqrt()) / w.shape[1] ** 0.5 for w in weights]


def _prune(weight: Tensor, pattern: Pattern, scores: Tensor) -> None:
    weight.masked_fill_(~pattern.keep(scores), 0.0)
