"""The ops as modules, and one call that gates a model.

Gates and scales are parameters; everything else is frozen.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels._checks import expect
from grasp_kernels.attention import gated_attention
from grasp_kernels.scale import channel_scale
from grasp_kernels.swiglu import gated_swiglu_ffn

NAMES = ("gate_proj", "up_proj", "down_proj")


class GatedSwiGLUFFN(nn.Module):
    """Gated FFN with frozen linear layers: ((silu(x Wg^T) * (x Wu^T)) * gate) Wd^T.

    `gate` is fp32 [F], initially ones. `max_kept`, an upper bound on its non-zero entries, saves a
    host sync on CUDA; see `gated_swiglu_ffn`.
    """

    def __init__(self, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear):
        super().__init__()
        for name, linear in zip(NAMES, (gate_proj, up_proj, down_proj), strict=True):
            expect(linear.bias is None, f"{name} has a bias, which gated_swiglu_ffn does not add")
        self.gate_proj = gate_proj.requires_grad_(False)
        self.up_proj = up_proj.requires_grad_(False)
        self.down_proj = down_proj.requires_grad_(False)
        width, device = gate_proj.out_features, gate_proj.weight.device
        self.gate = nn.Parameter(torch.ones(width, device=device))
        self.max_kept: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return gated_swiglu_ffn(x, *weights, self.gate, max_kept=self.max_kept)


class GatedAttention(nn.Module):
    """Grouped-query attention with a gate per KV group: `gate` is fp32 [K], initially ones."""

    def __init__(self, kv_heads: int, *, causal: bool = True, scale: float | None = None):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(kv_heads))
        self.causal, self.scale = causal, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, S, D], k and v [B, K, S, D] -> [B, H, S, D]."""
        return gated_attention(q, k, v, self.gate, causal=self.causal, scale=self.scale)


class ChannelScale(nn.Module):
    """x * scale: `scale` is fp32 [channels], initially ones."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] -> the same shape."""
        return channel_scale(x, self.scale)


def apply(model: nn.Module) -> dict[str, GatedSwiGLUFFN]:
    """Gate every SwiGLU FFN of `model` in place; return the gated modules by name.

    An FFN is a module with linear layers gate_proj, up_proj and down_proj without biases, and SiLU
    as act_fn, as in Llama, Mistral and Qwen. Its parameters keep their names, and `gate` is added.
    The whole model is frozen except for the gates.

    Raises:
        ValueError: the model has no such FFN, is one itself, or has one that computes more.
    """
    modules = model.named_modules(remove_duplicate=False)  # one FFN may have several names
    found = {name: module for name, module in modules if _is_swiglu(module)}
    kind = type(model).__name__
    expect(bool(found), f"{kind} has no FFN of gate_proj, up_proj, down_proj, SiLU")
    expect("" not in found, f"{kind} is an FFN itself: use GatedSwiGLUFFN")
    of = {
        ffn: GatedSwiGLUFFN(*(getattr(ffn, linear) for linear in NAMES)) for ffn in found.values()
    }
    for name, ffn in found.items():
        expect(
            _compute_the_same(ffn, of[ffn]),
            f"{name} ({type(ffn).__name__}) computes more than a SwiGLU FFN: gate it by hand",
        )
    model.requires_grad_(False)
    for name, ffn in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, of[ffn])
    return {name: of[ffn] for name, ffn in found.items()}


@torch.no_grad()
def _compute_the_same(ffn: nn.Module, gated: GatedSwiGLUFFN) -> bool:
    """Whether both give the same on rows of several sizes: some families multiply or clamp."""
    weight = gated.gate_proj.weight
    if weight.is_meta:
        return True
    sizes = torch.tensor([[0.1], [1.0], [10.0], [100.0]])
    x = sizes * torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight)
    want, got = ffn(x).double(), gated(x).double()
    errors = (want - got).norm(dim=1) / want.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return bool((errors < torch.finfo(x.dtype).eps ** 0.5).all())


def _is_swiglu(module: Any) -> bool:
    linears = [getattr(module, name, None) for name in NAMES]
    if not all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
        return False
    activation = type(getattr(module, "act_fn", None)).__name__
    return activation.startswith("SiLU") and len(list(module.children())) <= len(NAMES) + 1
