"""Memory modes: less memory, the same result; a step needs the memory that the plan predicts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from families import tiny_model
from torch.profiler import ProfilerActivity, profile

from grasp import criteria
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.compress.reconstruct import reconstruct
from grasp.compress.refit import refit
from grasp.config import PruneConfig, ScaleKind
from grasp.errors import GraspError
from grasp.gates.memory import choose, memory_mode
from grasp.gates.objective import next_token_loss
from grasp.gates.scales import scale_count, scaled
from grasp.journal import Journal
from grasp.model.header import from_config
from grasp.model.units import UnitSpace
from grasp.planning.memory import (
    LOGITS_AT_ONCE,
    blocks_memory,
    choosing_memory,
    greedy_memory,
    learning_memory,
    refit_memory,
)
from grasp.select.greedy_output_approximation import prune_greedily
from grasp.select.taylor import taylor_scores
from grasp.select.wanda_plus_plus import wanda_plus_plus_scores
from grasp_kernels import cross_entropy

MODES = ("fast", "balanced", "low")
SIZES = {"hidden": 128, "ffn": 352, "heads": 8, "kv_heads": 4, "head_dim": 16, "layers": 8}


def config(mode, **options):
    return PruneConfig("m", Budget("keep", 0.5), memory=mode, device="cpu", **options)


def gradient(model, ids, scales="unit"):
    z = torch.ones(scale_count(model, scales), requires_grad=True)
    with scaled(model, UnitSpace.of(model), scales) as gates:
        gates.set(z)
        return torch.autograd.grad(next_token_loss(model, ids), z)[0]


def peak_bytes(run):
    """The most that PyTorch held at one time of what it has allocated since the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scales", get_args(ScaleKind))
@pytest.mark.parametrize(("family", "vocab"), [("llama", 256), ("qwen3", 256), ("llama", 16_384)])
def test_the_plan_is_within_a_tenth_of_what_a_step_takes(family, vocab, scales, mode):
    model = tiny_model(family, vocab=vocab, **SIZES)
    ids = torch.randint(3, 250, (1, 256))
    planned = learning_memory(from_config(model.config.to_dict()), 256, 256, 4, mode, scales)
    with memory_mode(model, config(mode)):
        gradient(model, ids, scales)
        measured = peak_bytes(lambda: gradient(model, ids, scales))
    assert measured == pytest.approx(planned.total - planned.weights, rel=0.1)


@pytest.mark.parametrize("samples", [4, 2000])  # more than refit looks at
def test_the_plan_is_within_a_tenth_of_what_refit_takes(samples):
    model = tiny_model("llama", hidden=64, ffn=704, layers=1)
    planned = refit_memory(from_config(model.config.to_dict()), samples, 16, 4)
    space = UnitSpace.of(model)
    keep = torch.ones(space.size, dtype=torch.bool)
    keep[0] = False
    measured = peak_bytes(lambda: refit(model, Mask(space, keep), torch.ones(samples, 16).long()))
    assert measured == pytest.approx(planned - 4 * space.total_params, rel=0.1)


@pytest.mark.parametrize(("samples", "length"), [(2, 2048), (64, 16)])
def test_the_plan_is_within_a_tenth_of_what_reconstruction_takes(samples, length):
    model = tiny_model("llama", hidden=64, ffn=704, layers=1)
    planned = blocks_memory(from_config(model.config.to_dict()), length, 4)
    space = UnitSpace.of(model)
    hidden = 3 * 4 * samples * length * 64  # in the host's memory
    mask = Mask(space, torch.arange(space.size) > 0)
    blocks = torch.randint(3, 250, (samples, length))
    measured = peak_bytes(lambda: reconstruct(model, mask, blocks, 0, Journal()))
    assert measured == pytest.approx(planned - 4 * space.total_params + hidden, rel=0.1)


@pytest.mark.parametrize(
    ("method", "score"), [("taylor", taylor_scores), ("wanda++", wanda_plus_plus_scores)]
)
def test_the_plan_is_within_a_sixth_of_what_choosing_takes(method, score):
    model = tiny_model("llama", hidden=128, ffn=352, layers=2, vocab=256)
    config = PruneConfig.of("tiny", keep=0.5, method=method, samples=8, seq_len=64)
    planned = choosing_memory(from_config(model.config.to_dict()), config, 4)
    space = UnitSpace.of(model)
    blocks = torch.randint(3, 250, (8, 64))
    measured = peak_bytes(lambda: score(model, space, blocks, Journal()))
    assert measured == pytest.approx(planned - 4 * space.total_params, rel=1 / 6)


@pytest.mark.parametrize("samples", [4, 64])
def test_the_plan_is_within_a_tenth_of_what_the_greedy_method_takes(samples):
    model = tiny_model("llama", hidden=64, ffn=704, layers=1)
    planned = greedy_memory(from_config(model.config.to_dict()), samples, 16, 4)
    projection = Projection(UnitSpace.of(model), Budget.of(keep=0.99, ffn_multiple=1))
    blocks = torch.randint(3, 250, (samples, 16))
    measured = peak_bytes(lambda: prune_greedily(model, projection, blocks, Journal()))
    assert measured == pytest.approx(planned - 4 * projection.space.total_params, rel=0.1)


def test_every_mode_computes_the_same_and_leaves_nothing():
    model, ids = tiny_model("llama"), torch.randint(3, 250, (2, 16))
    before = [set(vars(m)) for m in model.modules()]
    want = gradient(model, ids)
    for mode in MODES:
        with memory_mode(model, config(mode)):
            assert torch.equal(gradient(model, ids), want)
    assert [set(vars(m)) for m in model.modules()] == before


@pytest.mark.parametrize(
    "method",
    ["fisher", "taylor", "output-approximation", "flap", "wanda-sp", "wanda++", "magnitude"],
)
def test_scores_do_not_depend_on_the_mode(method):
    model, ids = tiny_model("llama"), torch.randint(3, 250, (2, 16))
    seen = []
    for mode in MODES:
        with memory_mode(model, config(mode)):
            units = UnitSpace.of(model)
            score = criteria.get(method)
            seen.append(score(model=model, units=units, blocks=ids, journal=Journal()))
    for scores in seen[1:]:
        torch.testing.assert_close(scores, seen[0])


def test_the_plan_knows_the_chunk_of_the_loss():
    assert LOGITS_AT_ONCE == cross_entropy._CHUNK


@pytest.mark.parametrize("scales", get_args(ScaleKind))
def test_auto_takes_the_fastest_mode_that_fits(monkeypatch, scales):
    model = tiny_model("llama", vocab=256, **SIZES)
    asked = config("auto", seq_len=128, batch_size=2, scales=scales)
    with memory_mode(model, asked) as mode:
        assert mode == "fast"
    header = from_config(model.config.to_dict())
    needs = [learning_memory(header, 256, 128, 4, mode, scales) for mode in MODES]
    needs = [(memory.total - memory.weights) / 0.9 for memory in needs]
    assert needs == sorted(needs, reverse=True)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    for free, mode in ((needs[0], "fast"), (needs[1], "balanced"), (needs[2], "low"), (0, "low")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free - 99, None))
        assert choose(model, asked) == mode


def test_a_full_memory_names_the_mode_to_try():
    model = tiny_model("llama")
    said = (
        r"out of memory on cpu \(full\): run the same with `memory=\'low\'` \(now fast\) to resume"
    )
    with pytest.raises(GraspError, match=said), memory_mode(model, config("auto")):
        raise MemoryError("full")
    with pytest.raises(MemoryError), memory_mode(model, config("low")):
        raise MemoryError("full")
