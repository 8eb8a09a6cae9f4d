"""The sweep of launch configurations: compiled, checked, timed in the interpreter, written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from grasp_kernels._triton import launch
from grasp_kernels._triton.launch import Config

ROOT = Path(__file__).parents[1]


def test_the_whole_way_on_a_cpu(tmp_path):
    out = tmp_path / "found.json"
    launch.write({"attention_delta": Config({"BLOCK_M": 16}, 4)}, out)  # of an earlier sweep
    arguments = ["--small", "--only", "attention_forward,projection_write", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.tune", *arguments], cwd=ROOT, check=True)
    found = launch.read(out)
    assert found.keys() == {"attention_delta", ("attention_forward", 32, 64), "projection_write"}
    rows = [json.loads(line) for line in out.with_suffix(".rows").read_text().splitlines()]
    assert len(rows) == 4 and sum(row["chosen"] for row in rows) == 2
    for row in rows:
        assert row["relative_error"] < 1e-5 and len(row["median_ms"]) == len(row["shapes"]) == 2
        assert row["registers"] > 0 and row["stack"] >= 0
        if row["chosen"]:
            key = row["kernel"] if isinstance(row["kernel"], str) else tuple(row["kernel"])
            assert all(row[name] == size for name, size in found[key].blocks.items())


def test_every_kernel_of_the_table_is_swept():
    """With what ships among the candidates, first."""
    table = launch.of_chip(90)
    sweeps = tune.sweeps(90, small=False)
    assert {sweep.key for sweep in sweeps} == table.keys()
    assert len(sweeps) == len(table)
    assert all(sweep.candidates[0] == table[sweep.key] for sweep in sweeps)


@pytest.mark.parametrize(
    ("factor", "says"), [(1.0, None), (1.001, "wrong"), (float("nan"), "wrong")]
)
def test_a_wrong_result_is_no_candidate(factor, says):
    def double(x):
        return (2 * x,)

    def run(x):
        return (factor * 2 * x,)

    x = torch.randn(5)
    sweep = tune.Sweep("double", (), (), lambda: (x,), run, double, torch.float32)
    row = tune._checked(sweep, (x,), double(x.double()))
    assert ("error" in row) == (says is not None) and (says is None or says in row["error"])


def test_the_fastest_right_one_wins():
    rows = [
        {"times_ms": [[2.0, 2.1], [9.0]]},
        {"times_ms": [[3.0], [5.0, 5.1]]},
        {"times_ms": [[], []], "error": "wrong"},
        {"error": "100000 bytes of shared memory"},
    ]
    assert tune.fastest(rows) == 1
    assert tune.fastest(rows[2:]) is None


def test_a_process_that_dies_is_a_row():
    with tune.ProcessPoolExecutor(1, mp_context=tune.get_context("spawn")) as pool:
        row = tune.outcome(pool.submit(os._exit, 3))
    assert row["error"].startswith("BrokenProcessPool")
