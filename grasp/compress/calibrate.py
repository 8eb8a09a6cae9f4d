"""Calibration: scales learned on the pruned model and folded into its weights.

gamma = 1 + 0.5 tanh(theta), theta from 0, mask frozen (GRASPrune, arXiv 2604.19398, section 3.4).
Scales are learned on the model after the cut: the same function, at the cost of the pruned model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.config import ScaleKind
from grasp.gates.scales import scale, scale_count, scaled
from grasp.gates.training import TrainSettings, train_gates
from grasp.journal import Journal
from grasp.model.units import UnitSpace


def learn_scales(
    model: PreTrainedModel,
    kind: ScaleKind,
    blocks: Tensor,
    settings: TrainSettings,
    journal: Journal,
    teacher: Tensor | None = None,
) -> Tensor:
    """Learn scales in (0.5, 1.5) for `fold_scales`, fp32.

    blocks: int64 [samples, seq_len]; `teacher`: their `last_hidden` of the dense model, or None.
    """
    count = scale_count(model, kind)
    theta = torch.zeros(count, device=model.device)
    with scaled(model, UnitSpace.of(model), kind) as live:
        theta = train_gates(
            model,
            live,
            theta,
            lambda t, _: scale(t),
            blocks,
            settings,
            journal,
            scales=count,
            teacher=teacher,
        )
    return scale(theta)
