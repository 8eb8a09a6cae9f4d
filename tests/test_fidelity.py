"""grasp's form of a model gives the same outputs as the model, or the run is refused by name."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from transformers.models.llama import modeling_llama

import grasp
from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.compress.fold import fold_mask
from grasp.errors import GraspError
from grasp.gates.fidelity import (
    CUT,
    GATED,
    check_cut,
    check_gates,
    check_layers,
    gated_passes,
    tolerance,
)
from grasp.gates.gating import gated
from grasp.journal import read_log
from grasp.model.load import widened
from grasp.model.units import UnitSpace

IDS = torch.randint(3, 250, (1, 80), generator=torch.Generator().manual_seed(5))
SMALL = dict(samples=4, seq_len=32, epochs=1, scale_epochs=1, eval_windows=2, device="cpu")
families = pytest.mark.parametrize("family", FAMILIES)


def half(model):
    """A mask that drops half of `model`, at random."""
    space = UnitSpace.of(model)
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(1))
    return Projection(space, Budget("keep", 0.5, 8)).mask(scores)


@families
@pytest.mark.parametrize("kind", ["unit", "channel"])
@pytest.mark.parametrize("site", ["output", "kv"])
def test_gates_of_one_change_no_bit(family, kind, site):
    assert check_gates(tiny_model(family), kind, site, IDS) == 0


@families
def test_layers_one_by_one_change_no_bit(family):
    assert check_layers(tiny_model(family), IDS, "a test") == 0


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_from_another_function(family, dtype):
    """All checks pass in each dtype with twice the tolerance to spare, and 1.1 is too much."""
    model = tiny_model(family, dtype=dtype)
    assert check_gates(model, "channel", "output", IDS) <= tolerance(model, GATED) / 2
    cut, mask = copy.deepcopy(model), half(model)
    wanted = gated_passes(cut, mask, IDS)
    fold_mask(cut, mask)
    assert check_cut(cut, wanted, IDS) <= tolerance(model, CUT) / 2
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 1.1 * own(x)
    refusal = pytest.raises(GraspError, match=r"model\.layers\.0\.mlp \(\w+MLP\) computes more")
    with nullcontext() if "gemma" in family else refusal:  # with GeGLU it runs as it is, gated
        check_gates(model, "channel", "output", IDS)


def test_a_rounding_that_a_layer_blows_up_is_not_refused():
    """As where it decides whether a massive activation arises, which all later layers read."""
    model = tiny_model("llama", dtype=torch.bfloat16)

    def blow_up(_, args):
        return (args[0] + 4 * torch.frac(37 * args[0]), *args[1:])

    model.model.layers[1].register_forward_pre_hook(blow_up)
    cut, mask = copy.deepcopy(model), half(model)
    with gated(cut, mask.space) as gates:
        gates.set(mask.keep.float())
        want = cut(IDS[:, :64]).logits
    wanted = gated_passes(cut, mask, IDS)
    fold_mask(cut, mask)
    layers = model.config.num_hidden_layers
    lost = (cut(IDS[:, :64]).logits - want).norm() / want.norm()
    assert lost > tolerance(model, 2 * layers)
    assert check_cut(cut, wanted, IDS) < tolerance(model, CUT) / 2
    assert check_gates(model, "channel", "output", IDS) < tolerance(model, GATED) / 2


def test_an_ffn_that_computes_more_is_refused_by_name(tiny, text, tmp_path, monkeypatch):
    class More(modeling_llama.LlamaMLP):
        def forward(self, x):
            return 1.5 * super().forward(x)

    monkeypatch.setattr(modeling_llama, "LlamaMLP", More)
    with pytest.raises(GraspError, match=r"model\.layers\.0\.mlp \(More\) computes more") as error:
        grasp.prune(tiny, tmp_path / "out", calibration=text, **SMALL)
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())
    compared = dict(keep=[0.5], methods=["magnitude"], seeds=[0], **SMALL)
    with pytest.raises(GraspError, match=r"model\.layers\.0\.mlp \(More\) computes more"):
        grasp.compare(tiny, tmp_path / "out", calibration=text, **compared)
    assert not any(tmp_path.iterdir())


def test_an_attention_that_computes_more_is_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(*args, **kwargs):
        out, weights = own(*args, **kwargs)
        return (2 * out if model.config._attn_implementation == "sdpa" else out), weights

    attention.forward = forward
    with pytest.raises(GraspError, match=r"layers\.1\.self_attn \(LlamaAttention\) computes more"):
        check_gates(model, "unit", "output", IDS)


def test_what_reads_more_than_its_units_is_refused_when_cut(tiny, text, tmp_path, monkeypatch):
    own = modeling_llama.LlamaMLP.forward

    def by_width(self, x):  # 1 while the model is whole, gated or not
        return own(self, x) * (self.down_proj.in_features / 96)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", by_width)
    options = dict(calibration=text, ffn_multiple=8, method="magnitude", compensate="none", **SMALL)
    with pytest.raises(GraspError, match=r"model\.layers\.\d\.mlp \(LlamaMLP\) reads more"):
        grasp.prune(tiny, tmp_path / "out", keep=0.5, **options)


def test_layers_that_need_more_than_their_input_are_refused(tiny, text, tmp_path, monkeypatch):
    """Here what the decoder does between them, which a pass layer by layer leaves out."""
    own, inside = modeling_llama.LlamaModel.forward, []

    def decoder(self, *args, **kwargs):
        inside.append(self.layers[1])
        try:
            return own(self, *args, **kwargs)
        finally:
            inside.clear()

    class Layer(modeling_llama.LlamaDecoderLayer):
        def forward(self, x, **kwargs):
            return super().forward(2 * x if self in inside else x, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", decoder)
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Layer)
    out, found = tmp_path / "out", r"model\.layers\.1 \(Layer\) needs more than what enters it"
    with pytest.raises(GraspError, match=f"{found}: .* `compensate='blocks'`"):
        grasp.prune(tiny, out, calibration=text, **SMALL)
    scored = dict(method="wanda++", compensate="none", scale_epochs=0)
    with pytest.raises(GraspError, match=rf"{found}: .* `method='wanda\+\+'`"):
        grasp.prune(tiny, out, calibration=text, **SMALL | scored)
    short = dict(samples=4, seq_len=32, eval_windows=2, device="cpu")
    with pytest.raises(GraspError, match=f"{found}: .* grasp sparsify"):
        grasp.sparsify(tiny, out, pattern="2:4", calibration=text, **short)
    assert not any(tmp_path.iterdir())


def test_code_that_cannot_be_gated_is_one_line():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x, more: own(x)
    mlp.register_forward_pre_hook(lambda _, args: (*args, "more"))
    with pytest.raises(
        GraspError, match=r"not supported: it does not run gated .*argument"
    ) as error:
        check_gates(model, "unit", "output", IDS)
    assert "\n" not in str(error.value)


def test_non_finite_outputs_are_said():
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.fill_(torch.finfo().max)
    with pytest.raises(
        GraspError,
        match=r"model\.layers\.0\.mlp values are not finite in float32: the weights are damaged",
    ):
        check_gates(model, "unit", "output", IDS)


def test_what_was_checked_is_logged_and_tried_in_the_dtype_of_the_work(text, tmp_path):
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    options = dict(SMALL, calibration=text, ffn_multiple=8, compensate="refit")
    out = grasp.prune(model, tmp_path / "out", **options).folder
    before, cut = (r for r in read_log(out / "log.jsonl") if r.get("event") == "fidelity")
    assert before["gates"] == before["layers"] == 0  # fp32: bf16 would round
    assert cut["cut"] < 1e-5


def test_widened_gives_every_parameter_its_own_dtype_back():
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float() + 1e-5
    before = {name: p.clone() for name, p in model.named_parameters()}
    with widened(model, torch.float32):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, p in model.named_parameters():
        assert p.dtype == before[name].dtype and torch.equal(p, before[name])
