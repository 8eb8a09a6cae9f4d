"""Pruned models in a real vLLM on a CPU: they give the tokens that they give in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import ran
import torch
from families import (
    BROUGHT,
    FAMILIES,
    MIXTURES,
    brought_model,
    tiny_mixture,
    tiny_model,
    tiny_tokenizer,
)

from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.compress.fold import fold
from grasp.errors import GraspError
from grasp.model.units import UnitSpace
from grasp.planning.layouts import least

WIDE = {"hidden_size": 128, "head_dim": 32}  # vLLM has no kernel for heads of 8 on a CPU
GEMMA4 = {**WIDE, "global_head_dim": 64}
OTHERWISE = {  # sizes that are tied to others
    "llama, seven queries to a key": {"hidden_size": 448, "head_dim": 32},
    "granite, hybrid": {"hidden_size": 128, "mamba_d_head": 32},
    **dict.fromkeys((name for name in BROUGHT if name.startswith("gemma4,")), GEMMA4),
}
# Three of five requests at a time; prompts in steps of 48 tokens; two share their first block of 32
CROWDED = dict(
    max_num_seqs=3,
    max_num_batched_tokens=48,
    enable_chunked_prefill=True,
    block_size=32,
    enable_prefix_caching=True,
)
COMMON = list(range(5, 45))
PROMPTS = [[*COMMON, 60, 61], [7, 8, 9], [*COMMON, 70], list(range(100, 190)), [200] * 20]
TOKENS = 12


@pytest.fixture
def in_vllm(tmp_path):
    """in_vllm(jobs) runs in a process of its own what in_vllm.py does."""

    def in_vllm(jobs, *, grasp=True, rounds=1):
        asked, came = tmp_path / "asked.json", tmp_path / "came.json"
        asked.write_text(
            json.dumps({"jobs": jobs, "tokens": TOKENS, "rounds": rounds, "grasp": grasp})
        )
        own = {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        script = Path(__file__).with_name("in_vllm.py")
        subprocess.run(
            [sys.executable, str(script), str(asked), str(came)],
            env={**os.environ, **own},
            check=True,
        )
        return json.loads(came.read_text())

    return in_vllm


def pruned(model, **budget):
    """The model with layers of different widths."""
    space = UnitSpace.of(model)
    asked = Budget.of(keep=0.5, ffn_multiple=8, layout="per-layer", **budget)
    return fold(model, Mask.first(space, least(space, asked, first_only=True)))


def job(model, folder):
    """A checkpoint for in_vllm.py."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {"folder": str(folder), "prompts": PROMPTS, "options": CROWDED}


def likeliest(model, prompts, answers):
    """Whether each token of vLLM is the one that transformers gives: then all greedy tokens are."""
    model.set_attn_implementation("eager")  # older releases' SDPA leaves out the softcap
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        if logits.argmax(-1).tolist() != answer:
            return False
    return True


@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "remote code"])
@pytest.mark.parametrize("families", [["llama"], [*FAMILIES][1:]], ids=["llama", "others"])
def test_tokens_are_those_of_transformers(families, plugin, in_vllm, tmp_path):
    """The second time, the first blocks of a long prompt come from the prefix cache."""
    models = {
        f"{family}, {'tied' if tied else 'untied'}": pruned(
            tiny_model(family, tied=tied, head_dim=32)
        )
        for family in families
        for tied in (False, True)
    }
    jobs = {name: job(model, tmp_path / name) for name, model in models.items()}
    came = in_vllm(jobs, grasp=plugin, rounds=2)
    for name, model in models.items():
        assert not isinstance(came[name], str), (name, came[name])
        for found in came[name]:
            assert likeliest(model, PROMPTS, found["tokens"]), name
        slides = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
        assert slides or came[name][1]["cached"][3] >= 32, name


def test_models_that_people_bring(in_vllm, tmp_path):
    """Fills the column vLLM of the table."""
    models = {}
    for name, (_, settings) in BROUGHT.items():
        seen = settings.get("text_config")
        sizes = OTHERWISE.get(name, WIDE)
        with suppress(GraspError):
            models[name] = pruned(
                brought_model(name, **sizes if seen is None else {"text_config": seen | sizes})
            )
    jobs = {name: job(model, tmp_path / name.replace(" ", "-")) for name, model in models.items()}
    came = in_vllm(jobs)
    for name in BROUGHT:
        same, found = "no", came.get(name)
        if isinstance(found, list) and likeliest(models[name], PROMPTS, found[0]["tokens"]):
            same = "yes"
        print(name, same, found)
        ran.check(name, "per-layer", vLLM=same)


def test_mixtures_with_fewer_experts(in_vllm, tmp_path):
    """As many in each layer, so in vLLM's own classes."""
    sizes = dict(hidden_size=128, head_dim=32, intermediate_size=64, moe_intermediate_size=64)
    models = {}
    for family in MIXTURES:
        model = tiny_mixture(family, **sizes)
        budget = Budget.of(keep=0.5, ffn_multiple=8, layout="uniform", units="ffn")
        projection = Projection(UnitSpace.of(model), budget)
        scores = torch.randn(projection.space.size, generator=torch.Generator().manual_seed(0))
        models[family] = fold(model, projection.mask(scores))
        assert {layer.experts for layer in UnitSpace.of(models[family]).layers} == {3}
    came = in_vllm({family: job(model, tmp_path / family) for family, model in models.items()})
    for family, model in models.items():
        assert not isinstance(came[family], str), (family, came[family])
        assert likeliest(model, PROMPTS, came[family][0]["tokens"]), family
