"""Edits: the changes that pruning makes to a model's weights, as values.

Each edit is applied to the model in memory as soon as it is known. If that model was rounded to a
narrower dtype, all edits are applied once more to the weights as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.compress.biases import add_biases
from grasp.compress.fold import fold_mask
from grasp.config import ScaleKind
from grasp.gates.scales import fold_scales
from grasp.model.units import decoder_layers


class Edit(Protocol):
    """A change of a model's weights."""

    def apply(self, model: PreTrainedModel) -> None:
        """Change the weights of `model` in place."""


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply scales into the weights: fp32, in the order of `Scales.set`."""

    kind: ScaleKind
    values: Tensor

    def apply(self, model: PreTrainedModel) -> None:
        fold_scales(model, self.kind, self.values)


@dataclass(frozen=True, eq=False)
class Cut:
    """Remove the units that a mask drops."""

    mask: Mask

    def apply(self, model: PreTrainedModel) -> None:
        fold_mask(model, self.mask)


@dataclass(frozen=True, eq=False)
class Refit:
    """Replace the kept columns of down_proj and o_proj by those that `refit` returned."""

    columns: list[Tensor]

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        linears = [linear for modules in decoder_layers(model) for linear in modules.outputs]
        for linear, columns in zip(linears, self.columns, strict=True):
            linear.weight.copy_(columns)


@dataclass(frozen=True, eq=False)
class Layers:
    """Replace all weights of the cut layers, as they are in a model."""

    weights: list[dict[str, Tensor]]  # of each layer, on the CPU

    @classmethod
    def of(cls, model: PreTrainedModel) -> Layers:
        layers = model.get_decoder().layers
        return cls([{n: p.to("cpu", copy=True) for n, p in x.named_parameters()} for x in layers])

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        for layer, weights in zip(model.get_decoder().layers, self.weights, strict=True):
            for name, parameter in layer.named_parameters():
                parameter.copy_(weights[name])


@dataclass(frozen=True, eq=False)
class Bias:
    """Add biases to down_proj and o_proj, as `mean_biases` gives them."""

    values: list[Tensor]

    def apply(self, model: PreTrainedModel) -> None:
        add_biases(model, self.values)
