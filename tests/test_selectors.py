"""One-shot criteria: each against a plain form of its formula, resumed, and end to end."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from families import save_tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp
from grasp import criteria
from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.compress.fold import fold_mask
from grasp.gates.moments import Moments, channel_moments
from grasp.gates.objective import next_token_loss
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, layer_options
from grasp.model.units import UnitSpace, decoder_layers
from grasp.select.greedy_output_approximation import parted, prune_greedily
from grasp.select.head_similarity import distance_to_nearest_later, divergences, returning_maps
from grasp.select.ratio import uniform_ratio

BLOCKS = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(3))
OURS = [c for c in criteria.OURS if c.dense]
CRITERIA = [c.name for c in OURS if not (c.learns or c.per_budget or c.name == "random")]
families = pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: biased q, k and v
ON_ACTIVATIONS = ("wanda-sp", "flap", "output-approximation")


class Memory(Journal):
    """Keeps the last state; dies right after step `stop_at`."""

    def __init__(self, stop_at=None):
        self.stop_at, self.state, self.steps = stop_at, None, []

    def load(self):
        return self.state

    def save(self, state, *, final=False):
        self.state = {name: t.clone() for name, t in state().items()}
        if self.steps[-1] == self.stop_at:
            raise KeyboardInterrupt

    def progress(self, step, total, loss, tokens, **info):
        self.steps.append(step)


def scores(method, model, blocks=BLOCKS, journal=None):
    units, journal = UnitSpace.of(model), journal or Journal()
    found = criteria.get(method)(model=model, units=units, blocks=blocks, journal=journal)
    assert found.dtype == torch.float32 and found.shape == (UnitSpace.of(model).size,)
    return found


def passing(model, linear):
    """Input and output of a linear for all tokens at once, fp64 [tokens, channels]."""
    seen = []
    see = linear.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    with see, torch.no_grad():
        model(input_ids=BLOCKS)
    return [x.flatten(0, 1).double() for x in seen]


def columns_of(space, layer):
    """The columns of o_proj that belong to each KV group, one by one."""
    units = space.layers[layer]
    width = units.head_dim * units.group_size
    return [range(k * width, (k + 1) * width) for k in range(units.kv_groups)]


def by_module(model, found):
    """(layer, its modules, scores of its channels, scores of its groups), layer by layer."""
    space = UnitSpace.of(model)
    for (index, ffn, kv), modules in zip(space.segments(), decoder_layers(model), strict=True):
        yield index, modules, found[ffn], found[kv]


def assert_ranks(found, raw):
    """`found` is the middle of each unit's place among the `raw` scores of its module."""
    order = torch.tensor([sum(other < one for other in raw) for one in raw.tolist()])
    torch.testing.assert_close(found, (order + 0.5) / len(raw))


