import pytest
import torch
from oracle import DTYPES, gradients

from grasp_kernels import cross_entropy, linear_cross_entropy, reference
from grasp_kernels._triton.cross_entropy import softmax_loss


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("width", [5, 4096, 9001])  # a block holds 4096
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, width, scale, device):
    """Losses and gradients of rows against fp64, flat and sharp ones, some logits at -inf."""
    logits = (torch.randn(7, width, device=device) * scale).to(dtype)
    logits[1, ::2] = float("-inf")
    targets = torch.randint(width, (7,), device=device) // 2 * 2
    targets[1] = 1
    exact, d_exact = reference.softmax_loss(logits.double(), targets, True)
    plain, d_plain = reference.softmax_loss(logits.clone(), targets, True)
    only_loss, _ = softmax_loss(logits.clone(), targets, False)
    buffer = logits.clone()
    loss, d_logits = softmax_loss(buffer, targets, True)
    assert d_logits.data_ptr() == buffer.data_ptr() and d_logits.dtype == dtype
    assert loss.dtype == torch.float32 and torch.equal(loss, only_loss)
    for ours, theirs, wanted in ((loss, plain, exact), (d_logits, d_plain, d_exact)):
        error, allowed = ((x.double() - wanted).norm() for x in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * wanted.norm()


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
        return 3 * reference.linear_cross_entropy(x, weight, targets)

    grad = torch.ones((), device=device)
    for a, b in zip(gradients(ours, [x], grad), gradients(plain, [x], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
