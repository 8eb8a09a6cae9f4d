"""What a GPU would be asked to do, told without one: on meta tensors, or fake ones on "cuda"."""

from collections.abc import Callable

import pytest
import torch
from oracle import INTERPRETED
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_kernels import gated_swiglu_ffn, swiglu

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
    """The names of the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize(("max_kept", "sorts"), [(96, 0), (95, 0), (64, 1)])
def test_channels_are_sorted_only_where_some_are_left_out(max_kept, sorts):
    weights = torch.zeros(96, 8), torch.zeros(96, 8), torch.zeros(8, 96)
    with torch.profiler.profile() as seen:  # which looks inside the op
        gated_swiglu_ffn(torch.zeros(5, 8), *weights, torch.zeros(96), max_kept=max_kept)
    assert sum(event.name == "aten::sort" for event in seen.events()) == sorts
