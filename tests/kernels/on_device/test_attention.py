import pytest
import torch
from oracle import DTYPES, INTERPRETED, MASKS, assert_accurate, gradients, mask
from torch.nn.attention import SDPBackend, sdpa_kernel

from grasp_kernels import gated_attention, reference
from grasp_kernels._triton import attention as kernels

NAMES = ["dq", "dk", "dv", "dz"]


def check(heads, kv_heads, length, size, dtype, device, kind="random", causal=True, **options):
    batch = options.pop("batch", 1)
    key_mask = options.get("key_mask")
    q = torch.randn(batch, heads, length, size, device=device, dtype=dtype)
    k, v = (
        torch.randn(batch, kv_heads, length, size, device=device, dtype=dtype) for _ in range(2)
    )
    if key_mask is not None:  # what it hides does not matter, however large
        k = k.where(key_mask[:, None, :, None], 1e4 * k)
    z = mask(kind, kv_heads, device)

    def ours(q, k, v, z):
        return gated_attention(q, k, v, z, causal, **{"backend": "triton", **options})

    def plain(q, k, v, z):
        return reference.gated_attention(q, k, v, z, causal, None, key_mask)

    assert_accurate(ours, plain, [q, k, v, z], NAMES, z)


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, device):
    check(6, 3, 70, 64, torch.float32, device, kind)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "size", "causal"),
    [
        (2, 2, 131, 64, True),
        (6, 2, 65, 96, True),
        (4, 2, 33, 128, False),
        (8, 1, 17, 64, True),
        (2, 1, 129, 128, True),
        (2, 2, 1, 64, True),
        (4, 2, 40, 24, False),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype, heads, kv_heads, length, size, causal, device):
    check(
        heads, kv_heads, length, size, dtype, device, "scales" if kv_heads > 1 else "ones", causal
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_key_mask(causal, dtype, device):
    key_mask = torch.rand(2, 71, device=device) < 0.6
    key_mask[0, :9] = False  # left padding: the first rows see no key
    # the reference's other backends may give NaN to a query without keys
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        check(4, 2, 71, 64, dtype, device, "ones", causal, batch=2, key_mask=key_mask)


def test_dropped_groups_have_exactly_zero_gradients(device):
    q, k, v = (torch.randn(1, n, 35, 64, device=device) for n in (4, 2, 2))
    z = torch.tensor([0.0, 1.0], device=device)
    grads = gradients(gated_attention, [q, k, v, z], torch.randn_like(q))[1:]
    dropped = [grads[0][:, :2], grads[1][:, :1], grads[2][:, :1]]
    assert not any(x.count_nonzero() for x in dropped)
    assert grads[3].all()


def test_strides(device):
    q = torch.randn(2, 40, 4, 64, device=device).transpose(1, 2)
    k, v = torch.randn(2, 2, 40, 2, 64, device=device).transpose(2, 3).unbind(1)
    z = mask("scales", 2, device)

    def ours(*inputs):
        return gated_attention(*inputs, backend="triton")

    assert_accurate(ours, reference.gated_attention, [q, k, v, z], NAMES, z)
    assert ours(q, k, v, z).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("max_kept", [None, 2])
def test_sdpa_composition(max_kept, device):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    check(8, 4, 66, 64, dtype, device, "one", backend="sdpa", max_kept=max_kept)


def test_a_gradient_that_many_heads_share_is_launched_on_one_axis(monkeypatch):
    """Sizes are what matters, so tensors without memory will do."""
    grids = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    grad = raw = torch.empty(2**16, 1, 70, 64, device="meta", dtype=torch.float16)
    row_sums, dz = kernels.delta(grad, raw, torch.empty(1, device="meta"))
    assert row_sums.shape == (2**16, 1, 70) and dz.shape == (1,)
    assert all(size < 2**16 for grid in grids for size in grid[1:])


def test_a_sequence_that_spans_too_much_is_copied():
    apart = torch.empty_strided((1, 2, 8, 64), (2**32, 2**31, 64, 1), device="meta")
    assert kernels._unit(apart).is_contiguous()
    near = torch.empty(1, 8, 2, 64, device="meta").transpose(1, 2)
    assert kernels._unit(near) is near