@pytest.mark.parametrize("method", CRITERIA)
def test_fused_projections_score_as_separate_ones(method):
    """Mistral and a Phi-3 that rotates whole heads are the same decoder."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    separate = tiny_model("mistral")
    fused = tiny_model("phi3", rope_parameters=rope, sliding_window=None, rms_norm_eps=1e-6)
    weights = separate.state_dict()
    for i in range(3):
        for module, name, parts in (
            ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
        ):
            prefix = f"model.layers.{i}.{module}"
            rows = [weights.pop(f"{prefix}.{part}.weight") for part in parts]
            weights[f"{prefix}.{name}.weight"] = torch.cat(rows)
    fused.load_state_dict(weights)
    torch.testing.assert_close(scores(method, fused), scores(method, separate))


@families
def test_wanda_sp(family):
    model = tiny_model(family)
    space = UnitSpace.of(model)
    for index, modules, channels, groups in by_module(model, scores("wanda-sp", model)):
        x, _ = passing(model, modules.ffn.down)
        assert_ranks(channels, (modules.ffn.down.weight.abs() * x.norm(dim=0)).mean(0))
        x, _ = passing(model, modules.attention.out)
        column = (modules.attention.out.weight.abs() * x.norm(dim=0)).mean(0)
        heads = [sum(column[j] for j in own) for own in columns_of(space, index)]
        assert_ranks(groups, torch.stack(heads))


@families
def test_flap(family):
    model = tiny_model(family)
    space = UnitSpace.of(model)
    for index, modules, channels, groups in by_module(model, scores("flap", model)):
        want = []
        for linear in (modules.ffn.down, modules.attention.out):
            x, _ = passing(model, linear)
            raw = (x - x.mean(0)).square().sum(0) / (len(x) - 1) * linear.weight.norm(dim=0) ** 2
            want.append(((raw - raw.mean()) / raw.std()).float())
        torch.testing.assert_close(channels, want[0], rtol=1e-4, atol=1e-5)
        heads = [torch.stack([want[1][j] for j in own]).mean() for own in columns_of(space, index)]
        torch.testing.assert_close(groups, torch.stack(heads), rtol=1e-4, atol=1e-5)


@families
def test_output_approximation(family):
    model = tiny_model(family)
    space = UnitSpace.of(model)
    for index, modules, channels, groups in by_module(model, scores("output-approximation", model)):
        mlp, o_proj = modules.ffn.module, modules.attention.out
        x, up = passing(model, mlp.up_proj)
        gate = x @ mlp.gate_proj.weight.double().T  # before the activation
        d = mlp.down_proj.weight.double().square().sum(0)
        assert_ranks(channels, d * up.square().mean(0) * 0.5 * d * gate.square().mean(0))
        x, _ = passing(model, o_proj)
        # the second moment of what each column adds to the output, summed over its rows
        added = [(x[:, j, None] * o_proj.weight[:, j]).square().sum(1).mean() for j in range(128)]
        heads = [sum(added[j] for j in own) for own in columns_of(space, index)]
        assert_ranks(groups, torch.stack(heads))


@families
def test_taylor(family):
    model, plain = tiny_model(family), tiny_model(family).requires_grad_()
    found = scores("taylor", model)
    next_token_loss(plain, BLOCKS).backward()  # the mean over all samples, in one batch
    space, d = UnitSpace.of(model), plain.config.hidden_size
    for index, modules, channels, groups in by_module(plain, found):
        units = space.layers[index]
        mlp, attention = (
            {name: (p * p.grad).detach().abs() for name, p in module.named_parameters()}
            for module in (modules.ffn.module, modules.attention.module)
        )
        for j in range(units.ffn):
            parts = mlp["gate_proj.weight"][j], mlp["up_proj.weight"][j]
            want = sum(p.sum() for p in (*parts, mlp["down_proj.weight"][:, j])) / (3 * d)
            torch.testing.assert_close(channels[j], want, rtol=1e-3, atol=1e-9)
        for k, own in enumerate(columns_of(space, index)):
            rows = slice(k * units.head_dim, (k + 1) * units.head_dim)
            parts = [attention[f"{name}_proj.weight"][rows] for name in "kv"]
            parts.append(attention["q_proj.weight"][list(own)])
            parts.append(attention["o_proj.weight"][:, list(own)])
            want = sum(p.sum() for p in parts) / sum(p.numel() for p in parts)
            torch.testing.assert_close(groups[k], want, rtol=1e-3, atol=1e-9)


@families
def test_wanda_plus_plus(family):
    model, plain = tiny_model(family), tiny_model(family).requires_grad_()
    space = UnitSpace.of(model)
    for index, modules, channels, groups in by_module(plain, scores("wanda++", model)):
        seen = {}
        layer = plain.model.layers[index]
        layer.register_forward_hook(lambda _, args, output, seen=seen: seen.update(out=output))
        linears = (modules.ffn.down, modules.attention.out)
        power = [0.0, 0.0]
        for block in BLOCKS:
            plain(input_ids=block[None])
            gradients = torch.autograd.grad(seen["out"].norm(), [x.weight for x in linears])
            power = [p + g.square() / len(BLOCKS) for p, g in zip(power, gradients, strict=True)]
        column = []
        for linear, squares in zip(linears, power, strict=True):
            x, _ = passing(plain, linear)
            x = (x.square().sum(0) / len(BLOCKS)).sqrt()
            column.append(((100 * squares.sqrt() + x) * linear.weight.abs()).mean(0).detach())
        assert_ranks(channels, column[0])
        heads = [sum(column[1][j] for j in own) for own in columns_of(space, index)]
        assert_ranks(groups, torch.stack(heads))
    assert not any(p.requires_grad for p in model.parameters())


def random_blocks(seed, samples=24):
    return torch.randint(3, 250, (samples, 32), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("similar_heads", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_greedy_output_approximation_recovers_and_cuts_as_it_goes(family, similar_heads):
    dense, model = tiny_model(family), tiny_model(family)
    space = UnitSpace.of(model)
    projection = Projection(space, Budget("keep", 0.5, ffn_multiple=8))
    blocks = random_blocks(1, 96)
    found = prune_greedily(model, projection, blocks, Journal(), similar_heads=similar_heads)
    mask = projection.mask(found)
    for modules, (ffn, kv) in zip(decoder_layers(model), mask.layers(), strict=True):
        zero = (modules.ffn.down.weight == 0).all(0)
        assert torch.equal((~zero).nonzero().flatten(), ffn)  # what was cut is what the mask cuts
        heads = (modules.attention.out.weight == 0).all(0).view(4, -1).all(1)
        assert torch.equal((~heads).nonzero().flatten(), kv)
        assert len(ffn) == 48 and len(kv) == 2  # half of every module

    unseen = random_blocks(2)

    def far(pruned):
        with torch.no_grad():
            return (pruned(input_ids=unseen).logits - dense(input_ids=unseen).logits).norm()

    plain = copy.deepcopy(dense)
    fold_mask(plain, mask)
    assert far(model) < 0.97 * far(plain)  # the same units, without recovery


def test_protected_layers_stay_whole_and_take_part_in_the_recovery():
    dense, model = tiny_model("llama"), tiny_model("llama")
    budget = Budget("keep", 5 / 6, ffn_multiple=8, protect_first=1, protect_last=1)
    projection = Projection(UnitSpace.of(model), budget)
    mask = projection.mask(prune_greedily(model, projection, random_blocks(1), Journal()))
    assert [(len(ffn), len(kv)) for ffn, kv in mask.layers()][::2] == [(96, 4), (96, 4)]
    before, after = (list(each.model.layers) for each in (dense, model))
    assert all(map(torch.equal, before[0].parameters(), after[0].parameters()))
    assert not torch.equal(before[2].mlp.down_proj.weight, after[2].mlp.down_proj.weight)


def test_units_are_scored_on_other_samples_than_weights_are_fitted_to():
    first, others = random_blocks(1, 6), (random_blocks(2, 18), random_blocks(3, 18))
    found = []
    for rest in others:
        model = tiny_model("llama", layers=1)
        projection = Projection(UnitSpace.of(model), Budget("keep", 0.5, ffn_multiple=8))
        prune_greedily(model, projection, torch.cat([first, rest]), Journal())
        found.append(model.model.layers[0].self_attn.o_proj.weight)
    assert torch.equal(found[0] == 0, found[1] == 0) and not torch.equal(*found)


@pytest.mark.parametrize("samples", [3, 4, 17, 64, 1024])
def test_every_sample_has_one_part_in_the_greedy_methods(samples):
    scored, fitted, held = parted(samples)
    scored = range(samples)[scored]
    assert [*scored, *fitted, *held] == [*range(samples)]
    assert 1 <= len(scored) <= 16 and 1 <= len(held) <= len(fitted)


def test_greedy_output_approximation_without_pruning_is_the_dense_model():
    """Inputs are then the dense ones, and nothing is left to fit."""
    dense, model = tiny_model("llama"), tiny_model("llama")
    projection = Projection(UnitSpace.of(model), Budget("keep", 1.0, 1))
    blocks = torch.randint(3, 250, (24, 64), generator=torch.Generator().manual_seed(1))
    prune_greedily(model, projection, blocks, Journal())
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("family", "heads"), [("llama", 4), ("qwen2", 8), ("gemma2", 8)])
def test_groups_that_attend_alike_go_first(family, heads):
    """Queries and keys of group 2 are those of group 1: one of them goes, and it is the earlier."""
    model = tiny_model(family, heads=heads)
    space = UnitSpace.of(model)
    for modules in decoder_layers(model):
        for rows in (modules.attention.q, modules.attention.k):
            for values in (rows.weight, rows.bias):
                if values is not None:
                    groups = values.view(4, -1)
                    groups[2] = groups[1]
    projection = Projection(space, Budget("keep", 0.75, ffn_multiple=8))
    found = prune_greedily(model, projection, BLOCKS, Journal(), similar_heads=True)
    assert all(kv.tolist() == [0, 2, 3] for _, kv in projection.mask(found).layers())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_head_similarity_is_the_divergence_of_attention_maps(family):
    model = tiny_model(family, layers=1)
    before, modules = model.config._attn_implementation, decoder_layers(model)[0]
    with returning_maps(model):
        (maps,) = model(input_ids=BLOCKS, output_attentions=True).attentions
        layer, hidden = model.get_decoder().layers[0], first_hidden(model, BLOCKS)
        (options,) = layer_options(model, BLOCKS[:1])
        run, attention = lambda x: layer(x, **options), modules.attention.module
        found = distance_to_nearest_later(attention, 4, run, hidden)
    assert model.config._attn_implementation == before
    maps = maps.double().unflatten(1, (4, 2)).mean(2).transpose(0, 1)  # [groups, samples, q, k]

    def kl(p, q):
        return (p * (p / q).clamp(min=1e-300).log()).nan_to_num().sum(-1).mean()

    for i, one in enumerate(maps[:-1]):
        middles = [(one + other) / 2 for other in maps[i + 1 :]]
        later = zip(maps[i + 1 :], middles, strict=True)
        want = min((kl(one, m) + kl(other, m)) / 2 for other, m in later)
        torch.testing.assert_close(found[i].double(), want, rtol=1e-4, atol=1e-6)
    assert found[-1] == torch.inf


@settings(max_examples=50)
@given(st.integers(1, 7), st.integers(0, 1000))
def test_the_distance_to_the_nearest_later_head_is_the_published_scan(heads, seed):
    """Every threshold drops the heads below it, and so every number of heads has a threshold."""
    maps = torch.rand(heads, 3, 5, generator=torch.Generator().manual_seed(seed)).double()
    maps /= maps.sum(-1, keepdim=True)
    later = divergences(maps)
    distance = torch.minimum(later, later.T)
    for tau in (*later.flatten().tolist(), 0.0):
        dropped: set[int] = set()
        for i, j in itertools.product(range(heads), repeat=2):
            if i != j and distance[i, j] < tau and not {i, j} & dropped:
                dropped.add(i)
        assert dropped == set((later.amin(1) < tau).nonzero().flatten().tolist())


def test_free_scores_know_no_budget(tiny, text, tmp_path):
    """They learn on the dense model, with every gate open, and are those of any budget."""
    options = dict(samples=4, seq_len=32, epochs=2, scale_epochs=0, eval_windows=2, device="cpu")
    options |= dict(calibration=text, ffn_multiple=1, method="free")
    whole = grasp.prune(tiny, tmp_path / "both", keep=(0.7, 0.4), **options)
    alone = grasp.prune(tiny, tmp_path / "alone", keep=0.7, **options)
    assert whole[0].mask.digest() == alone.mask.digest()
    assert not (whole[1].mask.keep & ~whole[0].mask.keep).any()
    log = (tmp_path / "alone" / "log.jsonl").read_text().splitlines()
    learning = [r for r in map(json.loads, log) if r.get("stage") == "learn"]
    assert len(learning) == 8 and all(r["cost"] == r["limit"] == r["of"] for r in learning)
    fisher = grasp.prune(tiny, tmp_path / "fisher", keep=0.4, **options | {"method": "fisher"})
    assert fisher.mask.digest() != whole[1].mask.digest()  # where it starts from


def test_taylor_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    norm = model.model.norm.weight.requires_grad_()
    scores("taylor", model, BLOCKS[:1])
    scores("taylor", model, BLOCKS[:1])  # adds nothing to the first
    assert [p for p in model.parameters() if p.requires_grad] == [norm]
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("method", CRITERIA)
def test_a_bf16_model_scores_like_the_same_weights_in_fp32(method):
    model = tiny_model("llama", dtype=torch.bfloat16)
    halved, whole = scores(method, model), scores(method, model.float())
    assert halved.isfinite().all()
    assert torch.corrcoef(torch.stack([halved, whole]))[0, 1] > 0.99


def test_moments_far_from_zero_keep_their_digits():
    """A channel of mean 1000 and spread 0.1: sums of squares in fp32 would see no spread."""
    model = tiny_model("qwen2")
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.weight.mul_(0.1)
    q_proj.bias.fill_(1000.0)
    (found,) = channel_moments(model, [(q_proj, "output")], BLOCKS, Journal())
    _, y = passing(model, q_proj)
    torch.testing.assert_close(found.mean, y.mean(0).float())
    torch.testing.assert_close(found.var, y.var(0, correction=0).float(), rtol=1e-2, atol=0)
    assert not q_proj._forward_hooks
    assert Moments(torch.tensor([3.0]), torch.tensor([4.0])).second == 13


def test_uniform_ratio_keeps_the_same_part_of_every_module():
    """Whatever the scale of its scores; equal scores stay equal, so that chance decides on them."""
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    drawn = torch.rand(space.size).exp()
    pieces = [drawn[s] * 10.0**i for i, (_, *parts) in enumerate(space.segments()) for s in parts]
    mask = Projection(space, Budget("keep", 0.5, 1)).mask(uniform_ratio(pieces))
    assert [(len(ffn), len(kv)) for ffn, kv in mask.layers()] == [(48, 2)] * 3
    ties = uniform_ratio([torch.tensor([0.0, 7.0, 0.0, 9.0])])
    assert ties.tolist() == [0.25, 0.625, 0.25, 0.875]


@pytest.mark.parametrize("method", ON_ACTIVATIONS)
@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_resumed_ends_where_uninterrupted_does(method, stop_at):
    model = tiny_model("llama")
    want = scores(method, model)
    journal = Memory(stop_at)
    with pytest.raises(KeyboardInterrupt):
        scores(method, model, journal=journal)
    journal.stop_at = None
    assert torch.equal(scores(method, model, journal=journal), want)
    assert journal.steps == [1, 2, 3, 4, 5, 6]  # nothing is done twice


@pytest.mark.parametrize("method", ["fisher", "taylor"])
def test_what_is_done_is_not_done_again(method):
    model, journal = tiny_model("llama"), Memory()
    want = scores(method, model, journal=journal)
    assert torch.equal(scores(method, model, journal=journal), want)
    assert journal.steps == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("biased") / "model", "qwen2")


@pytest.mark.parametrize("method", [criterion.name for criterion in OURS])
def test_every_method_prunes(method, tiny, biased, text, tmp_path):
    model = biased if method in ON_ACTIVATIONS else tiny
    options = dict(samples=4, seq_len=32, epochs=1, scale_epochs=0, eval_windows=2, device="cpu")
    records = []
    result = grasp.prune(
        model,
        tmp_path / "out",
        calibration=text,
        method=method,
        ffn_multiple=8,
        show=records.append,
        **options,
    )
    budget = result.summary["budget"]
    assert budget["obtained"] <= budget["limit"] < budget["obtained"] + 8 * 3
    assert result.summary["recipe"]["method"] == method
    assert grasp.load(result.folder)[0] is not None
    stage = [r for r in records if r.get("stage") == method]
    if method not in ("learned", "free", "magnitude", "random"):
        by_layer = method == "wanda++" or criteria.get(method).updates_weights
        steps = 3 if by_layer else 4  # samples
        assert [r["step"] for r in stage] == list(range(1, steps + 1))
        assert all(r["loss"] > 0 and r["tokens_per_second"] > 0 for r in stage)
