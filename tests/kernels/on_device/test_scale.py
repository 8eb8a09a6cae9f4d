import pytest
import torch
from oracle import DTYPES, MASKS, assert_accurate, mask
from planted import ERRORS

from grasp_kernels import channel_scale, reference, rms_norm_scale

NAMES = ["dx", "dz"]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype, kind, device):
    x = torch.randn(3, 47, 203, device=device, dtype=dtype)
    z = mask(kind, 203, device)
    assert_accurate(channel_scale, reference.channel_scale, [x, z], NAMES, z)


def norm(weight, eps=1e-5):
    """The op and its definition, as functions of x and the scale."""

    def ours(x, z):
        return rms_norm_scale(x, weight, z, eps)

    def plain(x, z):
        return reference.rms_norm_scale(x, weight, z, eps)

    return ours, plain


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype, kind, device):
    x = torch.randn(3, 47, 203, device=device, dtype=dtype) * 3
    weight = torch.randn(203, device=device).to(dtype)
    z = mask(kind, 203, device)
    assert_accurate(*norm(weight), [x, z], NAMES, z)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_planted_error_is_found(dtype, error, device):
    x, z = torch.randn(3, 47, 203, device=device, dtype=dtype), mask("random", 203, device)
    for plain in (reference.channel_scale, norm(torch.randn(203, device=device))[1]):
        with pytest.raises(AssertionError, match="what rounding allows"):
            assert_accurate(error(plain), plain, [x, z], NAMES, z)


@pytest.mark.parametrize("tokens", [1, 256, 600])  # a program has one row, or some and a rest
def test_rows_of_a_program(tokens, device):
    x, weight = torch.randn(tokens, 40, device=device), torch.randn(40, device=device)
    z = mask("scales", 40, device)
    assert_accurate(*norm(weight), [x, z], NAMES, z)


# a row of one number is normed to its sign, which has no derivative to compare with
@pytest.mark.parametrize("width", [8, 64, 4100])  # 4100: of the configuration for long rows
def test_widths_of_a_norm(width, device):
    x, weight = torch.randn(9, width, device=device), torch.randn(width, device=device)
    z = mask("ones", width, device) * 0.7
    assert_accurate(*norm(weight), [x, z], NAMES, z)


@pytest.mark.parametrize("width", [1, 64, 4100])
def test_widths_of_a_scale(width, device):
    x, z = torch.randn(9, width, device=device), mask("ones", width, device) * 0.7
    assert_accurate(channel_scale, reference.channel_scale, [x, z], NAMES, z)


def test_rows_that_only_epsilon_keeps_finite(device):
    x = torch.randn(8, 64, device=device) * torch.logspace(-6, 2, 8, device=device)[:, None]
    x[3] = 0
    z = mask("scales", 64, device)
    assert_accurate(*norm(torch.ones(64, device=device), eps=1e-6), [x, z], NAMES, z)


@pytest.mark.parametrize("strides", ["half of a merged projection", "column-major"])
def test_strides(strides, device):
    x = torch.randn(2, 130, 130, device=device).permute(1, 0, 2).flatten(1)[:, :130]
    if strides == "column-major":
        x = x.t()
    z = mask("random", 130, device)
    assert_accurate(channel_scale, reference.channel_scale, [x, z], NAMES, z)
    assert_accurate(*norm(torch.randn(130, device=device)), [x, z], NAMES, z)
