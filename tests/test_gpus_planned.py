"""The plan over several GPUs: what fits, how, and with which command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grasp.config import PruneConfig
from grasp.errors import GraspError
from grasp.model.header import read_header
from grasp.planning.plan import plan
from grasp.planning.ranks import Gpus, spread

CONFIGS = Path(__file__).parents[1] / "docs" / "configs"
LARGE = {"llama-3.1-70b": 70.55e9, "qwen3-32b": 32.76e9, "mistral-large": 122.6e9}
GB = 10**9


def over(model, each, nodes=1, memory=80, **options):
    spec = str(CONFIGS / f"{model}.json")
    config = PruneConfig.of(spec, **options)
    return spread(read_header(spec), config, 2, Gpus(each, nodes, memory * GB))


@pytest.mark.parametrize("model", LARGE)
def test_large_models_are_as_large_as_their_makers_say(model):
    params = read_header(str(CONFIGS / f"{model}.json")).space.total_params
    assert params == pytest.approx(LARGE[model], rel=1e-3)


def test_block_reconstruction_counts_where_a_model_must_fit():
    (way,) = over("llama-2-7b", 1, compensate="blocks").ways
    assert way.compensation > 1.2 * way.learning.weights and way.peak >= way.compensation


def test_parts_of_the_weights_add_up():
    none, full = over("llama-3.1-70b", 8).ways
    space = read_header(str(CONFIGS / "llama-3.1-70b.json")).space
    assert none.learning.weights == 2 * space.total_params and none.gathered == 0
    layers, ends = 2 * space.prunable_params, 2 * 2 * 128256 * 8192
    split = layers + ends
    assert full.learning.weights == none.learning.weights - split + split // 8
    assert full.gathered == 2 * layers // 80  # two of 80 equal layers
    gradients = 4 * 7 * full.learning.gates // (40 + 4 * 8)
    assert full.received == pytest.approx((2 * layers + ends) * 7 / 8 + gradients, rel=1e-6)
    assert none.received == pytest.approx(gradients, rel=1e-6) and full.network == 0
    assert (none.fits, full.fits) == (False, True)


def test_two_machines_send_over_the_network_what_they_must():
    none, node, full = over("llama-3.1-70b", 8, nodes=2).ways
    assert node.learning.weights > full.learning.weights
    assert none.network == node.network == none.received < full.network == full.received


def test_the_first_way_that_fits_is_recommended():
    assert over("llama-3.1-8b", 1).command.startswith("grasp prune ")
    few = over("llama-3.1-8b", 8).command
    assert few.startswith("torchrun --nproc-per-node 8 -m grasp prune ")
    assert few.endswith(" --out OUT --accumulate 8")
    assert over("llama-3.1-70b", 8).command.endswith(" --shard full --accumulate 8")
    pairs = over("llama-3.1-70b", 8, nodes=2, batch_size=4).command
    assert "--nnodes 2" in pairs and pairs.endswith(" --shard node --accumulate 4")
    one = over("llama-3.1-70b", 1)
    assert one.command is None and one.needed == 4
    assert over("llama-3.1-70b", 1, memory=8).needed is None  # what is not split is too much


def test_what_needs_whole_weights_gets_no_shards():
    found = over("llama-3.1-70b", 8, method="flap")
    assert [way.shard for way in found.ways] == ["none"] and found.command is None
    assert "got flap" in found.refused and found.needed is None


def test_plan_shows_it(call, refused, tiny):
    asked = ["--gpus=2", "--gpu-memory=1", "--seq-len=32"]
    code, said, _ = call("plan", tiny, *asked)
    assert code == 0 and "GPUs        2 of 1 GB" in said and "\ncommand     torchrun" in said
    values = json.loads(call("plan", tiny, *asked, "--json")[1])
    assert [way["shard"] for way in values["gpus"]["ways"]] == ["none", "full"]
    assert plan(str(tiny), seq_len=32).gpus is None
    assert refused("plan", tiny, "--gpus=2", "--seq-len=32").startswith("--gpus and --gpu-memory")
    assert "and --nodes needs them: give both" in refused("plan", tiny, "--nodes=2", "--seq-len=32")
    assert "--gpu-memory must be a finite number of GB above 0, got inf" in refused(
        "plan", tiny, "--gpus=2", "--gpu-memory=inf", "--seq-len=32"
    )
    with pytest.raises(GraspError, match="`gpus` must be at least 1, got 0"):
        plan(str(tiny), seq_len=32, gpus=0, gpu_memory=80)
