"""Routed experts as units: counted, gated at the router, cut, saved and scored."""

from __future__ import annotations

import copy
import json
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from families import MIXTURES, tiny_mixture, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from benchmarks import experts
from grasp import criteria
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.checkpoint import probe, verify
from grasp.checkpoint.save import save
from grasp.compress.fold import fold
from grasp.errors import GraspError
from grasp.gates.fidelity import check_gates
from grasp.gates.gating import gated
from grasp.gates.objective import next_token_loss
from grasp.gates.scales import fold_scales
from grasp.journal import Journal
from grasp.model.experts import all_routed_experts
from grasp.model.units import UnitSpace
from grasp.run.stages import refit
from grasp.select.reap import frequency_scores, reap_scores, routed

families = pytest.mark.parametrize("family", MIXTURES)
IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
QUICK = ("--samples", 2, "--seq-len", 16, "--epochs", 1, "--scale-epochs", 1, "--eval-windows", 1)


def random_mask(space, keep=0.6, seed=1, **widths):
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(seed))
    return Projection(space, Budget("keep", keep, 1, **widths)).mask(scores)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family) is the folder of that tiny mixture."""
    folders = {}

    def saved(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family) / "model"
            tiny_mixture(family).save_pretrained(folders[family])
            tiny_tokenizer().save_pretrained(folders[family])
        return folders[family]

    return saved


# Units


@families
def test_what_a_cut_removes_is_what_it_costs(family):
    model = tiny_mixture(family)
    space = UnitSpace.of(model)
    assert space.total_params == sum(p.numel() for p in model.parameters())
    assert [(n.experts, n.experts_per_token) for n in space.layers] == [(6, 2)] * 2
    mask = random_mask(space)
    cut = fold(model, mask)
    assert UnitSpace.of(cut) == mask.pruned_space()
    kept = {len(own) for own in mask.experts()}
    assert len(kept) == 1 and 2 <= kept.pop() < 6  # the same number in each layer


def test_shared_experts_have_channels_and_attention_has_groups():
    layers = UnitSpace.of(tiny_mixture("qwen2_moe")).layers
    assert [(n.ffn, n.kv_groups, n.experts) for n in layers] == [(24, 2, 6)] * 2
    layers = UnitSpace.of(tiny_mixture("gpt_oss")).layers
    assert [(n.ffn, n.kv_groups, n.experts) for n in layers] == [(0, 0, 6)] * 2


def test_as_many_experts_stay_as_a_token_visits():
    space = UnitSpace.of(tiny_mixture("mixtral"))
    least = Budget("keep", 1.0).floor(space) / space.cost
    mask = random_mask(space, keep=round(least + 0.001, 3))
    assert [len(own) for own in mask.experts()] == [2, 2]


# Gates


@families
def test_gates_of_one_change_nothing(family):
    assert check_gates(tiny_mixture(family), "channel", "output", IDS) == 0


@families
def test_gated_off_is_cut_off(family, tmp_path):
    """In memory, and as the stock class read back: logits, and greedy tokens with a cache."""
    model = tiny_mixture(family)
    space = UnitSpace.of(model)
    mask = random_mask(space)
    with torch.no_grad(), gated(model, space) as gates:
        gates.set(mask.keep.float())
        want = model(IDS).logits
    cut = fold(model, mask)
    assert torch.allclose(cut(IDS).logits, want, atol=1e-5)
    save(cut, tiny_tokenizer(), tmp_path / "out", mask=mask)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is type(model) and stock.config.model_type == family
    assert torch.equal(stock(IDS).logits, cut(IDS).logits)
    options = dict(attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8)
    cached, uncached = (stock.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


@families
def test_no_token_is_routed_to_a_closed_expert(family):
    model = tiny_mixture(family)
    space = UnitSpace.of(model)
    mask = random_mask(space)
    routers = [found.router for found in all_routed_experts(model)]
    seen = []
    hooks = [r.register_forward_hook(lambda _, args, out: seen.append(out)) for r in routers]
    with torch.no_grad(), gated(model, space) as gates:
        gates.set(mask.keep.float())
        model(IDS)
    for hook in hooks:
        hook.remove()
    for (logits, _, index), kept in zip(seen, mask.experts(), strict=True):
        closed = sorted({*range(6)} - {*kept.tolist()})
        assert closed and (logits[:, closed] == -torch.inf).all()
        assert {*index.unique().tolist()} <= {*kept.tolist()}


@families
def test_a_closed_gate_has_the_gradient_that_it_would_open_with(family):
    """The derivative of the loss, with the routes of the others as they are."""
    model = tiny_mixture(family)
    space = UnitSpace.of(model)
    z = random_mask(space).keep.float().requires_grad_()
    with gated(model, space) as gates:
        gates.set(z)
        loss = next_token_loss(model, IDS)
        (gradient,) = torch.autograd.grad(loss, z)
        gates.set(z.detach())
        assert torch.allclose(next_token_loss(model, IDS), loss, atol=1e-6)
    experts = torch.cat([gradient[own] for _, own in space.expert_segments()])
    assert (experts != 0).float().mean() > 0.9  # some expert may not be visited


def test_gates_leave_no_trace():
    model = tiny_mixture("qwen3_moe")
    before = [dict(vars(found.router)) for found in all_routed_experts(model)]
    with gated(model, UnitSpace.of(model)):
        assert all(hasattr(found.router, "grasp_gate") for found in all_routed_experts(model))
    after = [vars(found.router) for found in all_routed_experts(model)]
    assert [own.keys() for own in after] == [own.keys() for own in before]


@families
def test_scales_fold(family):
    model = tiny_mixture(family)
    space = UnitSpace.of(model)
    scales = 0.5 + torch.rand(space.size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), gated(model, space) as gates:
        gates.set(scales)
        want = model(IDS).logits
    fold_scales(model, "unit", scales)
    assert torch.allclose(model(IDS).logits, want, atol=1e-4)


def test_refit_leaves_columns_that_are_all_kept():
    model = tiny_mixture("qwen3_moe")
    space = UnitSpace.of(model)
    keep = torch.ones(space.size, dtype=torch.bool)
    _, experts = next(space.expert_segments())
    keep[experts.start + 2 : experts.stop] = False
    dense = model(IDS).logits
    refit(model, Mask(space, keep), IDS)
    # no column was dropped, so none changes; the routers are as before
    assert torch.allclose(model(IDS).logits, dense, atol=1e-4)
    assert "forward" not in vars(all_routed_experts(model)[0].router)


def test_refit_sees_what_is_left():
    """The second layer's o_proj is fitted to inputs that no dropped expert of the first made."""
    model = tiny_mixture("qwen3_moe")
    space = UnitSpace.of(model)
    keep = torch.ones(space.size, dtype=torch.bool)
    _, (_, _, groups) = space.segments()
    keep[groups.start] = False
    whole = copy.deepcopy(model)
    refit(whole, Mask(space, keep.clone()), IDS)
    _, experts = next(space.expert_segments())
    keep[experts.start + 2 : experts.stop] = False
    refit(model, Mask(space, keep), IDS)
    first, second = (
        [torch.equal(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight)]
        for layer, other in zip(model.model.layers, whole.model.layers, strict=True)
    )
    assert (first, second) == ([True], [False])
    assert "forward" not in vars(all_routed_experts(model)[0].router)


