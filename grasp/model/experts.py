"""Mixtures of experts: the routed experts of a decoder layer and the router that picks them.

transformers holds all experts of a layer in one module, whose parameters have one entry per expert
in their first dimension: `gate_up_proj` and `down_proj`, three-dimensional, and perhaps biases. The
router beside it has one row per expert. It returns (logits, weights, indices) of the `top_k`
experts of each token; the output of an expert is multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GROUPED = ("num_group", "n_group")  # what routers call their groups of experts, if they have any
SHARED_WIDTH = "shared_expert_intermediate_size"  # in configs
COUNTED = ("num_experts", "num_local_experts", "n_routed_experts")  # by modules and configs


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of one decoder layer."""

    block: Any  # the layer's FFN, which holds both
    experts: Any  # parameters [experts, ...]
    router: Any  # weight [experts, hidden], perhaps further values per expert

    @property
    def count(self) -> int:
        return int(self.router.weight.shape[0])

    @property
    def per_token(self) -> int:
        return int(self.router.top_k)

    @property
    def width(self) -> int:
        """FFN channels of each expert."""
        size = sum(p[0].numel() for p in self.experts.parameters() if p.dim() == 3)
        return int(size // (3 * self.router.weight.shape[1]))

    @property
    def matrices(self) -> list[Any]:
        """The matrices of experts and router: their first dimension is that of the experts."""
        return [*(p for p in self.experts.parameters() if p.dim() == 3), self.router.weight]

    @property
    def bias(self) -> int:
        """Parameters of an expert and its row of the router that are in vectors."""
        vectors = [p for p in self.experts.parameters() if p.dim() == 2]
        vectors += [p for p in self.router.parameters() if p.dim() == 1]
        return sum(p[0].numel() for p in vectors)

    @property
    def down(self) -> Iterator[Any]:
        """The parameters that an expert's output is linear in: down_proj and its bias."""
        return (p for name, p in self.experts.named_parameters() if name.startswith("down_proj"))


def routed_experts(layer: Any) -> RoutedExperts | None:
    """The mixture among the direct children of a decoder layer; None if it has none of this form.

    Routers that pick groups of experts first are left out: the groups would have to stay equal.
    """
    for block in layer.children():
        experts = block._modules.get("experts")
        count = _gated_experts(experts)
        routers = [m for m in block.children() if m is not experts and _routes(m, count)]
        if count and len(routers) == 1:
            return RoutedExperts(block, experts, routers[0])
    return None


def _gated_experts(experts: Any) -> int:
    """The number of gated FFNs in a module of fused experts; 0 if it is none."""
    own = dict(experts._parameters) if experts is not None else {}
    gate_up, down = own.get("gate_up_proj"), own.get("down_proj")
    if gate_up is None or down is None or experts._modules.keys() - {"act_fn"}:
        return 0
    counts = {p.shape[0] for p in own.values() if p is not None}
    matrices = gate_up.dim() == down.dim() == 3 and gate_up[0].numel() == 2 * down[0].numel()
    return int(counts.pop()) if matrices and len(counts) == 1 else 0


def _routes(module: Any, count: int) -> bool:
    weight = module._parameters.get("weight")
    entries = {p.shape[:1] for p in (*module.parameters(), *module.buffers())}
    return (
        weight is not None
        and weight.dim() == 2
        and entries == {(count,)}
        and isinstance(getattr(module, "top_k", None), int)
        and all(getattr(module, name, 1) in (None, 1) for name in GROUPED)
    )


def say_experts(mixture: RoutedExperts, count: int) -> None:
    """Set the number of experts that modules do not read from their weights."""
    for module in (mixture.block, mixture.experts, mixture.router):
        for name in COUNTED:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, count)


def all_routed_experts(model: Any) -> list[RoutedExperts]:
    """The mixtures of a live model, in depth order."""
    found = map(routed_experts, model.get_decoder().layers)
    return [mixture for mixture in found if mixture is not None]
