"""Magnitude: the mean squared weight of a unit; a mean makes channels and groups comparable."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from grasp.model.units import UnitSpace
from grasp.select.weights import unit_means


def magnitude_scores(model: PreTrainedModel, units: UnitSpace) -> Tensor:
    """Return scores, fp32 [units] on the model's device."""
    return unit_means(model, units, lambda weight: weight.float().square())