# Criteria


def test_reap_is_the_mean_over_the_tokens_of_an_expert():
    """Against the definition, token by token: router weight times norm of the expert's output."""
    model = tiny_mixture("qwen3_moe")
    space = UnitSpace.of(model)
    inputs = []
    (_, second) = all_routed_experts(model)
    hook = second.block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    tokens, norms = routed(model, space, IDS, Journal())
    hook.remove()
    want = [[] for _ in range(6)]
    for x in torch.cat(inputs[-2:]):  # the passes before are tests of the head
        _, (weights,), (index,) = second.router(x[None])
        for weight, e in zip(weights, index.tolist(), strict=True):
            gate, up = (second.experts.gate_up_proj[e] @ x).chunk(2)
            want[e].append(weight * (second.experts.down_proj[e] @ (F.silu(gate) * up)).norm())
    assert tokens[6:].tolist() == [len(own) for own in want]
    assert torch.allclose(norms[6:], torch.tensor([sum(own, torch.tensor(0.0)) for own in want]))
    assert tokens.sum() == 2 * 2 * IDS.numel()
    mean = norms[6:] / tokens[6:].clamp(min=1)
    scores = reap_scores(model, space, IDS, Journal())[space.size - 6 :]
    assert scores.argsort().tolist() == mean.argsort().tolist()
    scores = frequency_scores(model, space, IDS, Journal())
    assert scores[space.size - 6 :].argmax() == tokens[6:].argmax()
    assert (scores[: space.size - 12] == 2).all()  # KV groups stay


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_scores_of_experts_need_experts(method, tmp_path, refused):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    line = refused("plan", tmp_path / "dense", "--method", method, "--seq-len", 16)
    assert line.startswith(f"--method {method} scores experts, and this model has none: use")


