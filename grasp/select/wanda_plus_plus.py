"""Wanda++ on units: mean over rows of (alpha G_ij + ||X_j||) |W_ij|, G a block's own gradient.

Source: Wanda++ (arXiv 2503.04992), the regional gradient score, which `grasp sparsify` applies to
single weights. Here it is summed over a unit's columns of down_proj and o_proj, as Wanda-sp does
with Wanda's score, at the same ratio in every module. G is the gradient of the norm of the decoder
block's output. Left out: the regional optimisation, which belongs to sparse weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.gates.training import finite_mean
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, fp32_options, layer_options, runner
from grasp.model.load import widened
from grasp.model.places import device_of
from grasp.model.units import UnitSpace, decoder_layers
from grasp.select.ratio import uniform_ratio
from grasp.sparsity.blocks import Block
from grasp.sparsity.methods import regional_factors


@torch.no_grad()
def wanda_plus_plus_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return scores in (0, 1), fp32 [units] on the model's device.

    blocks: int64 [samples, seq_len]. Extra memory: a decoder block in fp32 with two gradients of
    its down_proj and o_proj, and all hidden states before and after it.
    """
    done = journal.load()
    if done is not None:
        return done["wanda++"].to(model.device)
    layers, modules_of = model.get_decoder().layers, decoder_layers(model)
    options = layer_options(model, blocks[:1])
    hidden = first_hidden(model, blocks).float()
    dense = torch.empty_like(hidden)
    raw = []
    for index, (layer, kwargs, modules) in enumerate(zip(layers, options, modules_of, strict=True)):
        run = runner(layer, fp32_options(kwargs))
        hidden, dense = hidden.to(device_of(layer)), dense.to(device_of(layer))
        linears = {str(place): linear for place, linear in enumerate(modules.outputs)}
        counts = [n for n in (units.layers[index].ffn, units.layers[index].kv_groups) if n]
        with widened(layer, torch.float32):
            factors = regional_factors(Block(linears, run, hidden, dense))
            for linear, factor, n in zip(linears.values(), factors, counts, strict=True):
                raw.append((factor * linear.weight.abs()).mean(0).view(n, -1).sum(1))
        hidden, dense = dense, hidden
        norm = finite_mean([hidden.norm(dim=(1, 2)).mean()], index + 1)
        journal.progress(index + 1, len(layers), norm, blocks.numel())
    scores = uniform_ratio(raw)
    journal.save(lambda: {"wanda++": scores}, final=True)
    return scores
