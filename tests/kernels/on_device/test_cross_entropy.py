import pytest
import torch
from oracle import DTYPES, assert_accurate, assert_close

from grasp_kernels import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    reference,
)
from grasp_kernels._triton.cross_entropy import distillation_loss, softmax_loss


def check_rows(dtype, width, scale, device, kernel, plain):
    """`kernel` and `plain` take logits, other logits, targets and whether to give the gradient."""
    logits, taught = (torch.randn(7, width, device=device) * scale for _ in range(2))
    for rows in (logits, taught):
        rows[1, ::2] = float("-inf")
    logits, taught = logits.to(dtype), taught.to(dtype)
    targets = torch.randint(width, (7,), device=device) // 2 * 2
    targets[1] = 1
    exact, d_exact = plain(logits.double(), taught.double(), targets, True)
    theirs, d_theirs = plain(logits.clone(), taught, targets, True)
    only_loss, _ = kernel(logits.clone(), taught, targets, False)
    buffer = logits.clone()
    loss, d_logits = kernel(buffer, taught, targets, True)
    p, p_taught = logits.double().softmax(1), taught.double().softmax(1)
    terms = p_taught * (p_taught.log().abs() + p.log().abs())  # a divergence sums to less
    summed = exact.norm() + terms.nan_to_num(0, 0, 0).sum(1).norm()
    assert_close("loss", loss, theirs, exact, summed, width, torch.float32)
    summed = (p + p_taught).norm()
    assert_close("gradient", d_logits, d_theirs, d_exact, summed, width, dtype)
    assert d_logits.data_ptr() == buffer.data_ptr() and d_logits.dtype == dtype
    assert loss.dtype == torch.float32 and torch.equal(loss, only_loss)


def hard(softmax_loss):
    return lambda logits, _, targets, gradient: softmax_loss(logits, targets, gradient)


def soft(distillation_loss, weight):
    return lambda logits, taught, targets, gradient: distillation_loss(
        logits, taught, targets, weight, gradient
    )


LOSSES = {
    "hard": (hard(softmax_loss), hard(reference.softmax_loss)),
    "soft": (soft(distillation_loss, 0.0), soft(reference.distillation_loss, 0.0)),
    "both": (soft(distillation_loss, 0.25), soft(reference.distillation_loss, 0.25)),
}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("width", [5, 4096, 9001])  # a block holds 4096
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_rows(loss, dtype, width, scale, device):
    """Losses and gradients of rows against fp64, flat and sharp ones, some logits at -inf."""
    check_rows(dtype, width, scale, device, *LOSSES[loss])


def skips_a_tile(plain):
    def kernel(logits, taught, targets, gradient):
        logits[:, 4096:4224] = float("-inf")
        taught[:, 4096:4224] = float("-inf")
        return plain(logits, taught, targets, gradient)

    return kernel


def sums_in_bf16(plain):
    def kernel(logits, taught, targets, gradient):
        losses, d_logits = plain(logits.clone(), taught, targets, gradient)
        p = (logits - logits.amax(1, keepdim=True)).exp().bfloat16()
        total = torch.zeros_like(p[:, 0])
        for column in p.unbind(1):
            total += column
        return losses + total.float().log() - p.double().sum(1).log().float(), d_logits

    return kernel


@pytest.mark.parametrize("error", [skips_a_tile, sums_in_bf16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_planted_error_is_found(loss, dtype, error, device):
    _, plain = LOSSES[loss]
    with pytest.raises(AssertionError, match="what rounding allows"):
        check_rows(dtype, 9001, 1.0, device, error(plain), plain)


def test_a_target_out_of_range_is_not_a_number(device):
    logits = torch.randn(3, 40, device=device)
    targets = torch.tensor([-100, 40, 3], device=device)
    for loss, _ in (
        softmax_loss(logits.clone(), targets, False),
        distillation_loss(logits.clone(), logits, targets, 0.5, False),
    ):
        assert loss.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunks(rows, device, monkeypatch):
    """The whole op from rows of logits of which it holds only some."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", 300 * rows)
    x, weight = torch.randn(11, 16, device=device), torch.randn(300, 16, device=device)
    targets = torch.randint(300, (11,), device=device)

    def ours(x):
        return 3 * linear_cross_entropy(x, weight, targets)

    def plain(x):
        return 3 * reference.linear_cross_entropy(x, weight.to(x.dtype), targets)

    assert_accurate(ours, plain, [x], ["dx"], None)

    teacher = torch.randn(11, 16, device=device)

    def ours_taught(x):
        return 3 * linear_distillation(x, weight, teacher, targets, 0.25)

    def plain_taught(x):
        same = weight.to(x.dtype), teacher.to(x.dtype)
        return 3 * reference.linear_distillation(x, *same, targets, 0.25)

    assert_accurate(ours_taught, plain_taught, [x], ["dx"], None)
