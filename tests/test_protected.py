"""Protected layers: they keep all units inside the budget, with every method, and show it."""

from __future__ import annotations

import pytest
import torch

import grasp
from grasp.checkpoint.record import Record
from grasp.criteria import OURS
from grasp.errors import GraspError

SMALL = dict(samples=3, seq_len=16, epochs=1, scale_epochs=0, eval_windows=1, device="cpu")
ENDS = dict(protect_first=1, protect=[2])  # of three layers; the widths are 96 and 4


@pytest.mark.parametrize("method", [c.name for c in OURS if c.name not in ("reap", "frequency")])
def test_every_method_leaves_them_whole(tiny, text, tmp_path, method):
    options = dict(SMALL, **ENDS, keep=0.8, ffn_multiple=1, method=method)
    if not next(c for c in OURS if c.name == method).updates_weights:
        options["compensate"] = "none"
    record = grasp.prune(tiny, tmp_path / "out", calibration=text, **options).record
    (first, middle, last), whole = record.widths["after"], record.widths["before"][0]
    assert first == last == whole and middle != whole
    assert record.budget["limit"] - 3 < record.budget["obtained"] <= record.budget["limit"]
    assert record.recipe["budget"]["protect_first"] == 1


def test_learning_keeps_them_open_in_every_step(tiny, text, tmp_path):
    seen = []
    options = dict(SMALL, **ENDS, keep=0.8, ffn_multiple=1, samples=6, compensate="none")
    grasp.prune(tiny, tmp_path / "out", calibration=text, show=seen.append, **options)
    costs = [(r["cost"], r["limit"]) for r in seen if r.get("stage") == "learn"]
    assert len(costs) == 6 and all(cost <= limit for cost, limit in costs)


def test_command_line(call, refused, tiny, text, tmp_path):
    ends = ["--protect-last=1", "--protect=0", "--ffn-multiple=8", "--seq-len=16", "--device=cpu"]
    code, said, _ = call("plan", tiny, "--keep=0.8", *ends)
    assert code == 0 and "protected   2 layers keep all units: 0, 2\n" in said
    assert "protected" not in call("plan", tiny, "--keep=0.8", *ends[2:])[1]
    said = refused("plan", tiny, "--keep=0.5", *ends)
    assert said.startswith("--keep must be at least 0.7") and said.endswith("protect fewer layers")
    said = refused("prune", tiny, "--out=out", "--protect=3", *ends[2:])
    assert said == "--protect must list layers between 0 and 2 for this model, got 3"
    said = refused("plan", tiny, "--layout=uniform", *ends)
    assert said.startswith("--layout uniform gives all layers the same widths, so none can be")
    assert "'x'" in refused("plan", tiny, "--protect=x", code=2)
    options = ["--keep=0.8", "--method=random", "--scale-epochs=0", "--samples=2"]
    out = tmp_path / "out"
    code, _, err = call("prune", tiny, f"--out={out}", f"--calibration={text}", *options, *ends)
    assert code == 0, err
    assert Record.read(out).widths["after"][0] == Record.read(out).widths["before"][0]


def test_another_protection_is_another_run(tiny, text, tmp_path):
    def stop(record):
        if record.get("stage") == "blocks":
            raise KeyboardInterrupt

    options = dict(SMALL, keep=0.8, ffn_multiple=8, method="random", calibration=text)
    with pytest.raises(KeyboardInterrupt):
        grasp.prune(tiny, tmp_path / "out", show=stop, protect_last=1, **options)
    with pytest.raises(GraspError, match=r"budget\.protect_last: 1 there, 0 now"):
        grasp.prune(tiny, tmp_path / "out", **options)
    grasp.prune(tiny, tmp_path / "out", protect_last=1, **options)


def test_python(tiny):
    units = grasp.units(grasp.load(str(tiny))[0])
    scores = torch.arange(units.size).float()  # the first layer is the lowest
    mask = grasp.project(scores, units, keep=0.8, ffn_multiple=1, protect_first=1)
    assert len(mask.layers()[0][0]) == 96
    with pytest.raises(GraspError, match=r"`protect` must be a list of layers, .* got 3"):
        grasp.project(scores, units, protect=3)
