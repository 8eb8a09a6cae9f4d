"""Weights in shards: the same mask as whole weights, and a checkpoint that verifies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import pytest
import torch
from families import save_brought, save_tiny
from ranks import command, ranks

import grasp
from grasp.errors import GraspError
from grasp.model.load import load_model

SMALL = dict(samples=8, seq_len=32, epochs=1, eval_windows=3, device="cpu", accumulate=4)
FAMILIES = ("llama", "qwen3", "phi3", "gemma2")


def made(out):
    return json.loads((out / "grasp.json").read_text())


def in_shards(count, model, out, *, local=None, shard="full", **options):
    said = out.with_name(f"{out.name} said")
    codes = ranks(count, command("prune", model, out, **options, shard=shard), said, local=local)
    assert codes == [0] * count, said.read_text()
    assert grasp.verify(out).passed
    return made(out)


def agree(found, whole, rounding=0.0):
    assert found["mask_sha256"] == whole["mask_sha256"]
    assert found["results"]["dense"] == whole["results"]["dense"]
    pruned = (each["results"]["pruned"]["nll"] for each in (found, whole))
    assert next(pruned) == pytest.approx(next(pruned), rel=rounding, abs=0)
    assert found["results"]["weight_bytes"] == whole["results"]["weight_bytes"]
    for same in ("recipe", "budget", "params"):
        assert found[same] == whole[same]


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_give_the_mask_of_whole_weights(family, text, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    options = dict(SMALL, calibration=text)
    whole = grasp.prune(model, tmp_path / "whole", **options).summary
    agree(in_shards(2, model, tmp_path / "two", **options), whole)


def test_shards_are_refitted_as_whole_weights_are(tiny, text, tmp_path):
    """To rounding: refit adds up Gram matrices rank by rank."""
    options = dict(SMALL, calibration=text, compensate="refit")
    whole = grasp.prune(tiny, tmp_path / "whole", **options).summary
    agree(in_shards(2, tiny, tmp_path / "two", **options), whole, rounding=1e-4)


def test_shards_of_each_machine(text, tmp_path):
    """Two machines of two ranks each, recomputing layers; rows do not go into equal parts."""
    model = save_tiny(tmp_path / "model", intermediate_size=99)
    options = dict(SMALL, calibration=text, ffn_multiple=1, scale_epochs=0)
    whole = grasp.prune(model, tmp_path / "whole", **options).summary
    options |= dict(local=2, shard="node", memory="low")
    agree(in_shards(4, model, tmp_path / "four", **options), whole)


def test_what_else_a_run_may_have(text, tmp_path):
    """A shared embedding, bf16, distillation, layers that are kept, two budgets, uneven parts."""
    model = save_tiny(tmp_path / "model", tied=True)
    load_model(model, dtype=torch.bfloat16)[0].save_pretrained(model)
    options = dict(SMALL, calibration=text, dtype="bf16", lm_weight=0.5, protect_first=1)
    whole = grasp.prune(model, tmp_path / "whole", keep=[0.8, 0.6], **options)
    said = tmp_path / "said"
    asked = command("prune", model, tmp_path / "three", **options, shard="full", keep="0.8,0.6")
    assert ranks(3, asked, said) == [0] * 3, said.read_text()
    for each in whole:
        found = made(tmp_path / "three" / each.folder.name)
        assert found["mask_sha256"] == each.summary["mask_sha256"]
        assert grasp.verify(tmp_path / "three" / each.folder.name).passed


def test_killed_and_resumed_with_other_shards(tiny, text, tmp_path):
    """Three kills at fixed items; with GRASP_KILLS=10, ten at random seconds."""
    options, out = dict(SMALL, calibration=text, epochs=2), tmp_path / "out"
    whole = grasp.prune(tiny, tmp_path / "whole", **options).summary
    draw, moments = random.Random(0), [12, 6, 2]
    if random_kills := int(os.environ.get("GRASP_KILLS", "0")):
        moments = [draw.uniform(1, 40) for _ in range(random_kills)]
    while moments:
        killed = draw.randrange(2), moments[-1]
        codes = ranks(2, command("prune", tiny, out, **options, shard="full"), killed=killed)
        if random_kills and out.exists():  # too late
            agree(made(out), whole)
            shutil.rmtree(out)
            moments[-1] /= 2
            continue
        assert codes[killed[0]] == -signal.SIGKILL and 0 not in codes and not out.exists()
        print(f"killed rank {killed[0]} at {moments.pop()}")
    agree(in_shards(3, tiny, out, **options), whole)
    events = [json.loads(line).get("event") for line in (out / "log.jsonl").open()]
    assert "resumed" in events


def test_evaluation_in_shards(tiny, text, tmp_path):
    asked = ["eval", str(tiny), f"--text={text}", "--seq-len=32", "--windows=5", "--device=cpu"]
    said = tmp_path / "said"
    assert ranks(2, [*asked, "--shard=full", "--json"], said) == [0, 0], said.read_text()
    whole = grasp.evaluate_text(str(tiny), str(text), seq_len=32, windows=5, device="cpu")
    progress, found = said.read_text().split("\n", 1)
    assert progress == "evaluate: 5 of 5"  # once
    assert json.loads(found) == json.loads(json.dumps(whole.to_json()))


def test_cells_of_a_comparison_in_shards(tiny, text, tmp_path):
    options = dict(SMALL, calibration=text, keep=0.5, epochs=1, scale_epochs=1)
    methods = ["random", "learned+refit", "learned+blocks"]
    whole = grasp.compare(tiny, tmp_path / "whole", methods=methods, seeds=[0], **options).summary
    said, out = tmp_path / "said", tmp_path / "two"
    split = dict(options, methods=",".join(methods), seeds=0, shard="full")
    assert ranks(2, command("compare", tiny, out, **split), said) == [0, 0], said.read_text()
    found = json.loads((out / "compare.json").read_text())
    assert found["dense"] == whole["dense"] and found["config"] == whole["config"]
    for own, known in zip(found["cells"], whole["cells"], strict=True):
        for same in ("method", "kept", "parameters", "mask_sha256"):
            assert own[same] == known[same]
        assert own["perplexity"]["nll"] == pytest.approx(known["perplexity"]["nll"], 1e-4)
    assert {*os.listdir(out)} == {"README.md", "compare.json", "compare.png", "log.jsonl"}


def test_sparse_weights_in_shards(text, tmp_path):
    model = save_tiny(tmp_path / "model", tied=True)
    options = dict(calibration=text, samples=4, seq_len=32, rounds=1, eval_windows=3, device="cpu")
    whole = grasp.sparsify(model, tmp_path / "whole", **options).summary
    said, out = tmp_path / "said", tmp_path / "two"
    codes = ranks(2, command("sparsify", model, out, **options, shard="full"), said)
    assert codes == [0, 0], said.read_text()
    assert grasp.verify(out).passed
    found = made(out)
    del found["results"]["seconds"], whole["results"]["seconds"]
    for same in ("sparsity", "recipe", "results", "params"):
        assert found[same] == whole[same]


def test_text_of_the_models_own_in_shards(tiny, tmp_path):
    options = dict(SMALL, calibration="self", scale_epochs=0)
    whole = grasp.prune(tiny, tmp_path / "whole", **options).summary
    found = in_shards(2, tiny, tmp_path / "two", **options)
    assert found["mask_sha256"] == whole["mask_sha256"]
    assert found["calibration"] == whole["calibration"]


def test_what_cannot_be_sharded_is_refused(tiny, text, tmp_path):
    def said(model=tiny, **options):
        output = tmp_path / "said"
        output.unlink(missing_ok=True)
        asked = dict(SMALL, calibration=text, shard="full") | options
        assert 0 not in ranks(2, command("prune", model, tmp_path / "out", **asked), output)
        (line,) = output.read_text().splitlines()
        return line.replace("rank 1", "rank 0").removeprefix("error on rank 0: ")

    assert said(method="flap") == (
        "--shard full is for methods that read no weights (learned, free, fisher, random), got flap"
    )
    assert (
        said(compensate="bias") == "--shard full has no --compensate bias: use --compensate blocks"
    )
    assert said(dtype="bf16").endswith("give the stored one, or --shard none")
    experts = save_brought(tmp_path / "experts", "qwen3-moe")
    assert said(experts) == (
        f"--shard full splits plain decoders, and {experts} is a mixture of experts: "
        "use --shard none"
    )
    with pytest.raises(GraspError, match="start it with torchrun"):
        grasp.evaluate_text(str(tiny), str(text), device="cpu", shard="full")
    with pytest.raises(GraspError, match="`tasks` runs on one rank, which holds no model in"):
        grasp.compare(tiny, tmp_path / "out", **SMALL, calibration=text, shard="full", tasks="piqa")
    with pytest.raises(GraspError, match="start it with torchrun"):
        grasp.prune(tiny, tmp_path / "out", **SMALL, calibration=text, shard="full")
