"""Pruned models in a real vLLM on a CPU: they give the tokens that they give in transformers."""

from __future__ import annotations

import json
import os
import re
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

import grasp
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.compress.fold import fold
from grasp.errors import GraspError
from grasp.evaluate.serving import Server
from grasp.model.load import load_model
from grasp.model.units import UnitSpace
from grasp.planning.layouts import least

DEMO = "demo:smollm2-135m"
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


def greedy(model, prompts, tokens=TOKENS):
    options = dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


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


# --- SmolLM2 and the server ---

smollm2 = pytest.mark.xdist_group("smollm2")  # one process makes it, and serves it


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """SmolLM2-135M at 50 %, pruned in a hurry."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The river moves under the stone house. " * 400)
    out = tmp_path_factory.mktemp("half") / "half"
    quick = dict(samples=4, seq_len=64, epochs=1, scale_epochs=0, eval_windows=1, device="cpu")
    grasp.prune(DEMO, out=out, keep=0.5, calibration=str(text), kv_multiple=1, **quick)
    return out


QUESTIONS = ("The capital of France is", "Once upon a time", "To make bread, you")


@pytest.fixture(scope="module")
def server(half):
    options = ("--dtype=float32", "--max-model-len=256", "--enforce-eager")
    server = Server(str(half), "cpu", *options, f"--kv-cache-memory-bytes={1 << 28}")
    yield server
    server.stop()


def asked(server, path, **body):
    with server.ask(path, temperature=0, **body) as answer:
        return json.load(answer)


@smollm2
def test_smollm2_served(server, half):
    """Forty tokens of three prompts at once, over HTTP."""
    model, tokenizer = load_model(half, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in QUESTIONS]
    found = asked(
        server,
        "/v1/completions",
        prompt=prompts,
        max_tokens=40,
        ignore_eos=True,
        return_token_ids=True,
    )
    said = [choice["token_ids"] for choice in found["choices"]]
    assert said == greedy(model, prompts, 40)


@smollm2
def test_chat_uses_the_template_of_the_checkpoint(server, half):
    model, tokenizer = load_model(half, dtype=torch.float32)
    messages = [{"role": "user", "content": "Where does a river end?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    found = asked(
        server,
        "/v1/chat/completions",
        messages=messages,
        max_tokens=20,
        ignore_eos=True,
        return_token_ids=True,
    )
    assert found["prompt_token_ids"] == ids
    assert [found["choices"][0]["token_ids"]] == greedy(model, [ids], 20)


def test_a_server_that_cannot_start_says_why(tmp_path):
    job(pruned(tiny_model("llama")), tmp_path / "model")
    with pytest.raises(GraspError, match=r"^vLLM cannot serve .* memory for the cache"):
        Server(str(tmp_path / "model"), "cpu", "--enforce-eager", "--kv-cache-memory-bytes=4096")


def test_two_processes_with_tensor_parallelism(tmp_path):
    model = pruned(tiny_model("llama", head_dim=32, ffn=96), kv_multiple=2)
    widths = [(layer.ffn, layer.kv_groups) for layer in UnitSpace.of(model).layers]
    assert widths == [(8, 2), (96, 4), (96, 4)]
    job(model, tmp_path / "model")
    server = Server(
        str(tmp_path / "model"),
        "cpu",
        "--dtype=float32",
        "--enforce-eager",
        "--tensor-parallel-size=2",
        "--max-model-len=128",
        f"--kv-cache-memory-bytes={1 << 26}",
    )
    try:
        found = asked(
            server,
            "/v1/completions",
            prompt=PROMPTS,
            max_tokens=TOKENS,
            ignore_eos=True,
            return_token_ids=True,
        )
    finally:
        server.stop()
    answers = [choice["token_ids"] for choice in found["choices"]]
    assert likeliest(model, PROMPTS, answers)


@smollm2
def test_bench(half):
    options = dict(batch_sizes=(1, 4), prompt_lens=(16,), tokens=4, repetitions=2, device="cpu")
    result = grasp.bench(str(half), against=DEMO, runtime="vllm", **options)
    ours, theirs = result.models
    assert ours.cache_tokens > 1.5 * theirs.cache_tokens >= 4 * 21
    for found in (ours, theirs):
        assert found.kv_bytes_per_token == pytest.approx(found.kv_bytes_per_token_planned, rel=0.1)
    assert all(case.decode.speedup is not None for case in result.cases)
    assert re.search(r"vllm\S* \d", result.measured_on())
    assert any(row[0].startswith("KV cache, with weights") for row in result.rows())
