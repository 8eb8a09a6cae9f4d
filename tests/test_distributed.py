"""Several ranks: the same mask as one process, whatever their number; killed, resumed, refused.

Most ranks here are those of ranks.py; one test starts torchrun itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import save_tiny
from ranks import command, ranks

import grasp
from grasp import distributed
from grasp.errors import GraspError
from grasp.model import load
from grasp.run import folder as run

SMALL = dict(samples=8, seq_len=32, epochs=2, eval_windows=3, device="cpu", accumulate=4)
FOUR = ("llama", "qwen3", "phi3", "gemma2")


def made(out):
    return json.loads((out / "grasp.json").read_text())


@pytest.mark.parametrize("family", FOUR)
def test_two_ranks_make_the_checkpoint_of_one_process(family, text, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    options = dict(SMALL, calibration=text)
    one = grasp.prune(model, tmp_path / "one", **options).summary
    assert ranks(2, command("prune", model, tmp_path / "two", **options)) == [0, 0]
    two = made(tmp_path / "two")
    assert two["sha256"] == one["sha256"]  # bit for bit
    del one["results"]["seconds"], two["results"]["seconds"]
    assert two["kept"] == one["kept"] and two["results"] == one["results"]
    assert sorted(os.listdir(tmp_path)) == ["model", "one", "two"]


def test_two_ranks_refit_as_one_process_does(tiny, text, tmp_path):
    model, options = tiny, dict(SMALL, calibration=text, compensate="refit")
    one = grasp.prune(model, tmp_path / "one", **options).summary
    assert ranks(2, command("prune", model, tmp_path / "two", **options)) == [0, 0]
    two = made(tmp_path / "two")
    assert two["kept"] == one["kept"] and two["mask_sha256"] == one["mask_sha256"]
    assert two["results"]["dense"] == one["results"]["dense"]
    # refit adds up Gram matrices rank by rank, so the weights agree to rounding
    assert two["results"]["pruned"]["nll"] == pytest.approx(one["results"]["pruned"]["nll"], 1e-4)


@pytest.mark.parametrize("method", ["flap", "output-approximation"])
def test_three_ranks_share_the_statistics_of_one_shot_methods(tiny, text, tmp_path, method):
    options = dict(SMALL, calibration=text, method=method, scale_epochs=0, compensate="none")
    one = grasp.prune(tiny, tmp_path / "one", **options)
    assert ranks(3, command("prune", tiny, tmp_path / "three", **options)) == [0, 0, 0]
    three = made(tmp_path / "three")
    assert three["sha256"] == one.summary["sha256"]  # bit for bit
    assert three["results"]["pruned"] == one.summary["results"]["pruned"]


def test_ranks_killed_at_random_moments(tiny, text, tmp_path):
    """And resumed by another number of them."""
    options = dict(SMALL, calibration=text)
    one = grasp.prune(tiny, tmp_path / "one", **options)
    arguments, out = command("prune", tiny, tmp_path / "out", **options), tmp_path / "out"
    draw, lost = random.Random(0), 0
    for attempt in range(10):
        count, output = draw.choice([2, 3]), tmp_path / f"said {attempt}"
        killed = draw.randrange(count), draw.randint(2, 12)
        codes = ranks(count, arguments, output, killed=killed)
        if out.exists():
            break
        lost += 1
        assert codes[killed[0]] == -signal.SIGKILL and 0 not in codes
        said = output.read_text().splitlines()
        told = f"error: rank {killed[0]} was killed or lost: run the same command again to resume"
        assert said[-1] == told and sum("error" in line for line in said) == 1, said
    assert lost >= 3
    if not out.exists():
        grasp.prune(tiny, out, **options)
    assert made(out)["mask_sha256"] == one.summary["mask_sha256"]
    events = [json.loads(line).get("event") for line in (out / "log.jsonl").open()]
    assert "resumed" in events
    assert not run.run_folder(out).exists()


def test_torchrun_itself(tiny, text, tmp_path):
    options = dict(SMALL, calibration=text, epochs=1, scale_epochs=0)
    one = grasp.prune(tiny, tmp_path / "one", **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "grasp"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [*torchrun, *command("prune", tiny, tmp_path / "two", **options), "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mask_sha256"] == one.summary["mask_sha256"]  # printed once


def test_what_fails_on_a_rank_is_one_line(tiny, text, tmp_path):
    def said(arguments, codes=(1, 1)):
        output = tmp_path / "said"
        output.unlink(missing_ok=True)
        found = ranks(2, arguments, output)
        assert any(code in codes for code in found) and 0 not in found
        (line,) = output.read_text().splitlines()
        return line.replace("rank 1", "rank 0")

    options = dict(SMALL, calibration=text)
    out = tmp_path / "out"
    assert said(command("prune", tiny, out, **options | {"accumulate": 1})) == (
        "error on rank 0: a step of 1 blocks (--batch-size times --accumulate) leaves some of the "
        "2 ranks without work: use --accumulate 2"
    )
    missing = command("prune", tiny, out, **options | {"calibration": "none.txt"})
    assert said(missing).startswith("error on rank 0: none.txt")
    assert said(["bench", str(tiny)]) == (
        "error on rank 0: torchrun is for prune, compare, eval, sparsify: start this without it"
    )
    assert said(["prune", "--of"], codes=(2,)).startswith("error on rank 0: No such option")
    assert sorted(os.listdir(tmp_path)) == ["said"]


def test_one_process_asks_nobody():
    assert (distributed.rank(), distributed.ranks(), distributed.is_first()) == (0, 1, True)
    items = torch.arange(3.0)
    assert list(distributed.in_order(lambda x: 2 * x, items)) == [0, 2, 4]
    assert distributed.share(items)[0].equal(items) and distributed.share(items)[1] == 3
    assert distributed.summed(items) is items
    assert distributed.from_first(lambda: 7) == 7
    distributed.check_same("what", {"a": 1})


def test_ranks_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "everywhere", lambda value: [value, value, "other"])
    with pytest.raises(GraspError, match=r"ranks 0 and 2 differ in weights \('own', 'other'\)"):
        distributed.check_same("weights", "own")


def test_a_rank_has_the_gpu_of_its_number(monkeypatch):
    """A model is read again where it lies, which is cuda:1 on rank 1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(load, "ranks", lambda: 2)
    monkeypatch.setattr(load, "local_rank", lambda: 1)
    assert [load.pick_device(name) for name in ("auto", "cuda", "cuda:1")] == [
        "cuda",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(GraspError, match="which gives each rank its own GPU, got cuda:0"):
        load.pick_device("cuda:0")
    monkeypatch.setattr(load, "local_rank", lambda: 2)
    with pytest.raises(GraspError, match="has no GPU: this machine has 2"):
        load.pick_device("cuda")
