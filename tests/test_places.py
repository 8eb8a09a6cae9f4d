"""Decoder layers over several devices in one process: the checkpoint of one device, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from devices import PretendedDevices
from families import save_brought, save_tiny

import grasp
from grasp.config import PruneConfig
from grasp.errors import GraspError
from grasp.gates import memory
from grasp.model import load
from grasp.model.header import of_model, read_header
from grasp.model.load import load_model
from grasp.model.places import places_of
from grasp.planning.memory import learning_memory
from grasp.planning.ranks import over_layers
from grasp.run import prune as run

SMALL = dict(samples=4, seq_len=32, epochs=1, eval_windows=2, device="cpu", dtype="fp32")
CONFIGS = Path(__file__).parents[1] / "docs" / "configs"
GB = 10**9


def over(layers):
    """One device for all but the layers, which lie on it and on others in turn."""
    return ("cpu:1", *islice(cycle(["cpu:2", "cpu:1", "cpu:3"]), layers))


@pytest.fixture
def spread(monkeypatch):
    """spread(grasp.prune, MODEL, OUT, ...) is done over pretended devices."""

    def spread(verb, model, out, **options):
        places = over(len(read_header(str(model)).space.layers))
        monkeypatch.setattr(run, "where", lambda *_: places)
        monkeypatch.setattr(run, "pick_device", lambda _: places[0])
        monkeypatch.setattr(load, "DEVICE", re.compile(r"cpu(:\d)?"))
        with PretendedDevices() as devices:
            made = verb(model, out, **options)
        assert {*map(str, devices.used)} == {*places}
        return made

    return spread


def test_pretended_devices_do_not_mix():
    with PretendedDevices() as devices:
        x, y = torch.ones(2).to("cpu:1"), torch.ones(2, device="cpu:2")
        assert str(x.device) == "cpu:1" and str((2 * y).device) == "cpu:2"
        assert x.to("cpu:1") is x and str((x + y.to(x)).device) == "cpu:1"
        assert (x.cpu() + y.to("cpu")).device == torch.device("cpu")
        linear = torch.nn.Linear(2, 2).to("cpu:1")
        assert str(linear(x).device) == "cpu:1"
        for mixed in (lambda: x + y, lambda: linear(y), lambda: torch.cat([x, y])):
            with pytest.raises(AssertionError, match=r"cpu:1', 'cpu:2"):
                mixed()
    assert {*map(str, devices.used)} == {"cpu:1", "cpu:2"}


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_checkpoint_of_one_device(family, text, tmp_path, spread):
    model = save_tiny(tmp_path / "model", family)
    options = dict(SMALL, calibration=text, lm_weight=0.5)
    one = grasp.prune(model, tmp_path / "one", **options).summary
    two = spread(grasp.prune, model, tmp_path / "two", **options).summary
    assert two["sha256"] == one["sha256"] and two["mask_sha256"] == one["mask_sha256"]
    assert two["results"]["pruned"] == one["results"]["pruned"]


@pytest.mark.parametrize(
    ("method", "compensate"),
    [
        *(("flap", "bias"), ("taylor", "none"), ("magnitude", "refit"), ("wanda-sp", "none")),
        *(("wanda++", "none"), ("output-approximation", "none"), ("free", "none")),
        *(("greedy-output-approximation", "none"), ("greedy-head-similarity", "none")),
    ],
)
def test_what_runs_layer_by_layer(method, compensate, tiny, text, tmp_path, spread):
    options = dict(SMALL, calibration=text, method=method, compensate=compensate, scales="unit")
    one = grasp.prune(tiny, tmp_path / "one", **options).summary
    assert spread(grasp.prune, tiny, tmp_path / "two", **options).summary["sha256"] == one["sha256"]


@pytest.mark.parametrize("method", ["learned", "reap", "taylor"])
def test_experts(method, text, tmp_path, spread):
    model = save_brought(tmp_path / "model", "qwen3-moe")
    options = dict(SMALL, calibration=text, method=method)
    one = grasp.prune(model, tmp_path / "one", **options).summary
    assert (
        spread(grasp.prune, model, tmp_path / "two", **options).summary["sha256"] == one["sha256"]
    )


def test_what_else_a_run_may_have(text, tmp_path, spread):
    """A shared embedding, rounded weights, text of the model's own, recomputing, two budgets."""
    model = save_tiny(tmp_path / "model", tied=True)
    options = dict(SMALL, calibration="self", memory="low", keep=[0.8, 0.6])
    options["dtype"] = "bf16"
    one = grasp.prune(model, tmp_path / "one", **options)
    two = spread(grasp.prune, model, tmp_path / "two", **options)
    assert [made.summary["sha256"] for made in one] == [made.summary["sha256"] for made in two]
    assert places_of(load_model(model, dtype=None)[0]) == "cpu"


