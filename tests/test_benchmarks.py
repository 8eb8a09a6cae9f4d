"""The benchmarks run and measure what they claim; no test asserts times or perplexities."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import save_tiny, tiny_model

from benchmarks import (
    ablation,
    budgets,
    calibration_text,
    documents,
    published,
    quantisation,
    ranks,
    rows,
    sharding,
)
from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.config import PruneConfig
from grasp.gates.gating import gated
from grasp.gates.training import TrainSettings
from grasp.journal import Journal
from grasp.model.units import UnitSpace
from grasp.select.learned import LearnSettings, learn_scores

KEEP = 0.5


def blocks(samples=1):
    return torch.randint(256, (samples, 32), generator=torch.Generator().manual_seed(0))


def cost(mask):
    return Budget("keep", KEEP).cost(mask.pruned_space())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_published_step_is_grasp_with_the_published_choices(family):
    """Same scores after 6 steps of two forwards and two loops.

    They start apart: Adam's first step from equal scores ends in ties up to rounding.
    """
    model, ids, steps = tiny_model(family), blocks(), 6
    start = torch.randn(UnitSpace.of(model).size, generator=torch.Generator().manual_seed(0))
    with published.training(model, KEEP) as trainer:
        trainer.scores.data.copy_(start)
        for _ in range(steps):
            trainer.step(ids)
    space = UnitSpace.of(model)
    projection = ablation.FloorsOutside(
        space,
        Budget("keep", KEEP, ffn_multiple=1),
        device=model.device,
        tie_rank=torch.arange(space.size),
    )
    settings = LearnSettings(TrainSettings(epochs=steps), anneal=0.0, gate_site="kv")
    scores, _ = learn_scores(model, projection, start, ids, settings, Journal())
    torch.testing.assert_close(trainer.scores.detach(), scores, rtol=1e-3, atol=1e-4)
    assert torch.equal(trainer.mask().keep, projection.mask(scores).keep)


def test_published_training_has_the_cost_it_is_said_to_have_and_leaves_nothing():
    model, ids = tiny_model("llama"), blocks()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(ids).logits
    with published.training(model, KEEP) as trainer:
        seen = set()
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda grad, name=name: seen.add(name))
        trainer.step(ids)
    assert seen == {name for name, _ in model.named_parameters()}  # a gradient for every weight
    assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_published_floors_exceed_the_budget_and_ours_do_not():
    """Equal scores: ties by position fill the first layers, then all others get their floor."""
    model = tiny_model("llama")
    space, budget = UnitSpace.of(model), Budget("keep", KEEP, ffn_multiple=1)
    with published.training(model, KEEP) as trainer:
        theirs = trainer.mask()
    ours = Projection(space, budget).mask(torch.zeros(space.size))
    assert cost(theirs) > budget.limit(space) >= cost(ours)
    assert len(theirs.layers()[0][0]) == space.layers[0].ffn  # all of the first layer
    assert len(theirs.layers()[-1][0]) == 1  # the bare floor of the last
    assert all(len(ffn) > 1 for ffn, _ in ours.layers())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_published_scales_fold_exactly_only_without_biases(family):
    model, ids = tiny_model(family), blocks()
    space = UnitSpace.of(model)
    theta = []

    def keep_theta(values):
        theta.append(values)
        return 1 + 0.5 * torch.tanh(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "scale", keep_theta)
        original = tiny_model(family)
        published.learn_scales(model, ids, TrainSettings(epochs=4, lr=0.1))
    with gated(original, space, "kv") as gates:
        gates.set(1 + 0.5 * torch.tanh(theta[-1]))
        calibrated = original(ids).logits
    equal = torch.allclose(model(ids).logits, calibrated, rtol=1e-4, atol=1e-4)
    assert equal == (family == "llama")


def test_results_of_other_settings_are_refused(tmp_path):
    settings = {"ours": {"lr": 0.01}, "evaluation": {}}
    results = {"settings": settings, "rows": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert rows.resume(tmp_path / "results.json", settings) == results
    for other in ({"lr": 0.02}, {"lr": 0.01, "bias": True}):
        with pytest.raises(SystemExit, match="other settings"):
            rows.resume(tmp_path / "results.json", {"ours": other, "evaluation": {}})
    assert rows.resume(tmp_path / "none.json", settings) is None


def test_rows_change_one_choice_each():
    ours = PruneConfig("m", Budget("keep", KEEP, ffn_multiple=1))
    rows = {row.name: row for row in ablation.ablation_rows(ours)}

    def choices(row):
        return {**row.config.to_json(), "ties": row.ties, "floors": row.floors}

    for row in rows.values():
        if "/" in row.name:
            base, here = choices(rows[row.against]), choices(row)
            assert sum(base[k] != here[k] for k in base) == 1, row.name


def test_ablation_rows_resume(tmp_path, capsys):
    folder = save_tiny(tmp_path / "tiny", "llama")
    text = tmp_path / "text.txt"
    text.write_text("Where the same words come again, the same words come again. " * 40)
    out = tmp_path / "ablation.json"
    options = ["--model", str(folder), "--text", str(text), "--eval-text", str(text)]
    options += ["--samples", "4", "--seq-len", "32", "--epochs", "1", "--device", "cpu"]
    options += ["--eval-windows", "2", "--eval-seq-len", "64", "--out", str(out)]

    ablation.main([*options, "--rows", "ours,published code"])
    first = json.loads(out.read_text())
    ours, theirs = first["rows"]
    assert ours["kept"] <= KEEP
    assert ours["mask_sha256"] != theirs["mask_sha256"]
    assert first["dense"] > 1 and ours["before_last_epoch"] != ours["after"]
    assert str(tmp_path) not in json.dumps(first["settings"]["ours"]["calibration"])

    ablation.main([*options, "--rows", "ours,ours/floors=outside,published"])
    rows = json.loads(out.read_text())["rows"]
    assert rows[:2] == first["rows"]  # not run again
    assert [r["row"] for r in rows[2:]] == ["ours/floors=outside", "published"]

    capsys.readouterr()
    ablation.main(["--table", "--out", str(out)])
    printed = capsys.readouterr().out
    assert all(f"| {r['row']} |" in printed for r in rows)

    with pytest.raises(SystemExit, match="other settings"):
        ablation.main([*options, "--seq-len", "16"])


def test_budgets_from_one_run_beside_each_alone(tiny, text, tmp_path, capsys):
    options = ["--model", tiny, "--text", text, "--eval-text", text, "--out", tmp_path / "out"]
    options += ["--samples", 4, "--seq-len", 32, "--epochs", 1, "--device", "cpu"]
    options += ["--eval-windows", 2, "--eval-seq-len", 64, "--keep", "0.7,0.5"]
    for _ in range(2):  # nothing is run again: an existing result would be refused
        budgets.main(list(map(str, options)))
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 0.")]
    assert [row[0] for row in rows[:2]] == ["| 0.7", "| 0.5"]
    assert rows[1][1] == rows[1][2] and rows[1][3] == "1.000 |"


def test_quantisation_costs_more_with_fewer_bits(tmp_path, capsys):
    folder = str(save_tiny(tmp_path / "tiny", "llama"))
    text, out = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("Where the same words come again, the same words come again. " * 20)
    options = ["--text", str(text), "--types", "q8_0,q4_0", "--seq-len", "64", "--windows", "2"]
    quantisation.main([folder, "--against", folder, *options, "--out", str(out), "--device", "cpu"])
    found = json.loads(out.read_text())["perplexity"][folder]
    off = [abs(math.log(found[kind] / found["fp32"])) for kind in ("q8_0", "q4_0")]
    assert 0 < off[0] < off[1] < 1
    assert capsys.readouterr().out.count("1.0000") == 5  # a model beside itself: no excess


def test_calibration_text_measures_each_text_with_each_amount(tmp_path, capsys):
    model, out = str(save_tiny(tmp_path / "tiny", "llama")), tmp_path / "out"
    stones, rivers = tmp_path / "stones.txt", tmp_path / "rivers.txt"
    stones.write_text("Where the same stones come again, the same stones come again. " * 40)
    rivers.write_text("A river bends, and bends back; a river never comes back. " * 40)
    options = ["--model", model, "--texts", f"{stones},{rivers}", "--eval-texts", str(rivers)]
    options += ["--samples", "2,4", "--seq-len", "32", "--eval-seq-len", "64", "--eval-windows"]
    calibration_text.main([*options, "2", "--device", "cpu", "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["text"], row["samples"]) for row in rows] == [
        (str(text), samples) for text in (stones, rivers) for samples in (2, 4)
    ]
    epochs = [
        json.loads((out / f"0-{n}-0/grasp.json").read_text())["recipe"]["epochs"] for n in (2, 4)
    ]
    assert epochs == [2, 1]
    assert capsys.readouterr().out.count("| rivers.txt |") == 2


def test_a_rank_holds_its_part_of_every_matrix_as_planned():
    found = sharding.compare("tiny", 2)
    assert {rank["held"] for rank in found["ranks"]} == {found["planned"]["weights"]}
    norms = 2 * 256 * (2 * 8 + 1)
    assert found["planned"]["weights"] == (found["one_process"]["held"] + norms) / 2
    assert found["planned_over_measured"] < 1.1  # a busy machine counts too much, never too little


def test_ranks_take_the_same_steps_as_one_process():
    found = ranks.compare("tiny", 1, "full", 1)
    assert {how: len(steps) for how, steps in found["steps"].items()} == {
        "one_process": ranks.STEPS,
        "torchrun": ranks.STEPS,
    }


def test_documents_kept_apart_compute_what_each_does_alone():
    model, block = tiny_model("llama"), torch.tensor([[1, 5, 6, 7, 1, 9, 8]])
    decoder = model.get_decoder()
    alone = [decoder(part, use_cache=False).last_hidden_state for part in block.split([4, 3], 1)]
    with documents.apart(model, 1):
        found = decoder(block, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, torch.cat(alone, 1))
    joined = decoder(block, use_cache=False).last_hidden_state
    assert not torch.allclose(found, joined)
