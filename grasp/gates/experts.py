"""Gates on routed experts: a factor on an expert's output, and no token for a closed one.

Only the router is patched, on this instance. While an expert's gate is 0 its router logit is minus
infinity, so the tokens go to the others, as they do once it is cut. The gate multiplies the weight
that the router gives to the expert's output. So no family's code is copied.

A closed expert would get no gradient and could never come back. So while gates learn, each token
also visits the experts that it would have been routed to if all were open. They add nothing, as the
gates of the closed ones are 0, but those gates have the gradient of the way from the present routes
to those of the open model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grasp.model.patched import patched
from grasp.model.places import device_of
from grasp.model.units import LayerModules


def gated_router(router: Any, gates: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Put gates on the experts of a router, fp32 [experts], read in every forward pass."""
    return patched(router, _gated(router, gates))


def _gated(router: Any, gates: Callable[[], Tensor]) -> Any:
    whole = router.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        z = gates()
        closed = z.detach() == 0
        with _closed(router, closed):
            logits, weights, index = whole(*args, **kwargs)
        weights = (weights * z[index]).to(weights.dtype)
        # a GPU would have to wait for the answer
        if z.requires_grad and (closed.device.type != "cpu" or bool(closed.any())):
            _, would, picked = whole(*args, **kwargs)
            shut = closed[picked]
            # what opens takes its part of the way from the present routes to these: 0 in value
            part = (z[picked] * shut).sum(-1, keepdim=True) / shut.sum(-1, keepdim=True).clamp(
                min=1
            )
            would = (would * torch.where(shut, z[picked], part)).to(weights.dtype)
            weights = (weights * (1 - part)).to(weights.dtype)
            weights, index = torch.cat([weights, would], -1), torch.cat([index, picked], -1)
        return logits, weights, index

    return forward


@contextmanager
def closed_experts(modules: LayerModules, kept: Tensor) -> Iterator[None]:
    """Within the context, a layer routes no token to other experts than `kept`, int64 indices."""
    if modules.routed is None:
        yield
        return
    router = modules.routed.router
    gates = torch.zeros(modules.routed.count, device=device_of(router))
    gates[kept.to(gates.device)] = 1
    with gated_router(router, lambda: gates):
        yield


@contextmanager
def _closed(router: nn.Module, closed: Tensor) -> Iterator[None]:
    """Within the context, closed experts have a router logit of minus infinity.

    Some routers add a bias per expert after a sigmoid, to choose but not to weigh: it is minus
    infinity too.
    """
    buffers = {n: b for n, b in router._buffers.items() if b is not None}
    try:
        for name, buffer in buffers.items():
            router._buffers[name] = buffer.masked_fill(closed, -torch.inf)
        with _ClosedLogits(closed):
            yield
    finally:
        router._buffers.update(buffers)


class _ClosedLogits(TorchFunctionMode):
    """Masks the output of the router's linear layer, the only one that it calls."""

    def __init__(self, closed: Tensor) -> None:
        super().__init__()
        self._closed = closed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.masked_fill(self._closed, -torch.inf) if func is F.linear else out
