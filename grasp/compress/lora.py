"""LoRA (arXiv 2106.09685): low-rank updates of linear layers, merged into the weights later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grasp.model.patched import patched
from grasp.model.units import decoder_layers

SCALE = 2.0  # of the update: alpha / rank, with an alpha of twice the rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """An update of a frozen linear layer. down: fp32 [rank, in]; up: fp32 [out, rank], from 0."""

    linear: Any
    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, linear: Any, rank: int, generator: torch.Generator) -> Adapter:
        outputs, inputs = linear.weight.shape
        down = (2 * torch.rand(rank, inputs, generator=generator) - 1) * inputs**-0.5
        pair = (
            t.to(linear.weight.device).requires_grad_() for t in (down, torch.zeros(outputs, rank))
        )
        return cls(linear, *pair)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.down), self.up)
        return F.linear(x, self.linear.weight, self.linear.bias) + SCALE * update

    @torch.no_grad()
    def merge(self) -> None:
        weight = self.linear.weight
        weight.copy_(weight.float() + SCALE * self.up @ self.down)


@contextmanager
def adapted(model: PreTrainedModel, rank: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Within the context, every linear layer of the decoder layers has an adapter.

    Gives the adapters' tensors by name. On exit they are merged, and no parameter is added.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    adapters = [Adapter.of(linear, rank, generator) for linear in linears]
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(patched(adapter.linear, adapter.forward))
        yield {
            f"{index}.{name}": getattr(adapter, name)
            for index, adapter in enumerate(adapters)
            for name in ("down", "up")
        }
        for adapter in adapters:
            adapter.merge()