@pytest.mark.parametrize("method", [n for n in criteria.names() if not criteria.get(n).experts])
def test_criteria_that_score_no_experts_are_refused(method, saved, refused):
    line = refused("plan", saved("mixtral"), "--method", method, "--seq-len", 16)
    assert line.startswith(f"--method {method} does not score experts: use one of learned,")


# From end to end


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen3_moe", "learned"),
        ("mixtral", "reap"),
        ("olmoe", "fisher"),
        ("gpt_oss", "learned"),
        ("granitemoe", "frequency"),
        ("qwen2_moe", "learned"),
    ],
)
def test_every_verb(family, method, saved, call, text, tmp_path, monkeypatch):
    monkeypatch.setattr(  # the verb itself starts a process of seconds for each way to load
        verify, "_in_fresh_process", lambda folder, _: probe.load_and_compare(str(folder), "grasp")
    )
    monkeypatch.chdir(tmp_path)
    options = ("--keep", 0.6, "--method", method, "--ffn-multiple", 8, "--calibration", text)
    code, planned, err = call("plan", saved(family), *options, *QUICK[:4])
    assert code == 0 and "12 experts" in planned and "uniform layout" in planned, err
    code, _, err = call("prune", saved(family), *options, *QUICK, "--out", "out", "--device", "cpu")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "grasp.json").read_text())
    budget = record["budget"]
    assert budget["obtained"] <= budget["limit"]
    assert len({len(layer["experts"]) for layer in record["kept"]}) == 1
    code, out, err = call("verify", "out")
    assert code == 0, (out, err)
    code, out, err = call("show", "out")
    assert code == 0 and "experts" in out, err
    assert "experts" in (tmp_path / "out" / "README.md").read_text()
    assert call("eval", "out", "--text", text, "--seq-len", 16, "--windows", 1)[0] == 0


def test_one_number_of_experts_for_all_layers(saved, refused):
    line = refused("plan", saved("qwen3_moe"), "--layout", "per-layer", "--seq-len", 16)
    assert line == (
        "--layout per-layer is not possible for qwen3_moe: qwen3_moe has one number of experts for "
        "all layers: use --layout uniform"
    )


def test_groups_of_experts_stay():
    """DeepSeek's router picks groups first, which a cut would make uneven."""
    from families import BROUGHT, SIZES
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    _, settings = BROUGHT["deepseek v3"]
    sizes = {**SIZES, **settings, "first_k_dense_replace": 0}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=256, pad_token_id=2, **sizes))
    with pytest.raises(GraspError, match="is a mixture of experts of another form"):
        UnitSpace.of(model)


# On a mixture that has learned to route


def test_a_trained_mixture_loses_least_by_what_its_experts_do(tmp_path, monkeypatch):
    """What benchmarks/experts.py measures, in short: routing matters, and REAP beats chance.

    Means of three seeds, as one draw of chance may be a good one.
    """
    monkeypatch.setattr(experts, "SAMPLES", 64)
    log = experts.train(tmp_path / "model", steps=200)
    assert log[-1]["loss_random_routes"] > log[-1]["loss"] + 0.3
    assert all(0 < entropy < 1 for entropy in log[-1]["router_entropy"])
    assert [sum(load) for load in log[-1]["load"]] == pytest.approx([1] * 3)
    found = experts.measure(tmp_path / "model", tmp_path / "out", ["reap", "random"], [0, 1, 2])
    assert found["dense"][0] < min(found["reap"])
    assert mean(found["reap"]) < mean(found["random"])
