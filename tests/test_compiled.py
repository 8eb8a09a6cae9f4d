"""Norms and RoPE through torch.compile: the same numbers, and an unchanged model afterwards."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from families import tiny_model

from grasp.gates.compiled import ROPE, compiled
from grasp.gates.gating import gated
from grasp.gates.objective import next_token_loss
from grasp.gates.scales import scaled
from grasp.model.units import UnitSpace, decoder_layers

IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(3))


def loss_and_gradient(model):
    space = UnitSpace.of(model)
    z = torch.ones(space.size, requires_grad=True)
    with gated(model, space) as gates:
        gates.set(z)
        loss = next_token_loss(model, IDS)
        return loss.detach(), torch.autograd.grad(loss, z)[0]


def rope(model):
    return getattr(sys.modules[type(model.model).__module__], ROPE)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_the_same_loss_and_gradients():
    model, notes = tiny_model("qwen3"), []  # with norms on q and k
    eager, own = loss_and_gradient(model), rope(model)
    torch._dynamo.utils.counters.clear()
    with compiled(model, notes.append):
        assert rope(model) is not own
        for a, b in zip(loss_and_gradient(model), eager, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    counted = torch._dynamo.utils.counters
    # a norm of each shape, with and without a gradient for what enters, and RoPE: no more than that
    assert 2 <= counted["stats"]["unique_graphs"] <= 9 and not counted["graph_break"]
    assert notes == [] and rope(model) is own
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradient(model), eager, strict=True))


def test_norms_that_a_scale_is_part_of_stay_as_they_are():
    model = tiny_model("llama")
    with scaled(model, UnitSpace.of(model), "channel"):
        own = {m: m.forward for m in model.model.modules() if "forward" in vars(m)}
        norms = [m for m in own if type(m).__name__ == "LlamaRMSNorm"]
        assert len(norms) == 2 * len(decoder_layers(model))
        with compiled(model, pytest.fail):
            assert all(m.forward is forward for m, forward in own.items())
            assert "forward" in vars(model.model.norm)
        assert all(m.forward is forward for m, forward in own.items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_what_does_not_compile_runs_as_it_is(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda _: fail)
    model, notes = tiny_model("llama"), []
    with compiled(model, notes.append):
        assert not any("forward" in vars(m) for m in model.modules())
        loss_and_gradient(model)
    assert notes == [
        "norms and RoPE run one operation at a time, not compiled: no compiler and more"
    ]
