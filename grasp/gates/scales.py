"""Scales on a live model: factors on channels, which fold into its weights.

The paper (GRASPrune, arXiv 2604.19398, section 3.4) has one scale per unit, at the place of its
gate. Our kind "channel" adds one per channel at the other ends of the linear layers, except the
outputs of gate_proj: W becomes diag(r) W diag(c). These scales fold too, so they cost nothing at
inference and add no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.config import GateSite, ScaleKind
from grasp.gates.gating import Gates, gated
from grasp.gates.norms import norms_before
from grasp.model.places import device_of
from grasp.model.units import UnitSpace, decoder_layers
from grasp_kernels import channel_scale


@dataclass(frozen=True)
class End:
    """The input shared by `linears`, or the output of one, and the modules to hook for it."""

    side: Literal["in", "out"]
    linears: tuple[nn.Linear, ...]
    modules: tuple[nn.Module, ...]

    @property
    def channels(self) -> int:
        rows, columns = self.linears[0].weight.shape
        return columns if self.side == "in" else rows


class Scales:
    """Gates and scales of a patched model. Values keep their graph, so gradients reach them all."""

    def __init__(self, gates: Gates, units: int, places: list[End]) -> None:
        self._gates, self._units = gates, units
        self._sizes = [end.channels for end in places]
        self._devices = [device_of(end.linears[0]) for end in places]
        self._pieces: tuple[Tensor, ...] = ()

    def set(self, values: Tensor, open_counts: list[int] | None = None) -> None:
        """Set [units + channels]: gates in the order of UnitSpace, scales in that of `ends`."""
        gates, scales = values.split([self._units, sum(self._sizes)])
        self._gates.set(gates, open_counts)
        pieces = zip(scales.split(self._sizes), self._devices, strict=True)
        self._pieces = tuple(piece.to(device) for piece, device in pieces)

    def at(self, place: int) -> Tensor:
        """The scales of one of the `ends`, [channels]."""
        return self._pieces[place]

    def count(self, values: Tensor) -> list[int]:
        """As `Gates.count`."""
        return self._gates.count(values[: self._units])


@contextmanager
def scaled(
    model: PreTrainedModel, space: UnitSpace, kind: ScaleKind, site: GateSite = "output"
) -> Iterator[Scales]:
    """Put gates and scales of 1 on `model`, and remove them on exit.

    A scale is one op per tensor that it multiplies. If a plain RMSNorm outputs that tensor, the
    scale is part of the norm.
    """
    places = ends(model, kind)
    norms = norms_before(model, [end.linears for end in places if end.side == "in"])
    with gated(model, space, site) as gates, ExitStack() as added:
        scales = Scales(gates, space.size, places)
        scales.set(torch.ones(scale_count(model, kind), device=model.device))
        for place, end in enumerate(places):
            scale = partial(scales.at, place)
            if end.side == "out":
                (module,) = end.modules
                added.enter_context(module.register_forward_hook(_on_output(scale)))
            elif end.linears in norms:
                added.enter_context(norms[end.linears].scaled(scale))
            else:
                once = _OnInput(scale, len(end.modules))
                for module in end.modules:
                    added.enter_context(module.register_forward_pre_hook(once))
        yield scales


def _on_output(scale: Callable[[], Tensor]) -> Callable[..., Tensor]:
    return lambda _, args, output: channel_scale(output, scale())


class _OnInput:
    """A pre-hook on modules that share an input; it multiplies the input once for all of them."""

    def __init__(self, scale: Callable[[], Tensor], readers: int) -> None:
        self._scale, self._readers = scale, readers
        self._left = 0
        self._of: tuple[Tensor, Tensor] | None = None  # the input and its product, while needed

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        if self._of is None or self._of[0] is not args[0]:
            self._of, self._left = (args[0], channel_scale(args[0], self._scale())), self._readers
        product = self._of[1]
        self._left -= 1
        if not self._left:
            self._of = None
        return product


def scale_count(model: PreTrainedModel, kind: ScaleKind) -> int:
    """The number of scales: one per unit of the model, and one per channel of its `ends`."""
    return UnitSpace.of(model).size + sum(end.channels for end in ends(model, kind))


def ends(model: PreTrainedModel, kind: ScaleKind) -> list[End]:
    """The places of scales besides the gates, in depth order; none for "unit"."""
    if kind == "unit":
        return []
    found = []
    for m in decoder_layers(model):
        if m.attention is not None:
            qkv, out = m.attention.inputs, (m.attention.out,)
            found += [End("in", qkv, qkv), *(End("out", (x,), (x,)) for x in qkv)]
            found += [End("in", out, out), End("out", out, out)]
        if m.ffn is not None:
            # the gated FFN runs as one op, which calls none of its linear layers
            ffn, down = (m.ffn.module,), (m.ffn.down,)
            found += [End("in", m.ffn.inputs, ffn), End("out", down, ffn)]
    return found


def scale(theta: Tensor) -> Tensor:
    """Map unbounded `theta` to scales in (0.5, 1.5); 0 gives 1."""
    return 1 + 0.5 * torch.tanh(theta)


@torch.no_grad()
def fold_scales(model: PreTrainedModel, kind: ScaleKind, scales: Tensor) -> None:
    """Multiply scales into the weights in place: fp32 [`scale_count`], in `Scales.set` order."""
    layers, space, places = decoder_layers(model), UnitSpace.of(model), ends(model, kind)
    factors: dict[Tensor, list[Tensor]] = {}  # of each weight, which is rounded once

    def multiply(weight: Tensor, by: Tensor) -> None:
        factors.setdefault(weight, []).append(by)

    per_unit, *pieces = scales.split([space.size, *(end.channels for end in places)])
    for m, (index, ffn, kv) in zip(layers, space.segments(), strict=True):
        units = space.layers[index]
        if m.ffn is not None:
            multiply(m.ffn.down.weight, per_unit[ffn])
        if m.attention is not None:
            per_head_dim = per_unit[kv].repeat_interleave(units.group_size * units.head_dim)
            multiply(m.attention.out.weight, per_head_dim)
    for m, (_, experts) in zip(layers, space.expert_segments(), strict=True):
        for parameter in m.routed.down if m.routed else ():
            multiply(parameter, per_unit[experts].view(-1, *[1] * (parameter.dim() - 1)))
    for end, piece in zip(places, pieces, strict=True):
        for linear in end.linears:
            multiply(linear.weight, piece if end.side == "in" else piece[:, None])
            if end.side == "out" and linear.bias is not None:
                multiply(linear.bias, piece)
    for weight, found in factors.items():
        product = weight.float()
        for factor in found:
            product = product * factor.to(weight.device)
        weight.copy_(product)
