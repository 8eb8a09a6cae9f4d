"""Find the RMSNorm that feeds given linear layers, so that it can apply a scale on their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from grasp.model.patched import patched
from grasp_kernels import rms_norm_scale

Linears = tuple[nn.Linear, ...]


@dataclass(frozen=True)
class Norm:
    """A frozen module that computes x / sqrt(mean(x^2) + eps) * weight."""

    module: nn.Module
    weight: Tensor  # the factor, [d]: Gemma's is 1 + the stored weight
    eps: float

    def scaled(self, scale: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Multiply its output by `scale()`, [d], in the same op; restored on exit."""
        return patched(self.module, lambda x: rms_norm_scale(x, self.weight, scale(), self.eps))


@torch.no_grad()
def norms_before(model: PreTrainedModel, groups: Sequence[Linears]) -> dict[Linears, Norm]:
    """For each group of linear layers, the norm whose output they all read and nothing else reads.

    Runs the decoder on one token to find out. Groups without such a norm are left out.
    """
    if not groups:
        return {}
    decoder = model.get_decoder()
    norms = [norm for module in decoder.modules() if (norm := _rms_norm(module))]
    readers = _Readers()
    weights: dict[nn.Module, int] = {}  # while a layer runs, since a sharded one has others outside

    def see(linear: nn.Module, _: Any) -> None:
        weights[linear] = id(linear.weight)

    with ExitStack() as hooks:
        for linear in {linear for group in groups for linear in group}:
            hooks.enter_context(linear.register_forward_pre_hook(see))
        for norm in norms:
            hooks.enter_context(norm.module.register_forward_hook(readers.watch))
        with readers:
            decoder(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    fed = {frozenset(map(id, readers.of.get(norm.module, ()))): norm for norm in norms}
    read = {group: frozenset(weights.get(own, 0) for own in group) for group in groups}
    return {group: fed[ids] for group, ids in read.items() if ids in fed}


class _Readers(TorchFunctionMode):
    """Records what reads outputs of watched modules: weights of linear layers, and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[nn.Module, list[Any]] = {}
        self._outputs: dict[int, tuple[Tensor, list[Any]]] = {}  # by id, unique while held

    def watch(self, module: nn.Module, _: Any, output: Tensor) -> None:
        self._outputs[id(output)] = output, self.of.setdefault(module, [])

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(out)):  # not a shape or the like
            for x in tree_leaves((args, kwargs)):
                if id(x) in self._outputs:
                    self._outputs[id(x)][1].append(args[1] if func is F.linear else func)
        return out


def _rms_norm(module: Any) -> Norm | None:
    """`module` as a Norm if it is a plain RMSNorm, tested in fp32 down to where eps matters."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.requires_grad:
        return None
    size = torch.logspace(-4, 1, 6, device=weight.device)[:, None]
    x = size * (torch.arange(6.0 * len(weight), device=weight.device).sin().view(6, -1) + 0.5)
    wide = {name: parameter.float() for name, parameter in module.named_parameters()}
    try:
        want, one = functional_call(module, wide, (x,)), torch.ones_like(x[0])
    except TypeError:  # a norm that takes a gate, too
        return None
    for factor in (weight, 1 + weight.float()):
        if torch.allclose(rms_norm_scale(x, factor, one, eps), want, rtol=1e-5, atol=0):
            return Norm(module, factor, eps)
    return None
