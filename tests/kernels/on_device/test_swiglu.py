import subprocess
import sys
import textwrap

import pytest
import torch
from oracle import DTYPES, INTERPRETED, MASKS, assert_accurate, mask
from planted import ERRORS

from grasp_kernels import gated_swiglu, gated_swiglu_ffn, reference

NAMES = ["d_gate_pre", "d_up", "dz"]


def check_elementwise(dtype, kind, device, kernel=gated_swiglu):
    gate_pre, up = (torch.randn(3, 47, 203, device=device, dtype=dtype) for _ in range(2))
    z = mask(kind, 203, device)
    assert_accurate(kernel, reference.gated_swiglu, [gate_pre, up, z], NAMES, z)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(dtype, kind, device):
    check_elementwise(dtype, kind, device)


def test_halves_of_a_merged_projection(device):
    merged = torch.randn(150, 2 * 130, device=device)
    z = mask("random", 130, device)
    gate_pre, up = merged[:, :130], merged[:, 130:]
    assert_accurate(gated_swiglu, reference.gated_swiglu, [gate_pre, up, z], NAMES, z)


@pytest.mark.parametrize("transposed", ["gate_pre", "up", "both"])
def test_column_major_inputs(transposed, device):
    gate_pre, up = (torch.randn(2, 203, 70, device=device)[i] for i in range(2))
    gate_pre, up = gate_pre.t(), up.t()
    if transposed == "gate_pre":
        up = up.contiguous()
    if transposed == "up":
        gate_pre = gate_pre.contiguous()
    z = mask("random", 203, device)
    assert_accurate(gated_swiglu, reference.gated_swiglu, [gate_pre, up, z], NAMES, z)


def check_ffn(dtype, kind, device, max_kept=None, error=None):
    tokens, size, width = 150 if kind == "random" else 37, 32, 331  # 150: more than ROWS
    if kind == "ones" and max_kept is not None:
        max_kept = width
    z = mask(kind, width, device)
    weights = [
        (torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype)
        for shape in ((width, size), (width, size), (size, width))
    ]
    x = torch.randn(tokens, size, device=device, dtype=dtype)

    def ours(x, z):
        return gated_swiglu_ffn(x, *weights, z, max_kept=max_kept)

    def plain(x, z):
        return reference.gated_swiglu_ffn(x, *(w.to(x.dtype) for w in weights), z)

    assert_accurate(error(plain) if error else ours, plain, [x, z], ["dx", "dz"], z)


@pytest.mark.parametrize("max_kept", [None, 300])  # 300 of 331 computes all channels
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn(dtype, kind, max_kept, device):
    check_ffn(dtype, kind, device, max_kept)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_planted_error_is_found(dtype, error, device):
    with pytest.raises(AssertionError, match="what rounding allows"):
        check_elementwise(dtype, "random", device, error(reference.gated_swiglu))
    with pytest.raises(AssertionError, match="what rounding allows"):
        check_ffn(dtype, "random", device, error=error)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_channels_than_the_bound_end_the_process():
    """In a process of its own: a failed assertion on the device ends its use of the GPU."""
    code = """
        import torch
        from grasp_kernels import gated_swiglu_ffn
        x, up, down = (torch.ones(s, device="cuda") for s in ((4, 8), (256, 8), (8, 256)))
        z = torch.ones(256, device="cuda")
        gated_swiglu_ffn(x, up, up, down, z, max_kept=256)
        torch.cuda.synchronize()
        print("a bound that holds")
        gated_swiglu_ffn(x, up, up, down, z, max_kept=64)
        torch.cuda.synchronize()
        print("lost in silence")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "a bound that holds\n" and "assert" in done.stderr, done
