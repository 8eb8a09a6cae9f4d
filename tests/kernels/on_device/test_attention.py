import pytest
import torch
from oracle import DTYPES, INTERPRETED, MASKS, assert_accurate, assert_close, gradients, mask
from planted import ERRORS
from torch.nn.attention import SDPBackend, sdpa_kernel

from grasp_kernels import attention, gated_attention, reference
from grasp_kernels._triton import attention as kernels
from grasp_kernels._triton import sdpa

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

    error = options.pop("error", None)

    def ours(q, k, v, z):
        return gated_attention(q, k, v, z, causal, **{"backend": "triton", **options})

    def plain(q, k, v, z):
        return reference.gated_attention(q, k, v, z, causal, None, key_mask)

    # on a GPU, flash attention's backward adds up dq with atomics, and cuDNN promises no bits
    atomic = {"sdpa": ("dq",), "cudnn": ("out", *NAMES)}.get(options.get("backend"), ())
    atomic = atomic if device == "cuda" else ()
    kernel = error(plain) if error else ours
    assert_accurate(kernel, plain, [q, k, v, z], NAMES, z, atomic)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_planted_error_is_found(dtype, error, device):
    with pytest.raises(AssertionError, match="what rounding allows"):
        check(6, 3, 70, 64, dtype, device, error=error)


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


def test_a_gradient_of_any_span(device, tmp_path):
    """Offsets within a sequence are int32: what spans more is copied, or not taken."""
    shape, strides = (1, 2, 130, 16), (0, 16, 2**24, 1)
    size = 129 * 2**24 + 32
    if device == "cpu":  # a sparse file: nobody touches most of it
        memory = torch.from_file(str(tmp_path / "memory"), True, size, dtype=torch.float16)
    else:
        memory = torch.empty(size, dtype=torch.float16, device=device)
    grad = memory.as_strided(shape, strides).copy_(torch.randn(shape))
    q, k, v = (torch.randn(1, n, 130, 16, device=device).half() for n in (2, 1, 1))
    z = torch.ones(1, device=device)

    def run(q, k, v, z):
        return gated_attention(q, k, v, z, backend="triton")

    wanted = gradients(run, [q, k, v, z], grad.contiguous())
    for a, b in zip(gradients(run, [q, k, v, z], grad), wanted, strict=True):
        assert torch.equal(a, b)
    dz = attention._gate_backward(grad, wanted[0], z)
    assert torch.equal(dz, attention._gate_backward(grad.contiguous(), wanted[0], z))
    wide = torch.zeros(1, 1, 1, 128, device=device).expand(1, 2**10, 2**14, 128)
    with pytest.raises(ValueError, match=r"2\^31 values in a sequence"):
        gated_attention(wide, wide, wide, torch.ones(2**10, device=device), backend="triton")


@pytest.mark.parametrize("max_kept", [None, 2, 4])
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


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("max_kept", [None, 2, 4])
@pytest.mark.parametrize("queries", [1, 2])
def test_cudnn_composition(queries, max_kept, device):
    options = {"backend": "cudnn", "max_kept": max_kept, "batch": 2}
    check(4 * queries, 4, 130, 128, torch.bfloat16, device, "one", **options)


@pytest.mark.parametrize("kept", [0, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_around_sdpa(dtype, kept, device):
    """Gating, packing, unpacking against their definition; 2 of 5 groups kept, up to 5 packed."""
    queries, size, length = (1, 64, 40) if dtype == torch.float16 else (3, 24, 40)
    z = torch.tensor([0, 0.7, 0, 0, -1.2], device=device) * (kept > 0)
    heads = 5 * queries

    def heads_last(count):
        return torch.randn(2, length, count, size, device=device, dtype=dtype).transpose(1, 2)

    grad, q, raw = (heads_last(heads) for _ in range(3))
    k, v = heads_last(5).contiguous(), torch.randn(2, 5, size, length, device=device).to(dtype).mT
    lse = torch.randn(2, heads, length, device=device)
    assert torch.equal(sdpa.gate_heads(raw, z), reference.gate_heads(raw, z))
    *ours, dz = sdpa.pack_heads(grad, q, k, v, z, raw, lse, kept)
    *wanted, dz_wanted = reference.pack_heads(grad, q, k, v, z, raw, lse, kept)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    products = (grad.double() * raw.double()).unflatten(1, (5, -1)).transpose(0, 1).flatten(1)
    size = products.norm(dim=1), products.shape[1]
    assert_close("dz", dz, dz_wanted, products.sum(1), *size, torch.float32)
    _, dq, dk, dv, *_ = wanted
    ours, wanted = (m.unpack_heads(dq, dk, dv, z, heads) for m in (sdpa, reference))
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b) and a.transpose(1, 2).is_contiguous()
