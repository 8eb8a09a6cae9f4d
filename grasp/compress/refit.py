"""Refit: the kept columns compensate for the dropped ones by least squares, before the cut.

Let W be the weight of `down_proj` (or `o_proj`), H its input on calibration text, S its kept and R
its dropped columns. The target is W H: the dense module on the input that the pruned layers before
it give. The kept columns become W_S + W_R G[R, S] (G[S, S] + D)^-1, where G is the Gram matrix
H H^T. This is ridge regression towards the present weights. D is `RIDGE` times the diagonal of G,
so that channels of any magnitude are damped alike. Layers are refitted in depth order, each on the
output of the refitted ones before it. The solution is in closed form: no backprop, no parameters
added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.compress.fold import expand, kept_in
from grasp.config import TOKENS_PER_CHANNEL
from grasp.distributed import share, summed, tensor_from_first
from grasp.errors import GraspError
from grasp.gates.experts import closed_experts
from grasp.model.layerwise import first_hidden, inputs_of, layer_options, runner
from grasp.model.units import LayerModules, LayerUnits, decoder_layers

RIDGE = 1e-2


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    mask: Mask,
    blocks: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """Refit o_proj and down_proj of `model` in place to the kept units; dropped columns become 0.

    blocks: int64 [samples, seq_len]; the first are used, up to `TOKENS_PER_CHANNEL` tokens per
    channel of the widest FFN. Returns the kept columns of down_proj and o_proj, layer by layer, in
    fp32 on the CPU, before the model's dtype rounds them. `planning.memory.refit_memory` estimates
    the peak memory. Raises GraspError if activations are not finite.
    """
    if not any(modules.outputs for modules in decoder_layers(model)):
        return []
    blocks = text_of_refit(mask, blocks)
    fitted: list[Tensor] = []
    options, hidden = layer_options(model, blocks[:1]), Hidden.of(model, blocks)
    for index, (modules, units, kept, experts) in enumerate(kept_in(model, mask)):
        run = runner(model.get_decoder().layers[index], options[index])
        with closed_experts(modules, experts):
            fitted += refit_layer(run, modules, units, kept, hidden)
        progress(index + 1, len(options))
    return fitted


def text_of_refit(mask: Mask, blocks: Tensor) -> Tensor:
    """The first blocks, up to `TOKENS_PER_CHANNEL` tokens per channel of the widest FFN."""
    tokens = TOKENS_PER_CHANNEL * mask.space.widest
    return blocks[: math.ceil(tokens / blocks.shape[1])]


@dataclass(frozen=True)
class Hidden:
    """This rank's share of the inputs of a decoder layer: [samples, seq_len, hidden]."""

    states: Tensor
    counted: int  # of the samples, in a sum over ranks

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: Tensor) -> Hidden:
        """The inputs of the first layer; blocks: int64 [samples, seq_len], of all ranks."""
        own, counted = share(blocks)
        return cls(first_hidden(model, own), counted)


def refit_layer(
    run: Callable[[Tensor], Tensor],
    modules: LayerModules,
    units: LayerUnits,
    kept: tuple[Tensor, Tensor],
    hidden: Hidden,
) -> list[Tensor]:
    """Refit the layer that `run` runs, in place, and replace `hidden` by its outputs.

    `kept` are indices of channels and of KV groups. Returns the kept columns as `refit` does.
    """
    own = {}
    for linear, columns in columns_of(modules, units, kept).items():
        gram = linear.weight.new_zeros(2 * linear.weight.shape[1:], dtype=torch.float32)
        for n, x in enumerate(inputs_of(linear, run, hidden.states.split(1))):
            if n < hidden.counted:
                x = x.flatten(0, -2).float()
                gram.addmm_(x.T, x)
        own[linear] = solve(linear, columns, summed(gram)).cpu()
    for x in hidden.states.split(1):
        x.copy_(run(x))
    return [own[linear] for linear in modules.outputs]


def columns_of(
    modules: LayerModules, units: LayerUnits, kept: tuple[Tensor, Tensor]
) -> dict[nn.Linear, Tensor]:
    """The columns of o_proj and down_proj that belong to `kept` channels and KV groups.

    In the order that these linear layers run.
    """
    found = {}
    if modules.attention is not None:
        out = modules.attention.out
        heads = expand(kept[1], units.group_size * units.head_dim)
        found[out] = heads.to(out.weight.device)
    if modules.ffn is not None:
        found[modules.ffn.down] = kept[0].to(modules.ffn.down.weight.device)
    return found


def solve(linear: nn.Linear, kept: Tensor, gram: Tensor) -> Tensor:
    """Refit the columns `kept` (int64) of `linear.weight` [out, in] in place; the others become 0.

    gram: [in, in]. Returns the columns in fp32. Raises GraspError as `ridge_solve` does, and if
    gram is not finite.
    """
    known = gram[kept]
    if not known.isfinite().all():
        raise GraspError("activations are not finite: use `dtype='fp32'` or `compensate='none'`")
    dropped = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    dropped[kept] = False
    lost = known[:, dropped].double() @ linear.weight[:, dropped].T.double()
    taken_over = ridge_solve(known[:, kept].double(), gram.diagonal().mean(), lost, RIDGE).T
    columns = tensor_from_first((linear.weight[:, kept].double() + taken_over).float())
    linear.weight.zero_()
    linear.weight[:, kept] = columns.to(linear.weight.dtype)
    return columns


def ridge_solve(gram: Tensor, power: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Solve (gram + D)^-1 target, [in, out] in fp64 or fp32; overwrites the diagonal of gram.

    D is `ridge` times the diagonal of gram; `power` is the mean of that over all channels, also
    dropped ones. A factorisation that fails is tried again with ten times the ridge, twice. Raises
    GraspError if all fail.
    """
    # a channel that is never active keeps its weight, because the solution is the change
    known = gram.diagonal().clone()
    own = known.clamp(min=power * 1e-9 + torch.finfo(torch.float32).tiny)
    for factor in (1, 10, 100):
        gram.diagonal().copy_(known + factor * ridge * own)
        triangle, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            return torch.cholesky_solve(target, triangle)
    raise GraspError("refit found no solution: use more `samples` or `compensate='none'`")
