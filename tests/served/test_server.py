"""vLLM's server on a CPU: SmolLM2 at 50 % over HTTP, two processes, errors and `grasp bench`."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import tiny_model
from test_served import PROMPTS, TOKENS, job, likeliest, pruned

import grasp
from grasp.errors import GraspError
from grasp.evaluate.serving import Server
from grasp.model.load import load_model
from grasp.model.units import UnitSpace

DEMO = "demo:smollm2-135m"


def greedy(model, prompts, tokens=TOKENS):
    options = dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


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
