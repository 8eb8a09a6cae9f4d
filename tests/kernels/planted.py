"""Plain PyTorch with planted errors, typical of kernels, which the accuracy rule must find."""

from collections.abc import Callable

import torch
from oracle import gate_terms
from torch import Tensor

Kernel = Callable[..., Tensor]


def skips_a_tile(plain: Kernel) -> Kernel:
    """Some rows of the output are never written."""

    def kernel(*inputs):
        out = plain(*inputs)
        return out.where(_outside_tile(out), 0)

    return kernel


def skips_a_tile_backward(plain: Kernel) -> Kernel:
    """No gradient sums over some of the rows."""

    def kernel(*inputs):
        out = plain(*inputs)
        return out.where(_outside_tile(out), out.detach())

    return kernel


def skips_a_tile_of_dz(plain: Kernel) -> Kernel:
    def kernel(*inputs):
        *rest, z = inputs
        out = plain(*inputs)
        return out.where(_outside_tile(out), plain(*rest, z.detach()))

    return kernel


def drops_a_gate_from_dz(plain: Kernel) -> Kernel:
    """The one with the largest gradient."""

    def kernel(*inputs):
        *rest, z = inputs
        z = z.view_as(z)
        z.register_hook(lambda dz: dz.where(dz.abs() < dz.abs().max(), 0))
        return plain(*rest, z)

    return kernel


def sums_dz_in_bf16(plain: Kernel) -> Kernel:
    def kernel(*inputs):
        *rest, z = inputs
        z = z.view_as(z)
        out = plain(*rest, z)
        frozen, grads = [x.detach() for x in inputs], []

        def summed(dz):
            total = torch.zeros_like(dz, dtype=torch.bfloat16)
            terms = torch.stack([t.flatten() for t in gate_terms(plain, frozen, grads.pop())])
            for products in terms[:, terms.any(0)].bfloat16().unbind(1):
                total += products
            return total.to(dz.dtype)

        out.register_hook(grads.append)
        z.register_hook(summed)
        return out

    return kernel


def computes_in_bf16(plain: Kernel) -> Kernel:
    return lambda *inputs: plain(*(x.bfloat16() for x in inputs)).to(inputs[0].dtype)


ERRORS = (
    skips_a_tile,
    skips_a_tile_backward,
    skips_a_tile_of_dz,
    drops_a_gate_from_dz,
    sums_dz_in_bf16,
    computes_in_bf16,
)


def _outside_tile(out: Tensor) -> Tensor:
    """True for rows after the first 16, or after the first half of fewer than 32."""
    rows = out.shape[-2]
    return torch.arange(rows, device=out.device)[:, None] >= min(16, rows // 2)