def test_cells_of_a_comparison(tiny, text, tmp_path, spread):
    options = dict(SMALL, calibration=text, keep=0.5, seeds=[0])
    options["methods"] = ["fisher+refit", "greedy-output-approximation"]
    one = grasp.compare(tiny, tmp_path / "one", **options).summary
    two = spread(grasp.compare, tiny, tmp_path / "two", **options).summary
    for found, known in zip(two["cells"], one["cells"], strict=True):
        assert found["mask_sha256"] == known["mask_sha256"]
        assert found["perplexity"] == known["perplexity"]


def spread_over(model, sizes, **options):
    spec = str(CONFIGS / f"{model}.json")
    free = {f"cuda:{gpu}": size * GB for gpu, size in enumerate(sizes)}
    config = PruneConfig.of(spec, **options)
    return over_layers(read_header(spec), config, 2, [*free], free.__getitem__)


def test_a_model_goes_over_gpus_only_if_one_cannot_hold_it():
    assert spread_over("llama-3.1-8b", [80, 80]) is None
    assert spread_over("llama-3.1-8b", [8]) is None  # there is no other
    places, note = spread_over("llama-3.1-70b", [80] * 4)
    assert len(places) == 81 and [*places] == sorted(places)
    layers = [places[1:].count(f"cuda:{gpu}") for gpu in range(4)]
    assert sum(layers) == 80 and layers[0] < min(layers[1:]) <= max(layers[1:]) - 1
    assert "its layers lie on 4 GPUs" in note
    assert note.endswith(" --out OUT --shard full --accumulate 4")
    _, note = spread_over("llama-3.1-70b", [80] * 4, method="flap")
    assert "torchrun" not in note  # which reads whole weights


def test_fuller_gpus_get_fewer_layers():
    places, _ = spread_over("llama-3.1-70b", [80, 40, 80])
    assert places[1:].count("cuda:1") < places[1:].count("cuda:0") < places[1:].count("cuda:2")
    with pytest.raises(GraspError, match=r"weights of .* are 141\.1 GB, and 2 GPUs have 120\.0 GB"):
        spread_over("llama-3.1-70b", [80, 40])


def test_only_cuda_without_torchrun_means_all_gpus(tmp_path, monkeypatch):
    said = []
    log = SimpleNamespace(log=lambda **record: said.append(record["text"]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(run, "free_memory", lambda gpu: 80 * GB)
    large = str(CONFIGS / "llama-3.1-70b.json")
    config = PruneConfig.of(large, device="cuda", dtype="bf16")
    assert run.where(config, log)[0] == "cuda:1" and len({*run.where(config, log)}) == 4
    assert said and "too large for cuda:1" in said[0]
    for other in (dict(device="cuda:1"), dict(device="cpu")):
        assert run.where(replace(config, **other), log) == other["device"]
    small = PruneConfig.of(str(CONFIGS / "llama-3.1-8b.json"), device="cuda", dtype="bf16")
    assert run.where(small, log) == "cuda"
    monkeypatch.setattr(run, "ranks", lambda: 4)
    assert run.where(config, log) == "cuda"


def test_each_gpu_needs_memory_for_its_own_layers(tiny, monkeypatch):
    config = PruneConfig.of(str(tiny), seq_len=128, batch_size=8, device="cpu")
    with PretendedDevices():
        model = load_model(tiny, dtype=None, device=("cpu:1", "cpu:2", "cpu:2", "cpu:3"))[0]
        need = learning_memory(of_model(model), 1024, 128, 4, "fast", config.scales)
        beside = need.workspace + need.gates
        free = {"cpu:1": beside, "cpu:2": beside + 2 * need.activations / 3}
        free["cpu:3"] = beside + need.activations / 3
        monkeypatch.setattr(memory, "free_memory", lambda gpu: free[gpu] / 0.9 + 9)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        free["cuda"] = free.pop("cpu:1")
        assert memory.choose(model, config) == "fast"
        for gpu in free:
            free[gpu] -= 99
            assert memory.choose(model, config) != "fast"
            free[gpu] += 99
