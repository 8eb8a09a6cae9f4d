"""Gates on a live model: one factor per unit on the inputs of `down_proj` and `o_proj`.

`with gated(model, space) as gates:` patches this instance only, and restores it on exit. FFN
modules get an instance-level `forward`. Attention runs through a function registered with
transformers' AttentionInterface, so no model family's attention code is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from grasp.config import GateSite
from grasp.gates.experts import gated_router
from grasp.model.patched import patched
from grasp.model.places import device_of
from grasp.model.sharding import own_part
from grasp.model.units import FFN, UnitSpace, decoder_layers
from grasp_kernels import gated_attention, gated_swiglu_ffn
from grasp_kernels.attention import has_backend

# Gemma 2's softcap is in its family's own eager attention only; every other model runs SDPA
SDPA, EAGER = "grasp_gated", "grasp_gated_eager"


class Gate(NamedTuple):
    """What a patched module reads: `z` [units of the module], and how many of them may be open."""

    z: Tensor
    open_count: int
    site: GateSite


class Gates:
    """The gates of a patched model. Values keep their graph, so gradients reach every unit."""

    def __init__(self, model: PreTrainedModel, space: UnitSpace, site: GateSite) -> None:
        self._layers = decoder_layers(model)
        self._sizes = space.sizes
        self._ends = torch.tensor(self._sizes, device=model.device).cumsum(0)
        self._site = site
        self.set(torch.ones(space.size, device=model.device))

    def set(self, values: Tensor, open_counts: Sequence[int] | None = None) -> None:
        """Set all gates, [units] in the order of UnitSpace: 0/1 masks or any scales.

        `open_counts` is the result of `count` for these values; with it, closed units are skipped.
        On a CPU they are always skipped.
        """
        pieces = iter(values.split(self._sizes))
        counts = iter(self._sizes if open_counts is None else open_counts)
        for modules in self._layers:
            for part in (modules.ffn, modules.attention):
                piece, count = next(pieces), next(counts)
                if part is not None:
                    _set(part.module, piece, count, self._site)
        for modules in self._layers:
            piece, count = next(pieces), next(counts)
            if modules.routed is not None:
                _set(modules.routed.router, piece, count, self._site)

    def count(self, values: Tensor) -> list[int]:
        """The number of nonzero gates of each of `UnitSpace.sizes`; waits for a GPU once."""
        upto = F.pad((values != 0).cumsum(0), (1, 0))[self._ends]
        return upto.diff(prepend=upto.new_zeros(1)).tolist()


def _set(module: Any, values: Tensor, open_count: int, site: GateSite) -> None:
    module.grasp_gate = Gate(values.to(device_of(module)), open_count, site)


@contextmanager
def gated(model: PreTrainedModel, space: UnitSpace, site: GateSite = "output") -> Iterator[Gates]:
    """Put gates of 1 on every unit of `model`, and remove them on exit.

    `site="kv"` multiplies K (after RoPE) and V by the gate, as the published code does, instead of
    the attention's output. For a hard mask the forward pass is the same; the gradient differs.
    """
    decoder: Any = model.get_decoder()  # of a model that sees images, not the part that sees
    before = decoder.config._attn_implementation
    layers = decoder_layers(model)
    ffns = [m.ffn for m in layers if m.ffn is not None]
    attentions = [m.attention.module for m in layers if m.attention is not None]
    routers = [m.routed.router for m in layers if m.routed is not None]
    down = [w for f in ffns if _fused(f) and (w := f.down.weight).device.type != "cpu"]
    down = [w for w in down if own_part(w) is w]  # a sharded one is gathered as it is stored
    gates = Gates(model, space, site)
    hooks = ExitStack()
    try:
        decoder.set_attn_implementation(EAGER if before == "eager" else SDPA)
        for router in routers:
            hooks.enter_context(gated_router(router, partial(_values, router)))
        for ffn in ffns:
            if _fused(ffn):
                hooks.enter_context(patched(ffn.module, _fused_forward(ffn)))
            else:
                hooks.enter_context(ffn.down.register_forward_pre_hook(_on_channels(ffn)))
        for w in down:  # one by one: same values, but each channel contiguous in memory
            w.data = w.data.t().contiguous().t()
        yield gates
    finally:
        hooks.close()
        for w in down:
            w.data = w.data.contiguous()
        decoder.set_attn_implementation(before)
        for module in (*(ffn.module for ffn in ffns), *attentions, *routers):
            del module.grasp_gate


def _fused(ffn: FFN) -> bool:
    """Whether `gated_swiglu_ffn` computes an FFN, as far as the module says."""
    linears = (ffn.gate.linear, ffn.up.linear, ffn.down)
    is_silu = isinstance(ffn.activation, nn.SiLU | SiLUActivation)
    # Falcon-H1's FFN multiplies by constants, too
    plain = all(v == 1 for k, v in vars(ffn.module).items() if k.endswith("multiplier"))
    return is_silu and plain and all(linear.bias is None for linear in linears)


def _fused_forward(ffn: FFN) -> Any:
    def forward(x: Tensor) -> Tensor:
        gate: Gate = ffn.module.grasp_gate
        weights = ffn.gate.weight, ffn.up.weight, ffn.down.weight
        most = None if x.device.type == "cpu" else gate.open_count
        return gated_swiglu_ffn(x, *weights, gate.z, max_kept=most)

    return forward


def _on_channels(ffn: FFN) -> Any:
    """A pre-hook of `down` that multiplies its input by the gates."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return (args[0] * ffn.module.grasp_gate.z).to(args[0].dtype)

    return hook


