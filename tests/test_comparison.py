"""The grid of `grasp compare`: equal conditions, no repeated work, resuming, and refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import grasp
from grasp.budget.budget import Budget
from grasp.errors import GraspError
from grasp.model.units import UnitSpace
from grasp.report.comparison import explained
from grasp.run import compare as comparison

SMALL = dict(samples=4, seq_len=32, epochs=1, scale_epochs=1, eval_windows=2, device="cpu")
GRID = dict(keep=(0.7, 0.4), seeds=(0, 1), methods=("fisher", "fisher+refit", "learned"))


def records(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def found(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    return grasp.compare(tiny, out, calibration=text, **GRID, **SMALL)


def test_measured_cells_leave_no_state(tiny, text, tmp_path):
    def stop(record):
        if (record.get("event"), record.get("name")) == ("cell", "random+blocks, keep 0.4, seed 0"):
            raise KeyboardInterrupt

    out, grid = tmp_path / "out", dict(keep=(0.7, 0.4), seeds=(0,), methods=("random+blocks",))
    with pytest.raises(KeyboardInterrupt):
        grasp.compare(tiny, out, calibration=text, show=stop, **grid, **SMALL)
    (run,) = tmp_path.glob("out.run*")
    assert (run / "facts" / "random+blocks, keep 0.7, seed 0, result.json").exists()
    assert not [*(run / "state").glob("random+blocks*")]


def test_a_cell_is_what_prune_gives(found, tiny, text, tmp_path):
    cells = {(c["method"], c["keep"], c["seed"]): c for c in found.summary["cells"]}
    assert len(cells) == len(found.summary["cells"]) == 12
    for method, how in (("fisher", "refit"), ("learned", "none")):
        options = dict(SMALL, ffn_multiple=1, method=method, compensate=how, keep=0.4, seed=1)
        alone = grasp.prune(tiny, tmp_path / method, calibration=text, **options).summary
        cell = cells[method + "+refit" * (how == "refit"), 0.4, 1]
        assert cell["mask_sha256"] == alone["mask_sha256"]
        assert cell["perplexity"] == alone["results"]["pruned"]
        assert found.summary["dense"]["perplexity"] == alone["results"]["dense"]


def test_nothing_is_done_twice(found):
    """One dense evaluation, and scores of a one-shot method once for all budgets and for refit."""
    log = records(found.folder)
    parts = [r["part"] for r in log if r.get("stage") == "fisher" and r["step"] == 1]
    choices = [f"selection of fisher, seed {s}" for s in (0, 1)]
    learned = [f"selection of learned, keep {k}, seed {s}" for s in (0, 1) for k in (0.7, 0.4)]
    assert sorted(parts) == sorted(choices + learned)
    assert sum(r.get("stage") == "evaluate dense" and r["step"] == 1 for r in log) == 1


def test_tables_and_costs(found):
    for cell in found.summary["cells"]:
        assert 0 < cell["kept"] <= cell["keep"]
        for stage in ("choosing", "making"):
            assert cell[stage]["seconds"] >= 0 and 50e6 < cell[stage]["peak_memory"] < 100e9
    page = (found.folder / "README.md").read_text(encoding="utf-8")
    dense = found.summary["dense"]["perplexity"]["value"]
    assert f"| dense | {dense:.2f} | {dense:.2f} |" in page
    own = [c["perplexity"]["value"] for c in found.summary["cells"] if c["method"] == "learned"]
    assert f"{sum(own[::2]) / 2:.2f} ({min(own[::2]):.2f}–{max(own[::2]):.2f})" in page
    assert "| GRASPrune | 6.47, 1.18 × |" in page and "no BOS, fp32" in page
    assert (found.folder / "compare.png").stat().st_size > 10_000
    assert found.summary == json.loads((found.folder / "compare.json").read_text())


def test_a_budget_of_kv_groups_alone(tiny, text, tmp_path):
    options = dict(SMALL, calibration=text, eval_windows=1, seeds=(0,), keep=0.5, units="kv")
    result = grasp.compare(tiny, tmp_path / "out", methods=["random"], **options)
    (cell,) = result.summary["cells"]
    space = UnitSpace.of(grasp.load(tiny)[0])
    groups = sum(layer.kv_groups * layer.kv_cost for layer in space.layers)
    assert cell["kept"] == 0.5
    assert (
        f"fractions of {groups * space.hidden_size:,} prunable"
        in (result.folder / "README.md").read_text()
    )


def test_every_method_in_one_table(tiny, text, tmp_path):
    """The big table in small: one seed, all methods, three budgets."""
    options = dict(SMALL, samples=3, seq_len=16, lr=0.3, lm_weight=1.0, eval_windows=1, seeds=(0,))
    options |= dict(calibration=text)
    methods = (*comparison.all_methods(mixture=False), "flap+bias")
    result = grasp.compare(tiny, tmp_path / "out", methods=methods, **options)
    cells = result.summary["cells"]
    assert [(c["method"], c["keep"]) for c in cells] == [
        (method, part) for method in methods for part in (0.8, 0.5, 0.4)
    ]
    dense = UnitSpace.of(grasp.load(tiny)[0])
    for cell in cells:
        limit = Budget("keep", cell["keep"], 1).limit(dense)
        assert 0 <= limit - cell["kept"] * dense.cost < 3.001  # less than one channel unspent
        assert 1 < cell["perplexity"]["value"] < 1e6
    masks = {c["method"]: c["mask_sha256"] for c in cells if c["keep"] == 0.5}
    for name in ("learned+blocks", "fisher+blocks", "flap+bias"):
        assert masks.pop(name) == masks[name.partition("+")[0]]
    assert len(set(masks.values())) == len(masks)
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert all(f"\n| {method} | " in page for method in methods)


def test_methods_that_fit_weights_run_in_fp32(tiny, text, tmp_path):
    method, options = "greedy-output-approximation", dict(SMALL, ffn_multiple=1, calibration=text)
    whole = dict(options, keep=0.5, seed=0, method=method, dtype="fp32")
    alone = grasp.prune(tiny, tmp_path / "alone", **whole).summary
    grid = dict(options, keep=[0.5], seeds=[0], methods=[method], dtype="bf16")
    result = grasp.compare(tiny, tmp_path / "out", **grid)
    (cell,) = result.summary["cells"]
    assert cell["perplexity"] == alone["results"]["pruned"]
    assert cell["mask_sha256"] == alone["mask_sha256"]
    assert "Greedy methods fit weights and run in fp32." in explained(result.summary)


def test_stopped_and_resumed(found, tiny, text, tmp_path, monkeypatch):
    """The same cells come out, those that were there are not measured again, and others may be
    asked for. What it takes to load the model again is no cell's cost."""
    out, make, left = tmp_path / "out", comparison.make, [3]
    begin, now, loaded = comparison.begin, time.time, []

    def stop(*args, **more):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return make(*args, **more)

    def begin_in_an_hour(*args):
        loaded.append(3600)
        return begin(*args)

    monkeypatch.setattr(comparison, "begin", begin_in_an_hour)
    monkeypatch.setattr(time, "time", lambda: now() + sum(loaded))
    monkeypatch.setattr(comparison, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        grasp.compare(tiny, out, calibration=text, **GRID, **SMALL)
    assert not out.exists()
    with pytest.raises(GraspError, match="samples: 4 there, 5 now"):
        grasp.compare(tiny, out, calibration=text, **GRID, **dict(SMALL, samples=5))
    fewer = dict(GRID, methods=("fisher", "random"), seeds=(0,))
    again = grasp.compare(tiny, out, calibration=text, **fewer, **SMALL)
    made = [r["part"] for r in records(out) if r.get("stage") == "calibrate" and r["step"] == 4]
    assert made == [f"{m}, keep {k}, seed 0" for m in ("fisher", "random") for k in (0.7, 0.4)]
    same = ("method", "keep", "seed", "kept", "perplexity", "mask_sha256")
    want = [{k: c[k] for k in same} for c in found.summary["cells"][:2]]
    assert [{k: c[k] for k in same} for c in again.summary["cells"][:2]] == want
    parts = [c[part] for c in again.summary["cells"] for part in ("choosing", "making")]
    assert max(p["seconds"] for p in parts) < 3600 <= again.summary["seconds"]


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--methods=magic"], "--methods must be among learned, free", 1),
        (
            ["--methods=greedy-head-similarity+refit"],
            "--methods must name greedy-head-similarity alone",
            1,
        ),
        (["--methods=fisher+magic"], "+blocks or +bias, got 'fisher+magic'", 1),
        (["--keep=0.5,2"], "--keep must be above 0 and at most 1, got 2.0", 1),
        (["--keep=half"], "expected a number or a list such as 0.8,0.5, got 'half'", 2),
        (["--seeds=x"], "expected a list of whole numbers such as 1,4, got 'x'", 2),
        (["--seeds=-1"], "--seed must be between 0 and 4294967295, got -1", 1),
        (["--tasks=pika", "--tasks-data=."], "no task 'pika' (did you mean piqa?)", 1),
        (["--limit=3"], "--limit and --tasks-data are for --tasks, which is not given", 2),
        (["--samples=ALL"], "the samples leave no text to evaluate on: give --eval-text", 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused(refused, tiny, text, options, message, code):
    blocks = str(len(text.read_text()) // 32)  # a byte a token
    options = [option.replace("ALL", blocks) for option in options]
    given = [f"--calibration={text}", "--samples=4", "--seq-len=32", "--device=cpu", *options]
    assert message in refused("compare", tiny, "--out=out", *given, code=code)


def test_command_line_with_tasks(call, tiny, text, tmp_path):
    questions = [
        {"goal": f"to move a stone {n}", "sol1": "lift it", "sol2": "a river", "label": n % 2}
        for n in range(4)
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "piqa.validation.jsonl").write_text(lines)
    methods = "--methods=random,wanda++,flap+bias"
    options = ["--keep=0.5", "--seeds=0", methods, "--samples=4", "--seq-len=32"]
    options += ["--scale-epochs=0", "--eval-windows=2", "--device=cpu", f"--calibration={text}"]
    options += [
        "--tasks=piqa",
        f"--tasks-data={tmp_path}",
        "--limit=3",
        f"--out={tmp_path / 'out'}",
    ]
    code, out, err = call("compare", tiny, *options)
    assert code == 0, err
    assert (
        "random" in out
        and "wanda++" in out
        and "flap+bias" in out
        and "Cells: seed 0, and × the ratio" in out
    )
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## piqa, acc_norm" in page and "±" in page


@pytest.mark.parametrize("empty", ["keep", "methods", "seeds"])
def test_nothing_to_compare(tiny, text, tmp_path, empty):
    with pytest.raises(GraspError, match=f"`{empty}` must name at least one, got none"):
        grasp.compare(tiny, tmp_path / "out", calibration=text, **{empty: []}, **SMALL)
    with pytest.raises(GraspError, match="`keep` must hold at least one number, got none"):
        grasp.prune(tiny, tmp_path / "out", calibration=text, keep=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"method": "fisher"}, {"seed": 1}, {"params": 9e4}])
def test_what_each_cell_sets_is_refused(tiny, text, tmp_path, option):
    with pytest.raises(GraspError, match=f"`{min(option)}` is set for each cell of compare"):
        grasp.compare(tiny, tmp_path / "out", calibration=text, **option, **SMALL)
