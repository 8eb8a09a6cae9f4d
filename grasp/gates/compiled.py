"""Compile RMSNorm and RoPE into one kernel each; uncompiled, they launch some ten per layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp.errors import reason

ROPE = "apply_rotary_pos_emb"  # its name in each family of transformers
VARIANTS = 64  # of one function, by shapes and gradients; all norms of a process share them


@contextmanager
def compiled(model: PreTrainedModel, note: Callable[[str], None]) -> Iterator[None]:
    """Within the context, compile the norms of this instance and the RoPE of its family.

    If a norm does not compile, forward or backward, `note` receives the reason in one line and
    nothing is compiled. Modules without the usual names are left alone. So are norms with an
    instance-level forward: a norm that includes a scale is already a single kernel.
    """
    norms: list[Any] = [
        m
        for m in model.get_decoder().modules()
        if type(m).__name__.endswith("RMSNorm") and "forward" not in vars(m)
    ]
    failure = _failure(norms[0]) if norms else None
    if failure:
        note(f"norms and RoPE run one operation at a time, not compiled: {failure}")
    if failure or not norms:
        yield
        return
    family: ModuleType = sys.modules[type(model.get_decoder()).__module__]
    rope = getattr(family, ROPE, None)
    try:
        for norm in norms:
            norm.forward = torch.compile(norm.forward)
        if rope:
            setattr(family, ROPE, torch.compile(rope))
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)
        if rope:
            setattr(family, ROPE, rope)


def _failure(norm: nn.Module) -> str | None:
    """Why `norm` does not compile, in one line; None if it does."""
    weight: Any = norm.weight
    x = torch.ones_like(weight)[None, None].requires_grad_()
    try:
        torch.compile(norm.forward)(x).sum().backward()
    except Exception as error:  # from any of the compilers behind it
        return reason(error)
    return None
