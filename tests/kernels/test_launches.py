"""Launches that a GPU would get, checked without one: on meta tensors, or fake "cuda" ones."""

from collections.abc import Callable

import pytest
import torch
from oracle import INTERPRETED
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp_kernels import _sdpa, gated_swiglu_ffn, swiglu
from grasp_kernels._triton import launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing here runs")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(module, monkeypatch, call: Callable[[], object]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and grid of the kernels that a call of a `_triton` module launches."""
    seen = []
    monkeypatch.setattr(
        module, "launch", lambda kernel, grid, *_, **__: seen.append((kernel.fn.__name__, grid))
    )
    call()
    return seen


class Dispatched(TorchDispatchMode):
    """The names of the operations that reach the dispatcher, and the tensors that they return."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        out = func(*args, **(kwargs or {}))
        self.results += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


def test_delta_takes_any_number_of_heads(monkeypatch):
    attention = pytest.importorskip("grasp_kernels._triton.attention")
    grad = meta(4096, 32, 128, 64)
    ((name, grid),) = launches(
        attention, monkeypatch, lambda: attention.delta(grad, grad, meta(32))
    )
    assert name == "_delta" and grid == (4096 * 32, 2)  # CUDA ends the second axis at 65,535


def test_a_bound_is_asserted_on_the_device():
    """A GPU is not waited for, and does not lose channels in silence."""
    with FakeTensorMode(), Dispatched() as seen:
        z = torch.ones(4, device="cuda")
        assert swiglu._kept(z, 4) == 4
        assert "aten._assert_async.msg" not in seen.names  # nothing can be lost
        swiglu._kept(z, 2)
    assert seen.names.count("aten._assert_async.msg") == 1
    assert not [name for name in seen.names if "_local_scalar_dense" in name]


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("max_kept", [2, 4])
def test_attention_around_pytorchs_makes_no_copies(max_kept, cudnn, monkeypatch):
    """Of 4 groups of 2 heads: no fp32 tensors, no k and v for each query, no gather of all."""
    sdpa = pytest.importorskip("grasp_kernels._triton.sdpa")
    launched = []
    monkeypatch.setattr(sdpa, "launch", lambda kernel, *_, **__: launched.append(kernel.fn))
    monkeypatch.setattr(launch, "table", lambda device: launch.of_chip(90))
    monkeypatch.setattr(_sdpa, "runs_triton", lambda x: True)
    with FakeTensorMode(), Dispatched() as seen:
        q, k, v, grad = (
            torch.empty(3, 128, n, 64, dtype=torch.half, device="cuda").transpose(1, 2)
            for n in (8, 4, 4, 8)
        )
        z = torch.ones(4, device="cuda")
        out, raw, lse = _sdpa.forward(q, k, v, z, True, 0.1, None, cudnn=cudnn)
        saved = (q, k, v, z, raw, lse)
        gradients = _sdpa.backward(grad, *saved, True, 0.1, None, max_kept, cudnn=cudnn)
    around = [sdpa._gate, sdpa._pack] + [sdpa._unpack] * (max_kept < 4)
    assert launched == [kernel.fn for kernel in around]
    assert not [x for x in seen.results if x.dtype == torch.float32 and x.numel() >= q.numel()]
    moving = ("clone", "copy", "cat", "index", "repeat", "sort", "_local_scalar_dense")
    assert not [name for name in seen.names if any(word in name for word in moving)]
    for x, like in zip((out, raw, *gradients), (q, q, q, k, v, z), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
    assert seen.names.count("aten._assert_async.msg") == (max_kept < 4)


@pytest.mark.parametrize(("max_kept", "sorts"), [(96, 0), (95, 0), (64, 1)])
def test_channels_are_sorted_only_where_some_are_left_out(max_kept, sorts):
    weights = torch.zeros(96, 8), torch.zeros(96, 8), torch.zeros(8, 96)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as seen:  # which looks inside the op
        gated_swiglu_ffn(torch.zeros(5, 8), *weights, torch.zeros(96), max_kept=max_kept)
    assert sum(event.name == "aten::sort" for event in seen.events()) == sorts