def _values(module: Any) -> Tensor:
    values: Tensor = module.grasp_gate.z
    return values


def _attention_forward(
    module: Any,
    query: Tensor,  # [B, H, S, D]
    key: Tensor,  # [B, K, S, D]
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if not hasattr(module, "grasp_gate"):  # its heads stay whole
        whole, _ = _inner(module)(module, query, key, value, attention_mask, **kwargs)
        return whole, None
    z, open_count, site = module.grasp_gate
    if site == "output" and _takes_kernel(module, query, attention_mask):
        scale = kwargs.get("scaling")
        out = gated_attention(query, key, value, z, scale=scale, max_kept=open_count)
        return out.transpose(1, 2), None
    if site == "kv":
        per_group = z[:, None, None]
        key, value = ((t * per_group).to(t.dtype) for t in (key, value))
    out, _ = _inner(module)(module, query, key, value, attention_mask, **kwargs)
    if site == "output":  # out: [B, S, H, D]
        out = (out * z.repeat_interleave(out.shape[2] // len(z))[:, None]).to(out.dtype)
    return out, None


def _takes_kernel(module: Any, query: Tensor, attention_mask: Tensor | None) -> bool:
    """True for plain causal attention on a GPU; on a CPU, PyTorch's own attention is faster."""
    plain = module.config._attn_implementation == SDPA and attention_mask is None
    return plain and _kernel_is_faster(query)


def _kernel_is_faster(query: Tensor) -> bool:
    return query.device.type != "cpu" and has_backend(query)


def _inner(module: Any) -> Any:
    if module.config._attn_implementation == SDPA:
        return sdpa_attention_forward
    return sys.modules[type(module).__module__].eager_attention_forward


def unpadded(ids: Tensor) -> Tensor:
    """A padding mask of ones, bool in the shape of `ids`, marked as such for a gated model.

    In each forward pass, transformers checks whether sequences are packed (without a mask) or
    whether the mask is all true. Either check makes a GPU wait; the mark makes it unnecessary.
    """
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask.grasp_unpadded = True  # type: ignore[attr-defined]
    return mask


def _unless_unpadded(make: Any, **kwargs: Any) -> Any:
    """The mask that `make` builds, or None if an unpadded sequence is plainly causal.

    transformers finds this out itself, but not while a CUDA graph is captured. It would then build
    a mask, and the graph would always run masked attention.
    """
    if hasattr(kwargs["attention_mask"], "grasp_unpadded"):
        kwargs["attention_mask"] = None
        window = kwargs.get("local_size")
        if (
            make is sdpa_mask
            and kwargs.get("allow_is_causal_skip", True)
            and (window is None or kwargs["kv_length"] < window)
        ):
            return None
    return make(**kwargs)


for name, mask in ((SDPA, sdpa_mask), (EAGER, eager_mask)):
    AttentionInterface.register(name, _attention_forward)
    AttentionMaskInterface.register(name, partial(_unless_unpadded, mask))
