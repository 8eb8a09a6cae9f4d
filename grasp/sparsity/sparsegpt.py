"""SparseGPT (arXiv 2301.00774): drop weights column by column and update the columns to the right.

With H = X X^T of a linear layer's inputs X, dropping w_j costs at least w_j^2 / [H^-1]_jj. Row j of
H^-1 gives the update of the other weights that attains this minimum. The upper Cholesky factor of
H^-1 holds these rows for every j, with all earlier columns eliminated. Columns beyond a batch are
updated once per batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grasp.budget.pattern import Pattern
from grasp.errors import GraspError

DAMPING = 0.01  # fraction of the mean diagonal
BATCH = 128  # columns


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Return the sparse matrix, fp32 [out, in]; weight fp32 [out, in], gram X X^T fp32 [in, in].

    The zeros of a group are chosen when the updates reach the group. A pattern without groups
    chooses them batch by batch, the same number in each row (the published code counts over all
    rows). Raises GraspError if the Gram matrix has no inverse.
    """
    inputs = weight.shape[1]
    upper = _inverse_factor(gram)
    batch = BATCH // (pattern.group or 1) * (pattern.group or 1) or inputs
    weight = weight.clone()
    weight[:, gram.diagonal() == 0] = 0
    for first in range(0, inputs, batch):
        last = min(first + batch, inputs)
        part, factor = weight[:, first:last].clone(), upper[first:last, first:last]
        errors = torch.empty_like(part)
        group = pattern.group or last - first
        for j in range(last - first):
            if j % group == 0:
                here = slice(j, j + group)
                keep = pattern.keep((part[:, here] / factor.diagonal()[here]).square(), first + j)
            kept = part[:, j].where(keep[:, j % group], 0.0)
            errors[:, j] = (part[:, j] - kept) / factor[j, j]
            part[:, j:] -= errors[:, j, None] * factor[j, j:]
            weight[:, first + j] = kept
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper triangular U, with U^T U = inverse of the damped Gram matrix; in fp64."""
    hessian = gram.double()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        inverse = torch.cholesky_inverse(factor)
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed or not factor.isfinite().all():
        raise GraspError(
            "SparseGPT's Hessian has no inverse: use more `samples` or another `method`"
        )
    return factor.float()
