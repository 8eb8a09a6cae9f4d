"""Benchmarks of kernels and steps: rows are written at once, and invalid ones are marked."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import evidence, gate_training, kernels, published
from grasp.budget.projection import Mask
from grasp.model.units import UnitSpace

KEEP = 0.5


def test_gate_training_runs(tmp_path, capsys):
    out = tmp_path / "step.json"
    arguments = ["--small", "--keep", "1,0.5", "--steps", "2", "--repetitions", "1"]
    log, table = tmp_path / "runs.jsonl", tmp_path / "kernels.txt"
    arguments += ["--log", str(log), "--profile", str(table), "--out", str(out)]
    gate_training.main([*arguments, "--device", "cpu"])
    result = json.loads(out.read_text())
    assert all(e["ours"] < 1e-3 for e in result["relative_error"]["tiny"].values())
    assert {"device", "threads", "torch"} <= result["machine"].keys()
    assert [(r["batch"], r["keep"]) for r in result["rows"]] == [(1, 1), (1, 0.5), (2, 1), (2, 0.5)]
    for row in result["rows"]:
        dense, masked = row["tflops"]["dense"], row["tflops"]["masked"]
        assert masked < 0.9 * dense if row["keep"] < 1 else masked == dense
        assert row["stages_ms"].keys() == {"project", "forward", "backward", "optimiser"}
        for clock in ("wall_seconds", "process_cpu_seconds"):
            assert ("theirs/ours" in row[clock]) == (row["keep"] < 1)
        assert row["figure"] and row["plans"]["ours"]["memory"] == "fast"
    assert out.with_suffix(".png").exists()
    assert capsys.readouterr().out.count("| tiny |") == 4
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["side"] for line in lines].count("theirs") == 2 and len(lines) == 10
    assert table.read_text().count("Self CPU") >= 4


def test_flops_of_a_7b():
    """26.9 GFLOP a token by hand at 512 tokens; 20.3 with half of all units masked."""
    model = gate_training.build("llama-2-7b", torch.device("meta"), torch.bfloat16)
    space = UnitSpace.of(model)
    mask = Mask(space, torch.ones(space.size, dtype=torch.bool))
    dense = gate_training.flops(model, mask, 512)
    assert dense["dense"] == dense["masked"] == pytest.approx(26.9e9, rel=0.01)
    half = torch.cat([torch.arange(n) % 2 == 0 for n in (11_008, 32)]).repeat(32)
    half = gate_training.flops(model, Mask(space, half), 512)
    assert half["dense"] == dense["dense"] and half["masked"] == pytest.approx(20.3e9, rel=0.01)


def test_forms_that_differ_are_no_figure(monkeypatch, tmp_path):
    out = tmp_path / "step.json"
    arguments = ["--small", "--keep", "0.5", "--steps", "1", "--repetitions", "1"]
    monkeypatch.setattr(published, "_ffn_forward", lambda mlp, x: mlp.down_proj(mlp.up_proj(x)))
    gate_training.main([*arguments, "--device", "cpu", "--out", str(out)])
    for row in json.loads(out.read_text())["rows"]:
        assert not row["figure"] and "do not compute the same" in row["notes"][0]


def test_a_step_that_fell_back_is_no_figure(monkeypatch, tmp_path):
    learn = gate_training.learn_scores

    def fall_back(*args):
        args[-1].note("steps run one kernel at a time, not as a CUDA graph: no memory")
        return learn(*args)

    monkeypatch.setattr(gate_training, "learn_scores", fall_back)
    model = gate_training.build("tiny", torch.device("cpu"), torch.float32)
    known = []
    row = gate_training.measure(model, gate_training.Case(32, 1, KEEP), 1, 1, known=known.append)
    assert len(row["notes"]) == 1 and "not as a CUDA graph" in row["notes"][0]
    assert [k["side"] for k in known] == ["ours", "with scales", "theirs"]
    assert known[0]["memory"] == "fast" and known[0]["planned_bytes"] > 0
    assert [len(k["notes"]) for k in known] == [1, 1, 0]


def test_red_tests_make_no_figure(tmp_path):
    def case(name, inside=""):
        return f'<testcase classname="tests.kernels.{name}" name="x">{inside}</testcase>'

    report = tmp_path / "tests.xml"
    cases = case("on_device.test_swiglu") + case("on_device.test_attention", "<failure/>")
    cases += (
        case("test_gating", "<skipped/>") + case("test_gating") + case("test_fp8", "<skipped/>")
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert evidence.passed(report, "test_swiglu") and evidence.passed(report, "test_gating")
    assert not evidence.passed(report, "test_swiglu", "test_attention")
    assert not evidence.passed(report, "test_fp8") and not evidence.passed(report, "test_other")
    assert not evidence.passed(tmp_path / "none.xml", "test_swiglu")


def test_a_contender_that_fails_is_a_row_and_stops_no_other():
    errors = pytest.importorskip("triton.runtime.errors")

    def too_large(x):
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    def plain(x):
        return 2 * x

    contenders = {"too large": too_large, "plain": plain}
    work = {"forward": 1.0, "backward": 1.0, "both": 2.0}
    x = torch.randn(4, requires_grad=True)
    setup = kernels.Setup("swiglu", {"tokens": 4}, contenders, (x,), work, "GB/s")
    first, *rest = kernels.measure(setup, {"GB/s": 1.0}, rounds=1)
    assert first["error"].startswith("OutOfResources: out of resource: shared memory")
    assert [(r["contender"], r["pass"]) for r in rest] == [
        ("plain", name) for name in ("forward", "backward", "both")
    ]
