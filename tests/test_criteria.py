"""Third-party criteria: registered in a program, or found in an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import grasp
from grasp import criteria
from grasp.errors import GraspError

OPTIONS = dict(samples=4, seq_len=32, epochs=1, scale_epochs=0, eval_windows=2, device="cpu")
PACKAGE = '''
import torch

def deepest_first(model, units):
    """Keeps the last units of the network."""
    return torch.arange(units.size, dtype=torch.float32)
'''


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(criteria, "_known", dict(criteria._known))


def test_a_criterion_of_a_program(registered, tiny, text, tmp_path):
    @grasp.criterion("first-come", help="keeps the first units", reference="nowhere")
    def first_come(units, blocks):
        assert blocks.shape == (4, 32)
        return -torch.arange(units.size, dtype=torch.float64)

    result = grasp.prune(
        tiny, tmp_path / "out", method="first-come", keep=0.5, calibration=text, **OPTIONS
    )
    widths = result.summary["widths"]
    assert widths["after"][0][0] == widths["before"][0][0] > widths["after"][-1][0]
    assert result.summary["recipe"]["method"] == "first-come"


def test_scores_that_do_not_fit_the_model(registered, tiny, text, tmp_path):
    grasp.criterion("short")(lambda units: torch.zeros(units.size - 1))
    grasp.criterion("broken")(lambda units: torch.full((units.size,), torch.nan))
    for name in ("short", "broken"):
        with pytest.raises(GraspError, match=f"method '{name}' gave .* finite scores"):
            grasp.prune(tiny, tmp_path / name, method=name, calibration=text, **OPTIONS)


def test_a_teacher_is_of_the_blocks_that_are_read(registered, tiny, text, tmp_path):
    @grasp.criterion("two", samples=2)
    def two(units, blocks, teacher):
        assert len(blocks) == len(teacher) == 2
        return torch.rand(units.size)

    grasp.prune(
        tiny,
        tmp_path / "out",
        method="two",
        calibration=text,
        **OPTIONS | dict(scale_epochs=1, lm_weight=0.5),
    )


def test_a_name_that_is_taken_and_a_parameter_that_nobody_offers(registered):
    with pytest.raises(GraspError, match="'fisher' exists already"):
        grasp.criterion("fisher")(lambda units: units)
    with pytest.raises(GraspError, match="asks for weights: its parameters may be model, units"):
        grasp.criterion("new")(lambda weights: weights)
    with pytest.raises(GraspError, match=r"`method` must be one of learned, free, .*'fischer'"):
        criteria.get("fischer")


def test_an_installed_package_adds_a_method(tiny, text, tmp_path):
    """An entry point is all it takes, in `--help`, `prune` and `compare`."""
    (tmp_path / "deepest.py").write_text(PACKAGE)
    info = tmp_path / "deepest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[grasp.criteria]\ndeepest = deepest:deepest_first\n")

    def run(*arguments: str) -> str:
        path = os.pathsep.join([str(tmp_path), *sys.path])
        return subprocess.run(
            [sys.executable, "-m", "grasp", *arguments],
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert "random, deepest" in run("prune", "--help")
    options = [f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items() if k != "epochs"]
    prune = ("prune", str(tiny), "--keep=0.5", f"--calibration={text}", "--ffn-multiple=8")
    run(*prune, "--method=deepest", f"--out={tmp_path / 'out'}", *options)
    after = json.loads((tmp_path / "out" / "grasp.json").read_text())["widths"]["after"]
    assert [ffn for ffn, _ in after] == sorted(ffn for ffn, _ in after)
    both = ("compare", str(tiny), "--keep=0.5", f"--calibration={text}", "--seeds=0")
    run(*both, "--methods=deepest,magnitude", f"--out={tmp_path / 'grid'}", *options)
    cells = json.loads((tmp_path / "grid" / "compare.json").read_text())["cells"]
    assert {cell["method"] for cell in cells} == {"deepest", "magnitude"}
