"""The training loop: the estimator, the budget at every step, resuming, and its failures."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from families import ops_run, stock_model, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.compress.calibrate import learn_scales
from grasp.errors import GraspError
from grasp.gates.gating import gated
from grasp.gates.objective import Batch, last_hidden, loss, next_token_loss
from grasp.gates.training import (
    GRAPH_TOKENS,
    CapturedStep,
    Step,
    TrainSettings,
    epoch_order,
    train_gates,
)
from grasp.journal import Journal
from grasp.model.units import LayerUnits, UnitSpace, decoder_layers
from grasp.select.fisher import fisher_scores
from grasp.select.learned import TAU, LearnSettings, annealed, learn_scores
from grasp.select.magnitude import magnitude_scores

BLOCKS = torch.randint(3, 250, (12, 16), generator=torch.Generator().manual_seed(3))


class Memory(Journal):
    """Keeps everything; `stop_at` raises after that many steps, as a kill would."""

    def __init__(self, stop_at: int = 10**9):
        self.stop_at, self.state, self.records, self.notes = stop_at, None, [], []

    def load(self):
        return self.state

    def save(self, state, *, final=False):
        self.state = {name: t.clone() for name, t in state().items()}
        if int(self.state["step"]) == self.stop_at:
            raise KeyboardInterrupt

    def note(self, text):
        self.notes.append(text)

    def progress(self, step, total, loss, tokens, **info):
        self.records.append({"step": step, "loss": loss, "tokens": tokens, **info})


class Calls:
    """Counts the calls of a module."""

    def __init__(self, module):
        self.module, self.count = module, 0

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.add)
        return self

    def add(self, *_):
        self.count += 1

    def __exit__(self, *_):
        self.handle.remove()


def learn(
    journal, *, seed=0, epochs=2, batch_size=1, accumulate=1, anneal=0.5, lr=0.05, start=None
):
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    projection = Projection(space, Budget("keep", 0.5, 8), seed=seed)
    settings = LearnSettings(TrainSettings(epochs, batch_size, accumulate, lr, seed=seed), anneal)
    start = torch.zeros(space.size) if start is None else start
    return projection, learn_scores(model, projection, start, BLOCKS, settings, journal).scores


def at(progress):
    return torch.tensor(progress, dtype=torch.float64)


def test_budget_holds_at_every_step_and_anneals():
    journal = Memory()
    projection, _ = learn(journal)
    whole = projection.space.cost
    for record in journal.records:
        allowed = annealed(projection.limit, whole, at((record["step"] - 1) / 24), 0.5)
        assert record["cost"] <= allowed
    unspent = [projection.limit - r["cost"] for r in journal.records[12:]]
    assert min(unspent) >= 0 and max(unspent) < projection.budget.step(projection.space)
    assert annealed(10, 90, at(0.25), 0.5) == 20  # a cubic, half way
    assert annealed(projection.limit, whole, at(0), 0.5) == whole
    assert annealed(projection.limit, whole, at(0), 0.0) == projection.limit


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.017), ("constant", 1.0)])
def test_rate_of_the_last_step(schedule, last):
    """AdamW's first steps are as long as its rate; cos(pi 11 / 12) is what is left at the end."""
    model = tiny_model("llama")
    seen = []

    def values(theta, progress):
        seen.append(theta.detach().clone())
        return theta

    with gated(model, UnitSpace.of(model)) as gates:
        theta = torch.ones(UnitSpace.of(model).size)
        settings = TrainSettings(1, lr=1e-4, schedule=schedule)
        seen.append(train_gates(model, gates, theta, values, BLOCKS[:12], settings, Journal()))
    steps = [(b - a).abs().max().item() for a, b in pairwise(seen)]
    assert len(steps) == 12 and steps[0] == pytest.approx(1e-4, rel=0.01)
    assert 0.5 * last < steps[-1] / 1e-4 < 2 * last


