"""Gated ops for structured pruning.

They are gates per FFN channel and per KV group, channel scales, the projection of scores onto an
exact budget, and the loss to train them with. Every op runs on CPU tensors through plain PyTorch
and on CUDA tensors through Triton kernels.
"""

from grasp_kernels import reference
from grasp_kernels.attention import gated_attention
from grasp_kernels.cross_entropy import linear_cross_entropy, linear_distillation
from grasp_kernels.modules import ChannelScale, GatedAttention, GatedSwiGLUFFN, apply
from grasp_kernels.projection import Selection, budget_topk
from grasp_kernels.scale import channel_scale, rms_norm_scale
from grasp_kernels.swiglu import gated_swiglu, gated_swiglu_ffn

__version__ = "0.1.0"
__all__ = [
    "ChannelScale",
    "GatedAttention",
    "GatedSwiGLUFFN",
    "Selection",
    "apply",
    "budget_topk",
    "channel_scale",
    "gated_attention",
    "gated_swiglu",
    "gated_swiglu_ffn",
    "linear_cross_entropy",
    "linear_distillation",
    "reference",
    "rms_norm_scale",
]
