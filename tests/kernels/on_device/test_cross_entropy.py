import pytest
import torch
from oracle import DTYPES, assert_accurate, assert_close

from grasp_kernels import cross_entropy, linear_cross_entropy, reference
from grasp_kernels._triton.cross_entropy import softmax_loss


def check_rows(dtype, width, scale, device, kernel=softmax_loss):
    logits = (torch.randn(7, width, device=device) * scale).to(dtype)
    logits[1, ::2] = float("-inf")
    targets = torch.randint(width, (7,), device=device) // 2 * 2
    targets[1] = 1
    exact, d_exact = reference.softmax_loss(logits.double(), targets, True)
    plain, d_plain = reference.softmax_loss(logits.clone(), targets, True)
    only_loss, _ = kernel(logits.clone(), targets, False)
    buffer = logits.clone()
    loss, d_logits = kernel(buffer, targets, True)
    for name, *of in (("loss", loss, plain, exact), ("gradient", d_logits, d_plain, d_exact)):
        assert_close(name, *of, of[2].norm(), width, of[0].dtype)
    assert d_logits.data_ptr() == buffer.data_ptr() and d_logits.dtype == dtype
    assert loss.dtype == torch.float32 and torch.equal(loss, only_loss)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("width", [5, 4096, 9001])  # a block holds 4096
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, width, scale, device):
    """Losses and gradients of rows against fp64, flat and sharp ones, some logits at -inf."""
    check_rows(dtype, width, scale, device)


def skips_a_tile(logits, targets, gradient):
    logits[:, 4096:4224] = float("-inf")
    return reference.softmax_loss(logits, targets, gradient)


def sums_in_bf16(logits, targets, gradient):
    losses, d_logits = reference.softmax_loss(logits.clone(), targets, gradient)
    p = (logits - logits.amax(1, keepdim=True)).exp().bfloat16()
    total = torch.zeros_like(p[:, 0])
    for column in p.unbind(1):
        total += column
    return losses + total.float().log() - p.double().sum(1).log().float(), d_logits


@pytest.mark.parametrize("error", [skips_a_tile, sums_in_bf16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_error_is_found(dtype, error, device):
    with pytest.raises(AssertionError, match="what rounding allows"):
        check_rows(dtype, 9001, 1.0, device, error)


def test_a_target_out_of_range_is_not_a_number(device):
    logits = torch.randn(3, 40, device=device)
    loss, _ = softmax_loss(logits, torch.tensor([-100, 40, 3], device=device), False)
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