def test_straight_through_gradient():
    """One step of AdamW moves each score by the sign of dL/dz, dropped units' too."""
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    projection = Projection(space, Budget("keep", 0.5, 8))
    start = torch.randn(space.size)
    settings = LearnSettings(TrainSettings(1, lr=0.01), anneal=0.0)
    learned, _ = learn_scores(model, projection, start, BLOCKS[:1], settings, Journal())
    z = projection(start).float().requires_grad_()
    with gated(model, space) as gates:
        gates.set(z)
        (dz,) = torch.autograd.grad(next_token_loss(model, BLOCKS[:1]), z)
    p = torch.sigmoid(start / TAU)
    ds = dz * p * (1 - p) / TAU
    assert (ds[z == 0] != 0).all()
    expected = start - 0.01 * ds / (ds.abs() + 1e-8)  # AdamW's first step
    assert torch.allclose(learned, expected, atol=1e-4)


def test_loss_in_chunks_gives_the_same_curve(monkeypatch):
    start = torch.randn(UnitSpace.of(tiny_model("llama")).size)  # equal scores part on rounding
    chunked, whole = Memory(), Memory()
    learn(chunked, start=start)
    monkeypatch.setattr(
        "grasp.gates.objective.next_token_loss",
        lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
    )
    learn(whole, start=start)
    for a, b in zip(chunked.records, whole.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["ffn"] == b["ffn"]


class Recorded(Projection):
    """Keeps the masks that it gives."""

    def __call__(self, scores, limit=None):
        mask = super().__call__(scores, limit)
        self.masks = [*getattr(self, "masks", []), mask.clone()]
        return mask


def plain_training(model, projection, start, blocks, lr):
    """The same training in plain PyTorch: hooks, the model's own loss, all of it dense."""
    scores, losses, z = start.clone().requires_grad_(), [], None
    adam = torch.optim.AdamW([scores], lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    def gate(units, width):
        return lambda _, args: (args[0] * z[units].repeat_interleave(width)).to(args[0].dtype)

    for m, layer, (_, ffn, kv) in zip(
        decoder_layers(model), projection.space.layers, projection.space.segments(), strict=True
    ):
        m.ffn.down.register_forward_pre_hook(gate(ffn, 1))
        m.attention.out.register_forward_pre_hook(gate(kv, layer.group_size * layer.head_dim))
    for step, ids in enumerate(blocks if blocks.dim() == 3 else blocks[:, None]):
        whole = projection.budget.cost(projection.space)
        progress = at(step / len(blocks)).to(scores.device)
        mask = projection(scores, annealed(projection.limit, whole, progress, 0.5))
        p = torch.sigmoid(scores / TAU)
        z = mask + p - p.detach()
        loss = model(input_ids=ids, labels=ids).loss
        (scores.grad,) = torch.autograd.grad(loss, scores)
        adam.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_fast_path_learns_what_plain_pytorch_does(family, device):
    """Step by step: the same loss, and the same mask but for units at the very edge."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = tiny_model(family).to(device)
    space = UnitSpace.of(model)
    fast, plain = (Recorded(space, Budget("keep", 0.5, 1), device=device) for _ in range(2))
    start = torch.randn(space.size, generator=torch.Generator().manual_seed(0)).to(device)
    blocks = BLOCKS.to(device)
    settings, journal = LearnSettings(TrainSettings(1, lr=0.05)), Memory()
    learn_scores(model, fast, start, BLOCKS, settings, journal)
    losses = plain_training(model, plain, start, blocks[epoch_order(len(BLOCKS), 0, 0)], 0.05)
    seen = len(losses)
    if device == "cpu":
        assert [r["loss"] for r in journal.records] == pytest.approx(losses, abs=1e-4)
    else:  # losses are read ten at a time, and a graph runs no Python that keeps masks
        assert journal.records[0]["loss"] == pytest.approx(sum(losses[:10]) / 10, abs=1e-3)
        seen = CapturedStep.WARM_UP
    for a, b in zip(fast.masks[:seen], plain.masks[:seen], strict=True):
        assert (a != b).sum() <= 0.01 * space.size


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("device", "dtype", "length", "batch"),
    [
        ("cpu", torch.float32, 24, 2),
        pytest.param("cuda", torch.bfloat16, 512, 1, marks=on_gpu),  # captured, Triton's attention
        pytest.param("cuda", torch.bfloat16, 2048, 1, marks=on_gpu),  # captured, PyTorch's
        pytest.param("cuda", torch.bfloat16, 2048, 2, marks=on_gpu),  # counted
    ],
)
def test_the_driver_runs_our_ops_at_real_sizes(device, dtype, length, batch, monkeypatch):
    """Once a layer and step each, at head size 128, and the losses of plain PyTorch come out."""
    if device == "cpu":
        monkeypatch.setattr("grasp.gates.gating._kernel_is_faster", lambda query: True)
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 128, "ffn": 1408}
    model = tiny_model("llama", **sizes, max_position_embeddings=2048, dtype=dtype).to(device)
    space = UnitSpace.of(model)
    layers, steps = len(space.layers), 14
    projection = Projection(space, Budget("keep", 0.5, 1), device=device)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(space.size, generator=generator).to(device)
    blocks = torch.randint(3, 250, (steps * batch, length), generator=generator)
    settings, journal = LearnSettings(TrainSettings(1, batch, lr=0.05)), Memory()
    next_token_loss(model, blocks[:1].to(device))  # tries the head out
    ran = ops_run(lambda: learn_scores(model, projection, start, blocks, settings, journal))
    assert journal.notes == []

    if device == "cuda" and batch * length <= GRAPH_TOKENS:
        steps = CapturedStep.WARM_UP + 1  # a graph runs no Python
    assert ran["grasp::gated_attention"] == ran["grasp::gated_swiglu_ffn"] == steps * layers
    assert ran["grasp::gated_attention_backward"] == steps * (layers - 1)
    assert ran["grasp::gated_attention_gate_backward"] == ran["grasp::budget_topk"] == steps
    assert ran["grasp::linear_cross_entropy"] == steps  # never all logits

    order = epoch_order(len(blocks), 0, 0)
    plain = plain_training(
        model, projection, start, blocks[order].to(device).view(-1, batch, length), 0.05
    )
    losses = [r["loss"] for r in journal.records]
    if device == "cpu":
        assert losses == pytest.approx(plain, abs=1e-4)
    else:  # read ten at a time; rounding in bf16 makes the masks part in the end
        assert losses[0] == pytest.approx(sum(plain[:10]) / 10, rel=5e-3)
        assert losses[1] == pytest.approx(sum(plain[10:]) / 4, rel=5e-2)


@on_gpu
def test_a_captured_step_runs_our_kernels(monkeypatch):
    """What is launched while a step is captured is what every replay runs, without Python."""
    kernels = importlib.import_module("grasp_kernels._triton.attention")
    launch, names = kernels.launch, []

    def noted(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **kwargs)

    with one_step("cuda") as step:
        replayed = CapturedStep(step, pytest.fail)
        batch, progress = Batch(BLOCKS[:2].cuda()), at(0.5).cuda()
        for _ in range(CapturedStep.WARM_UP):
            replayed(batch, progress)
        monkeypatch.setattr(kernels, "launch", noted)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            replayed(batch, progress)
        counts = Counter(names)
        replayed(batch, progress)
    assert replayed._graph is not None and Counter(names) == counts
    assert counts == {"_forward": 3, "_delta": 3, "_backward_kv": 2, "_backward_q": 2}
    assert not any("scaled_dot_product" in event.key for event in seen.key_averages())


@pytest.mark.parametrize(
    ("family", "change"),
    [("Gemma2", {"final_logit_softcapping": 5.0}), ("Granite", {"logits_scaling": 3.0})],
)
def test_loss_of_heads_that_do_more_than_multiply(family, change):
    model = stock_model(family, **change)
    plain = stock_model(family, **dict.fromkeys(change, None if family == "Gemma2" else 1.0))
    for m, chunked in ((model, False), (plain, True)):
        with Calls(m.get_output_embeddings()) as calls:
            next_token_loss(m, BLOCKS[:2])  # the first call tries the head out
            calls.count = 0
            loss = next_token_loss(m, BLOCKS[:2])
        assert calls.count == (not chunked)
        want = m(input_ids=BLOCKS[:2], labels=BLOCKS[:2]).loss
        torch.testing.assert_close(loss, want)


HEADS = {
    "plain": ("Llama", {}),
    "capped": ("Gemma2", {"final_logit_softcapping": 5.0}),
    "scaled": ("Granite", {"logits_scaling": 3.0}),
}


@pytest.mark.parametrize("lm_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("head", HEADS)
def test_distance_from_a_teacher(head, lm_weight):
    """Against the definition; the dense model is at no distance from itself."""
    family, change = HEADS[head]
    dense, model = (stock_model(family, **change) for _ in range(2))
    for parameter in model.get_decoder().layers.parameters():  # both have the same head
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = BLOCKS[:3]
    batch = Batch(ids, last_hidden(dense, ids))
    found = loss(model.requires_grad_(False), batch, lm_weight)
    own, known = (
        m(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(1) for m in (model, dense)
    )
    distance = (known.exp() * (known - own)).sum(1).mean()
    hard = -own.gather(1, ids[:, 1:].reshape(-1, 1)).mean()
    torch.testing.assert_close(found, (1 - lm_weight) * distance + lm_weight * hard)
    assert distance > 1e-3
    if lm_weight == 0:
        torch.testing.assert_close(loss(dense, batch, 0.0), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_gates_that_learn_from_the_dense_model_come_closer_to_it():
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    projection, teacher = Projection(space, Budget("keep", 0.5, 8)), last_hidden(model, BLOCKS)
    settings = LearnSettings(TrainSettings(8, 4, lr=0.05, lm_weight=0.0), 0.0)
    journal = Memory()
    start = torch.zeros(space.size)
    learn_scores(model, projection, start, BLOCKS, settings, journal, teacher)
    losses = [record["loss"] for record in journal.records]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert vars(model.get_decoder()).keys() == vars(tiny_model("llama").get_decoder()).keys()


def test_a_plain_head_is_known_where_two_passes_differ_by_a_bit():
    """As on a GPU: all logits would be made."""
    model, passes = tiny_model("llama"), []

    def another_bit(*args):
        passes.append(1)
        return args[-1] * (1 + len(passes) * 2**-20)

    model.model.norm.register_forward_hook(another_bit)
    with Calls(model.get_output_embeddings()) as calls:
        next_token_loss(model, BLOCKS[:2])
    assert calls.count == 1  # the one that tries the head out


@pytest.mark.parametrize("stop_at", [1, 5, 13, 23])
def test_resumed_ends_where_uninterrupted_does(stop_at):
    _, want = learn(Memory())
    journal = Memory(stop_at)
    with pytest.raises(KeyboardInterrupt):
        learn(journal)
    journal.stop_at = 10**9
    _, got = learn(journal)
    assert torch.equal(got, want)


def test_seed_decides():
    assert torch.equal(learn(Memory())[1], learn(Memory())[1])
    assert not torch.equal(learn(Memory())[1], learn(Memory(), seed=1)[1])


def test_accumulation_equals_a_batch():
    one_step = {"epochs": 1, "batch_size": 12, "accumulate": 1}
    _, batched = learn(Memory(), **one_step)
    journal = Memory()
    _, accumulated = learn(journal, **one_step | {"batch_size": 5, "accumulate": 3})
    assert torch.allclose(batched, accumulated, atol=1e-4)
    assert [r["step"] for r in journal.records] == [1]


def test_learning_lowers_the_loss():
    journal = Memory()
    learn(journal, epochs=12, anneal=0.0)
    losses = [r["loss"] for r in journal.records]
    assert sum(losses[-12:]) < sum(losses[:12])


def test_nan_loss_names_step_loss_and_fix():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    space = UnitSpace.of(model)
    projection = Projection(space, Budget("keep", 0.5, 8))
    settings = LearnSettings(TrainSettings(1))
    with pytest.raises(GraspError, match=r"loss is nan at step 1: try a smaller `lr`"):
        learn_scores(model, projection, torch.zeros(space.size), BLOCKS, settings, Journal())


@pytest.mark.parametrize("kind", ["channel", "unit"])
def test_scales_stay_in_range_and_help(kind):
    model = tiny_model("llama")
    journal = Memory()
    scales = learn_scales(model, kind, BLOCKS, TrainSettings(10, lr=0.05), journal)
    assert ((scales > 0.5) & (scales < 1.5)).all() and scales.std() > 0.01
    losses = [r["loss"] for r in journal.records]
    assert sum(losses[-12:]) < sum(losses[:12])


def test_scales_that_nothing_moves_decay_by_the_epoch_and_scores_do_not():
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    start = torch.linspace(-1, 1, space.size + 5)
    for epochs, batch_size in ((1, 1), (2, 1), (1, 4)):
        settings = TrainSettings(epochs, batch_size, lr=0.3, decay=0.5)
        with gated(model, space) as gates:
            theta = train_gates(
                model,
                gates,
                start,
                lambda theta, _: torch.ones(space.size) + 0 * theta[: space.size],
                BLOCKS,
                settings,
                Journal(),
                scales=5,
            )
        assert torch.equal(theta[: space.size], start[: space.size])
        left = math.exp(-0.5 * epochs)
        torch.testing.assert_close(theta[space.size :], left * start[space.size :])


def test_fisher_is_the_squared_gradient_per_cost():
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    fisher = fisher_scores(model, space, BLOCKS[:2], Journal())
    with gated(model, space) as gates:
        want = torch.zeros(space.size)
        for block in BLOCKS[:2]:
            z = torch.ones(space.size, requires_grad=True)
            gates.set(z)
            want += torch.autograd.grad(next_token_loss(model, block[None]), z)[0] ** 2
    _, ffn, kv = next(space.segments())
    assert torch.allclose(fisher[ffn], want[ffn])
    assert torch.allclose(fisher[kv], want[kv] * 3 / space.layers[0].kv_cost)


def test_ranked_keeps_order_and_spacing_and_breaks_ties_by_rank():
    space = UnitSpace(8, (LayerUnits(4, 1, 1, 4),), 0)
    rank = torch.tensor([0, 4, 1, 2, 3])
    project = Projection(space, Budget("keep", 1.0, 1), tie_rank=rank)
    assert project.ranked(torch.tensor([5.0, 1e-9, 7.0, 0.0, 1e9])).tolist() == [
        0,
        -0.5,
        0.5,
        -1,
        1,
    ]
    assert project.ranked(torch.zeros(5)).tolist() == [1, -1, 0.5, 0, -0.5]


def test_magnitude_by_definition():
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    scores = magnitude_scores(model, space)
    layer = model.model.layers[0]
    mlp, attention, d = layer.mlp, layer.self_attn, space.hidden_size
    channel = [mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3]]
    assert torch.isclose(scores[3], sum(w.square().sum() for w in channel) / (3 * d))
    dim, group = space.layers[0].head_dim, space.layers[0].group_size
    heads, head = slice(dim * group, 2 * dim * group), slice(dim, 2 * dim)  # KV group 1
    weights = [attention.q_proj.weight[heads], attention.o_proj.weight[:, heads]]
    weights += [attention.k_proj.weight[head], attention.v_proj.weight[head]]
    mean = sum(w.square().sum() for w in weights) / sum(w.numel() for w in weights)
    assert torch.isclose(scores[space.layers[0].ffn + 1], mean)


class HostReads(TorchDispatchMode):
    """Counts reads of values by the host, and shapes that hang on values: a GPU waits for each."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__.startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


def test_a_step_never_makes_a_gpu_wait(monkeypatch):
    """On tensors without values, where to read one or to copy one away raises."""
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["meta"])
    model = tiny_model("llama")
    next_token_loss(model, BLOCKS)  # the head is tried out with values
    teacher = last_hidden(model, BLOCKS[:3]).to("meta")
    model.to("meta")
    space = UnitSpace.of(model)
    projection = Projection(space, Budget("keep", 0.5, 8), device="meta")
    whole = projection.budget.cost(space)

    def straight_through(scores, progress):
        mask = projection(scores, annealed(projection.limit, whole, progress, 0.5))
        p = torch.sigmoid(scores / TAU)
        return mask + (p - p.detach())

    theta = torch.zeros(space.size, device="meta", requires_grad=True)
    adamw = torch.optim.AdamW([theta], capturable=True)
    adamw.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    inputs = Batch(BLOCKS[:3].to("meta"), teacher), at(0.1).to("meta")
    with gated(model, space) as gates:
        step = Step(model, gates, theta, straight_through, adamw, batch_size=2, lm_weight=0.5)
        with HostReads() as reads:
            assert step(*inputs).device.type == "meta"
        assert reads.count == 0 and theta.grad is not None
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            step(*inputs, count=True)


@contextmanager
def one_step(device):
    model = tiny_model("llama").to(device)
    space = UnitSpace.of(model)
    theta = torch.zeros(space.size, device=device, requires_grad=True)
    on_gpu = device == "cuda"
    rate = torch.tensor(0.01, device=device) if on_gpu else 0.01
    adamw = torch.optim.AdamW([theta], lr=rate, capturable=on_gpu)
    with gated(model, space) as gates:
        values = lambda theta, progress: 1 + theta * progress  # noqa: E731
        yield Step(model, gates, theta, values, adamw, 2, lm_weight=0.5)


def test_a_step_that_cannot_be_captured_says_so_and_runs_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "device", fail)
    notes, ended = [], []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool))
    with one_step("cpu") as plain, one_step("cpu") as captured:
        replayed = CapturedStep(captured, notes.append)
        for number, rows in enumerate((2, 2, 2, 2, 2, 1)):
            batch, progress = Batch(BLOCKS[number : number + rows]), at(number / 6)
            assert torch.equal(plain(batch, progress), replayed(batch, progress))
    assert torch.equal(plain.theta, captured.theta)
    assert notes == [
        "steps run one kernel at a time, not as a CUDA graph: "
        "operation not permitted when stream is capturing and more"
    ]
    assert ended == [(0, (0, 7))]  # the allocator is told, too


@on_gpu
def test_a_captured_step_is_the_step():
    notes = []
    with one_step("cuda") as plain, one_step("cuda") as captured:
        replayed = CapturedStep(captured, notes.append)
        teacher = last_hidden(plain.model, BLOCKS).cuda().flip(0)  # of other blocks: not met
        for number in range(8):
            rows = slice(number, number + 2)
            batch, progress = Batch(BLOCKS[rows].cuda(), teacher[rows]), at(number / 8).cuda()
            torch.testing.assert_close(plain(batch, progress), replayed(batch, progress))
    torch.testing.assert_close(plain.theta, captured.theta)
    assert notes == []


def test_steps_read_the_loss_once_each_on_a_cpu():
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    next_token_loss(model, BLOCKS)
    with gated(model, space) as gates, HostReads() as reads:
        train_gates(
            model,
            gates,
            torch.zeros(space.size),
            lambda theta, _: 1 + theta,
            BLOCKS[:4],
            TrainSettings(1),
            Journal(),
        )
    # the loss of each step and Adam's counter; and of each layer's FFN how many channels it keeps
    assert reads.count <= 4 * (2 + len(space.layers))
