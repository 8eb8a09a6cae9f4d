"""The error of a wrong call names the value, what was expected, and the fix."""

import pytest
import torch

from grasp_kernels import (
    budget_topk,
    channel_scale,
    gated_attention,
    gated_swiglu,
    gated_swiglu_ffn,
    linear_cross_entropy,
    linear_distillation,
    rms_norm_scale,
)

A, Z = torch.zeros(3, 8), torch.ones(8)
X, UP, DOWN = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(4, 8)
Q, K, GATE = torch.zeros(1, 6, 5, 4), torch.zeros(1, 2, 5, 4), torch.ones(2)
TARGETS = torch.zeros(3, dtype=torch.int64)
SCORES, COSTS = torch.zeros(4), torch.ones(4, dtype=torch.int64)


def trained(w):
    return w.clone().requires_grad_()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: gated_swiglu(A, A[:2], Z), ValueError, "up has shape .2, 8., expected .*3, 8"),
        (lambda: gated_swiglu(A, A, Z[:5]), ValueError, "z has shape .5., expected .8.: one gate"),
        (lambda: gated_swiglu(A, A.half(), Z), TypeError, "up is torch.float16 .* cast"),
        (lambda: gated_swiglu(A, A, Z.bool()), TypeError, r"z is torch.bool.* use z.float\(\)"),
        (lambda: gated_swiglu(A, A.to("meta"), Z), ValueError, "up is on meta .* move it"),
        (
            lambda: channel_scale(A, Z[:5]),
            ValueError,
            "scale has shape .5., expected .8.: one scale",
        ),
        (lambda: channel_scale(A[0, 0], Z), ValueError, r"x must be \[..., C\], got \[\]"),
        (lambda: channel_scale(A.int(), Z), TypeError, r"x is torch.int32.* use x.float\(\)"),
        (lambda: channel_scale(A, Z.to("meta")), ValueError, "scale is on meta .* move it"),
        (lambda: rms_norm_scale(A, Z[:5], Z, 1e-5), ValueError, "weight has shape .5., expected"),
        (lambda: rms_norm_scale(A, Z, Z[:5], 1e-5), ValueError, "scale has shape .5., expected"),
        (lambda: rms_norm_scale(A, trained(Z), Z, 1e-5), ValueError, "freeze it"),
        (lambda: gated_swiglu_ffn(X, UP, UP[:5], DOWN, Z), ValueError, "w_up has shape"),
        (lambda: gated_swiglu_ffn(X, UP, UP, UP, Z), ValueError, r"w_down .* \[d, F\] = \[4, 8\]"),
        (lambda: gated_swiglu_ffn(X, trained(UP), UP, DOWN, Z), ValueError, "freeze it"),
        (lambda: gated_swiglu_ffn(X, UP, UP, DOWN, Z, max_kept=9), ValueError, "max_kept is 9"),
        (lambda: gated_swiglu_ffn(X, UP, UP, DOWN, Z, max_kept=3), ValueError, "more than 3"),
        (lambda: gated_attention(Q[0], K, K, GATE), ValueError, r"expected \[B, H, S, D\]"),
        (lambda: gated_attention(Q, K[:, :, :3], K, GATE), ValueError, "k has shape"),
        (lambda: gated_attention(Q[:, :5], K, K, GATE), ValueError, "5 heads .* 2: .*multiple"),
        (lambda: gated_attention(Q, K, K, Z), ValueError, "one gate per KV group"),
        (lambda: gated_attention(Q, K, K, GATE, backend="flash"), ValueError, '"flash", expected'),
        (lambda: gated_attention(Q, K, K, GATE, backend="cudnn"), ValueError, 'use "auto"'),
        (lambda: gated_attention(Q, K, K, GATE, key_mask=Q[0, 0]), ValueError, "key_mask has"),
        (
            lambda: gated_attention(Q, K, K, GATE, key_mask=torch.zeros(1, 5)),
            TypeError,
            "key_mask is torch.float32",
        ),
        (
            lambda: gated_attention(trained(Q), K, K, GATE, max_kept=1).sum().backward(),
            ValueError,
            "more than 1",
        ),
        (lambda: linear_cross_entropy(X, trained(UP), TARGETS), ValueError, "freeze it"),
        (lambda: linear_cross_entropy(X, DOWN, TARGETS), ValueError, "must be .T, d. and .V, d."),
        (lambda: linear_cross_entropy(X, UP, TARGETS[:2]), ValueError, "targets has shape .2."),
        (lambda: linear_cross_entropy(X[:0], UP, TARGETS[:0]), ValueError, "T > 0"),
        (lambda: linear_cross_entropy(X, UP.half(), TARGETS), TypeError, "one floating dtype"),
        (lambda: linear_cross_entropy(X, UP, TARGETS.int()), TypeError, r"use .long\(\)"),
        (lambda: linear_cross_entropy(X, UP, TARGETS.to("meta")), ValueError, "move them"),
        (
            lambda: linear_distillation(X, UP, X[:, :1], TARGETS),
            ValueError,
            "teacher is .*, expected",
        ),
        (
            lambda: linear_distillation(X, UP, X.half(), TARGETS),
            TypeError,
            "teacher is torch.float16",
        ),
        (lambda: linear_distillation(X, UP, trained(X), TARGETS), ValueError, "detach it"),
        (lambda: linear_distillation(X, UP, X, TARGETS, 2.0), ValueError, "hard is 2.0"),
        (lambda: budget_topk(SCORES, COSTS[:2], 1), ValueError, "costs has shape .2., expected"),
        (lambda: budget_topk(SCORES, COSTS.float(), 1), TypeError, r"use costs.long\(\)"),
        (lambda: budget_topk(SCORES, COSTS, 0.5), TypeError, "budget is 0.5, expected an int"),
        (lambda: budget_topk(SCORES, COSTS, True), TypeError, "budget is True, expected an int"),
        (lambda: budget_topk(COSTS, COSTS, 1), TypeError, r"use scores.float\(\)"),
        (lambda: budget_topk(SCORES, -COSTS, 1), ValueError, "costs holds -1, expected >= 0"),
        (
            lambda: budget_topk(SCORES, COSTS, 1, floor=SCORES == 0),
            ValueError,
            "budget is 1, below the 4",
        ),
        (
            lambda: budget_topk(SCORES, COSTS, 1, tie_rank=COSTS),
            ValueError,
            "tie_rank is not a permutation",
        ),
    ],
)
def test_message(call, error, says):
    with pytest.raises(error, match=says):
        call()
