"""Gated ops for structured pruning: a gate per FFN channel and per KV group, the projection of
their scores onto an exact budget, and the loss that they learn from.

Every op runs on CPU tensors through plain PyTorch and on CUDA tensors through Triton kernels.
"""

from grasp_kernels import reference
from grasp_kernels.attention import gated_attention
from grasp_kernels.cross_entropy import linear_cross_entropy
from grasp_kernels.projection import Selection, budget_topk
from grasp_kernels.swiglu import gated_swiglu, gated_swiglu_ffn

__all__ = [
    "Selection",
    "budget_topk",
    "gated_attention",
    "gated_swiglu",
    "gated_swiglu_ffn",
    "linear_cross_entropy",
    "reference",
]
