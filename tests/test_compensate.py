"""FLAP's biases: their values, their effect, and the models that accept or refuse them."""

from __future__ import annotations

import copy

import pytest
import torch
from families import save_tiny, tiny_model

import grasp
from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.compress.biases import add_biases, mean_biases
from grasp.compress.fold import fold_mask
from grasp.config import PruneConfig
from grasp.errors import GraspError
from grasp.journal import Journal
from grasp.model.units import UnitSpace, decoder_layers

BLOCKS = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(3))
SMALL = dict(samples=4, seq_len=32, eval_windows=2, device="cpu", method="flap")
SMALL |= dict(keep=0.8, ffn_multiple=8)


@pytest.mark.parametrize("biased", [False, True])
def test_the_first_module_keeps_its_mean_output(biased):
    """Its input is the dense model's: with the bias, its mean output is the dense one."""
    model = tiny_model("llama", attention_bias=biased, mlp_bias=biased)
    space = UnitSpace.of(model)
    mask = Projection(space, Budget("keep", 0.5, 1)).mask(torch.rand(space.size))
    pruned = copy.deepcopy(model)
    fold_mask(pruned, mask)
    add_biases(pruned, mean_biases(model, mask, BLOCKS, Journal()))

    def mean_output(model):
        seen = []
        o_proj = decoder_layers(model)[0].attention.out
        with o_proj.register_forward_hook(lambda *x: seen.append(x[2])), torch.no_grad():
            model(input_ids=BLOCKS)
        return seen[0].mean((0, 1))

    torch.testing.assert_close(mean_output(pruned), mean_output(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_a_checkpoint_with_biases(tiny, text, tmp_path, layout, dtype):
    # all KV groups in the uniform layout: LlamaConfig wants heads that divide the hidden size
    groups = {"per-layer": 1, "uniform": 4}[layout]
    options = dict(SMALL, layout=layout, kv_multiple=groups, dtype=dtype, calibration=text)
    plain, ours = (
        grasp.prune(tiny, tmp_path / how, compensate=how, **options) for how in ("none", "bias")
    )
    assert plain.summary["mask_sha256"] == ours.summary["mask_sha256"]
    values = [r.summary["results"]["pruned"]["value"] for r in (plain, ours)]
    assert values[0] != values[1]
    model, _ = grasp.load(ours.folder, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == ours.summary["params"]["total_after"]
    assert ours.summary["params"]["total_after"] > plain.summary["params"]["total_after"]
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0
    assert not model.model.layers[0].mlp.up_proj.bias.any()
    if dtype == "fp32":
        assert grasp.verify(ours.folder).passed
    assert "added biases restore the mean output" in (ours.folder / "README.md").read_text(
        encoding="utf-8"
    )


def test_who_cannot_carry_them(refused, tmp_path_factory, text):
    model = save_tiny(tmp_path_factory.mktemp("qwen2") / "model", "qwen2")
    options = [f"--calibration={text}", "--samples=4", "--seq-len=32", "--device=cpu"]
    message = refused("prune", model, "--out=out", "--compensate=bias", "--method=flap", *options)
    assert message.startswith(
        "--compensate bias needs a class with biases in o_proj and down_proj, and qwen2 has none"
    )
    message = refused("compare", model, "--out=out", "--methods=flap,flap+bias", *options)
    assert message.startswith("--compensate bias needs a class")


def test_a_layout_without_a_class_for_them_is_refused_at_once(refused, tiny, text):
    options = [f"--calibration={text}", "--layout=uniform", "--compensate=bias", "--seq-len=32"]
    message = refused("prune", tiny, "--out=out", *options, "--samples=4", "--device=cpu")
    assert "no other stock class has its biases: use --layout per-layer" in message


def test_what_auto_stands_for():
    """An explicit choice is never overridden; recipes name what was done."""
    updating, budget = "greedy-output-approximation", Budget.of()
    assert PruneConfig("m", budget).to_json()["compensate"] == "blocks"
    assert PruneConfig("m", budget, compensate="bias").to_json()["compensate"] == "bias"
    for choice in ({}, {"compensate": "none"}):
        recipe = PruneConfig("m", budget, method=updating, **choice).to_json()
        assert recipe["compensate"] == "none"
    with pytest.raises(GraspError, match=f"`compensate` must be none with {updating}, .* 'refit'"):
        PruneConfig("m", budget, method=updating, compensate="refit")
    paper = PruneConfig.of("m", as_published=True, compensate="none", init_scores="equal")
    assert paper == PruneConfig.of("m").as_published()
    assert PruneConfig.of("m", as_published=True, samples=1).samples == 1
    learning = (paper.init_scores, paper.anneal, paper.gate_site, paper.lm_weight)
    assert learning == ("equal", 0.0, "kv", 1.0)
    assert (paper.scales, paper.schedule, paper.scale_decay) == ("unit", "constant", 0.0)
