"""Special families, end to end: planned, pruned, saved, and loaded with and without grasp."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grasp
from grasp.model.units import UnitSpace

FAMILIES = ("phi3", "gemma", "gemma2", "gemma3_text")  # other tests of whole runs take a llama
SMALL = dict(samples=4, seq_len=32, epochs=1, eval_windows=2, ffn_multiple=8, device="cpu")

READ_WITHOUT_GRASP = """
import sys
sys.modules["grasp"] = None  # importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    probe = load_file(f"{folder}/verify/probe.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(probe["input_ids"], use_cache=False).logits, probe["logits"]), folder
    assert type(model).__module__.startswith("transformers_modules."), folder
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(folder / family, family, tied=True) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(models, text, tmp_path_factory):
    """Half of each model, learned."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        family: grasp.prune(model, folder / family, calibration=text, keep=0.5, **SMALL)
        for family, model in models.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_pruned_is_what_was_planned_and_what_loads(family, models, runs):
    folder = runs[family].folder
    plan = grasp.plan(str(models[family]), keep=0.5, seq_len=32, ffn_multiple=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    summary = json.loads((folder / "grasp.json").read_text())
    assert count == summary["params"]["total_after"] == UnitSpace.of(model).total_params
    assert plan.params.before == summary["params"]["total_before"]
    assert plan.params.after.least <= count <= plan.params.after.most
    assert type(model).__name__.startswith("Grasp")

    probe = load_file(folder / "verify" / "probe.safetensors")
    assert torch.equal(model(probe["input_ids"], use_cache=False).logits, probe["logits"])
    prompt = probe["input_ids"][:, :6]
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    cached = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, use_cache=False, **options), cached)


def test_all_load_without_grasp(runs):
    folders = [str(result.folder) for result in runs.values()]
    subprocess.run([sys.executable, "-c", READ_WITHOUT_GRASP, *folders], check=True)
