"""What can go is read from the structure of each layer; everything else stays and is named."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import BROUGHT, brought_model, tiny_model
from torch import nn

from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.compress.fold import check_fold, fold
from grasp.errors import GraspError
from grasp.gates.fidelity import check_gates
from grasp.gates.gating import gated
from grasp.model.header import of_model
from grasp.model.load import auto_class
from grasp.model.units import UnitSpace, decoder_layers, why_whole
from grasp.planning.layouts import least
from grasp.planning.plan import obtained

IDS = torch.arange(3, 43)[None]


def random_mask(space, **budget):
    generator = torch.Generator().manual_seed(1)
    options = {"keep": 0.5, "ffn_multiple": 4, **budget}
    return Projection(space, Budget.of(**options)).mask(torch.rand(space.size, generator=generator))


@pytest.mark.parametrize(
    ("name", "channels", "groups", "why"),
    [
        ("mixtral", [0, 0], [2, 2], []),
        ("starcoder2", [0, 0], [2, 2], ["Starcoder2MLP is neither a gated FFN nor attention"]),
        ("olmo2", [64, 64], [0, 0], ["Olmo2Attention: q_norm.weight has 32 values, one head has"]),
        ("qwen3.5", [64, 64], [0, 0], ["Qwen3_5GatedDeltaNet is neither", "64 query, 16 key"]),
        ("lfm2", [256, 256], [0, 2], ["Lfm2ShortConv is neither a gated FFN"]),
        ("falcon-h1", [64, 64], [2, 2], ["FalconH1Mixer is neither a gated FFN"]),
        ("nemotron-h", [0, 0], [0, 2], ["NemotronHMamba2Mixer is neither a gated FFN"]),
        ("deepseek v3", [64, 64], [0, 0], ["DeepseekV3Attention is neither a gated FFN"]),
        ("gemma4, dense", [64] * 4, [2] * 4, []),
        ("gemma4, shared keys", [64] * 4, [0] * 4, ["takes the keys and values of another", "may"]),
        ("gemma4, keys as values", [64] * 4, [2, 0, 2, 0], ["Gemma4TextAttention is neither"]),
    ],
)
def test_what_can_go_and_why_the_rest_stays(name, channels, groups, why):
    model = brought_model(name)
    space, reasons = UnitSpace.of(model), why_whole(model)
    assert [layer.ffn for layer in space.layers] == channels
    assert [layer.kv_groups for layer in space.layers] == groups
    assert len(reasons) == len(why) and all(any(w in r for r in reasons) for w in why), reasons
    assert space.total_params == sum(p.numel() for p in model.parameters())
    assert of_model(model).whole == reasons


@pytest.mark.parametrize("name", ["gpt-2", "bitnet", "mamba"])
def test_a_model_without_such_parts_is_refused_with_every_reason(name):
    model = brought_model(name)
    with pytest.raises(GraspError, match=rf"^{type(model).__name__} is not supported: ") as error:
        UnitSpace.of(model)
    assert "\n" not in str(error.value)


def test_values_beside_the_linear_layers_of_an_ffn_keep_it_whole():
    model = tiny_model("llama")
    model.model.layers[1].mlp.sub_norm = nn.LayerNorm(96)  # BitNet has one like it
    assert [layer.ffn for layer in UnitSpace.of(model).layers] == [96, 0, 96]
    (why,) = why_whole(model)
    assert why.startswith("LlamaMLP: sub_norm.weight has 96 values") and "1 of 3 layers" in why


def test_one_value_per_head_keeps_attention_whole():
    model = tiny_model("llama", heads=16, head_dim=16)
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(16))  # as many as a head has
    assert [layer.kv_groups for layer in UnitSpace.of(model).layers] == [0, 4, 4]


@pytest.mark.parametrize(("gate", "down"), [(0.5, 1.0), (1.0, 2.0)])
def test_an_ffn_that_multiplies_by_constants_is_gated_as_it_is(gate, down):
    model = brought_model("falcon-h1", mlp_multipliers=[gate, down])
    assert check_gates(model, "channel", "output", IDS) == 0
    assert check_fold(model, random_mask(UnitSpace.of(model)), IDS) < 1e-5


def test_attention_that_does_not_take_gates_is_refused_before_the_long_work(monkeypatch):
    """It computes with heads in its own code, so closing a gate changes nothing."""
    model = tiny_model("llama")
    plain = transformers.integrations.sdpa_attention.sdpa_attention_forward
    family = transformers.models.llama.modeling_llama
    interface = type("Own", (), {"get_interface": lambda *_: plain})()
    monkeypatch.setattr(family, "ALL_ATTENTION_FUNCTIONS", interface)
    space = UnitSpace.of(model)
    assert check_gates(model, "unit", "output", IDS) == 0
    after = least(space, Budget.of(keep=0.5), first_only=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraspError, match=r"layers\.0\.self_attn .* reads more than its units"):
        check_fold(model, Mask.first(space, after), IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("units", ["ffn", "kv"])
def test_units_of_the_other_kind_stay(units):
    space = UnitSpace.of(tiny_model("llama"))
    budget = Budget.of(keep=0.5, ffn_multiple=4, units=units)
    mask = random_mask(space, units=units)
    kept = [(len(ffn) == 96, len(kv) == 4) for ffn, kv in mask.layers()]
    assert all(whole == ((units == "kv"), (units == "ffn")) for whole in kept)
    after = mask.pruned_space()
    cost, keys = obtained(space, budget)
    assert cost.least <= after.cost <= cost.most
    assert keys.least <= sum(x.kv_groups * x.head_dim for x in after.layers) <= keys.most
    assert budget.cost(after) <= budget.limit(space) == budget.cost(space) // 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("olmo2", {"units": "kv"}, "only FFN channels can go here: use `units='auto'`"),
        ("olmo2", {"units": "both"}, "`units='both'` is not possible: only FFN channels can go"),
        ("olmo2", {"kv_cache": 0.5}, "`kv_cache` is not possible: only FFN .*: use `keep`"),
        ("gpt-oss", {"units": "kv"}, "only experts can go here"),
    ],
)
def test_units_that_a_model_has_not_are_refused(name, options, message):
    space = UnitSpace.of(brought_model(name))
    with pytest.raises(GraspError, match=message):
        Budget.of(**options, ffn_multiple=4).limit(space)


def test_a_budget_in_parameters_counts_what_stays():
    space = UnitSpace.of(tiny_model("llama"))
    budget = Budget.of(params=0.8 * space.total_params, ffn_multiple=1, units="ffn")
    scores = torch.rand(space.size)
    after = Projection(space, budget).mask(scores).pruned_space()
    assert 0 <= 0.8 * space.total_params - after.total_params < 2 * 3 * space.hidden_size


UNLISTED = ("hunyuan", "vaultgemma", "cohere2", "exaone4", "ministral3", "granite", "stablelm")
HYBRID = ("qwen3.5", "lfm2", "falcon-h1", "gemma4, dense", "gemma4, keys as values", "olmo hybrid")


@pytest.mark.parametrize("name", [*UNLISTED, *HYBRID, "olmo2"])
def test_folded_saved_and_reloaded_it_computes_what_the_gates_do(name, tmp_path):
    model = brought_model(name)
    mask = random_mask(UnitSpace.of(model))
    with gated(model, mask.space) as gates:
        gates.set(mask.keep.float())
        want = model(input_ids=IDS, use_cache=False).logits
    folded = fold(model, mask)
    assert type(folded).__name__ == f"Grasp{type(model).__name__}"
    assert UnitSpace.of(folded).layers == mask.pruned_space().layers
    got = folded(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    folded.save_pretrained(tmp_path)
    again = auto_class(folded.config).from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=IDS, use_cache=False).logits, got)
    greedy = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)
    mask_of_ones = torch.ones_like(IDS)
    cached = again.generate(IDS, attention_mask=mask_of_ones, **greedy)
    assert torch.equal(
        cached, again.generate(IDS, attention_mask=mask_of_ones, use_cache=False, **greedy)
    )


SEES = [name for name, (prefix, _) in BROUGHT.items() if name.endswith("sees images")]


@pytest.mark.parametrize("name", SEES)
def test_a_text_tower_is_pruned_and_what_sees_stays(name, tmp_path):
    model = brought_model(name)
    space = UnitSpace.of(model)
    tower = model.get_decoder()
    assert len(decoder_layers(model)) == len(tower.layers) == len(space.layers)
    folded = fold(model, random_mask(space))
    folded.save_pretrained(tmp_path)
    again = auto_class(folded.config).from_pretrained(tmp_path)
    assert UnitSpace.of(again).layers == random_mask(space).pruned_space().layers
    of_tower = {id(p) for p in tower.parameters()}
    before = {n: p for n, p in model.named_parameters() if id(p) not in of_tower}
    after = dict(again.named_parameters())
    assert before and all(torch.equal(after[n], p) for n, p in before.items())
