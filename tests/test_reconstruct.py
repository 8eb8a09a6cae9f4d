"""Block reconstruction: what learns, towards what, and what it does for text not seen."""

from __future__ import annotations

import copy

import pytest
import torch
from families import save_tiny, tiny_mixture, tiny_model
from test_layer_fit import BLOCKS, fit_only, random_blocks
from test_refit import half

import grasp
from grasp import config
from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.compress import reconstruct as reconstruct_module
from grasp.compress.reconstruct import reconstruct
from grasp.errors import GraspError
from grasp.journal import Journal
from grasp.model.load import load_model
from grasp.model.units import UnitSpace, decoder_layers


class Kept(Journal):
    """Remembers the last state and what was reported."""

    def __init__(self, stop_after=None):
        self.state, self.reports, self.stop_after = None, [], stop_after

    def load_own(self):
        return self.state

    def save(self, state, *, final=False):
        self.state = {name: value.clone() for name, value in state().items()}
        if len(self.reports) == self.stop_after:
            raise KeyboardInterrupt

    def progress(self, step, total, loss, tokens, **info):
        self.reports.append({"loss": loss, **info})


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_learning_leads_nearer_to_the_dense_model_than_fits_do(family, monkeypatch):
    dense = tiny_model(family)
    fitted, learned = copy.deepcopy(dense), copy.deepcopy(dense)
    mask, journal, other = half(dense), Kept(), random_blocks(16, 64, seed=4)
    fit_only(fitted, mask, monkeypatch)
    monkeypatch.setattr(reconstruct_module, "STEP_TOKENS", 64)  # a sample a step
    reconstruct(learned, mask, BLOCKS, 0, journal)
    assert len(journal.reports) == 3
    assert all(layer["loss"] <= layer["fitted"] for layer in journal.reports)
    assert journal.reports[0]["loss"] < journal.reports[0]["fitted"]
    assert UnitSpace.of(learned).layers == mask.pruned_space().layers
    with torch.no_grad():
        want, plain, ours = (m(input_ids=other).logits for m in (dense, fitted, learned))
    assert (ours - want).norm() < (plain - want).norm()
    assert not any(p.requires_grad for p in learned.parameters())


def test_weights_that_are_no_better_on_held_out_text_are_dropped(monkeypatch):
    fitted = tiny_model("llama")
    learned, mask = copy.deepcopy(fitted), half(fitted)
    fit_only(fitted, mask, monkeypatch)
    monkeypatch.setattr(reconstruct_module, "RATE", 10.0)
    reconstruct(learned, mask, BLOCKS, 0, Kept())
    for ours, theirs in zip(learned.parameters(), fitted.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_what_is_cut_was_out_of_the_sums_already(family, monkeypatch):
    cut = tiny_model(family)
    whole, mask, other = copy.deepcopy(cut), half(cut), random_blocks(16, 64, seed=4)
    fit_only(cut, mask, monkeypatch)
    monkeypatch.setattr(reconstruct_module, "fold_layer", lambda *layer: None)
    fit_only(whole, mask, monkeypatch)
    for modules, (ffn, kv) in zip(decoder_layers(whole), mask.layers(), strict=True):
        assert torch.equal(modules.ffn.down.weight.any(0).nonzero().flatten(), ffn)
        heads = modules.attention.out.weight.view(len(modules.attention.out.weight), 4, -1)
        assert torch.equal(heads.any(2).any(0).nonzero().flatten(), kv)
    with torch.no_grad():
        torch.testing.assert_close(cut(input_ids=other).logits, whole(input_ids=other).logits)


@pytest.mark.parametrize(("enough", "rounds"), [(10**9, 3), (2 * 7 / 8, 2), (0, 1)])
def test_more_text_is_read_in_fewer_rounds(enough, rounds, monkeypatch):
    model, read, order = tiny_model("llama"), [], reconstruct_module.epoch_order
    monkeypatch.setattr(config, "ENOUGH_TOKENS", enough * BLOCKS.numel())
    monkeypatch.setattr(
        reconstruct_module, "epoch_order", lambda *of: read.append(of) or order(*of)
    )
    reconstruct(model, half(model), BLOCKS, 5, Kept())
    fitted = len(BLOCKS) * 7 // 8
    assert read == 3 * [(fitted, 5, turn) for turn in range(rounds)]  # in each of three layers


@pytest.mark.parametrize("stop_after", [1, 2])
def test_it_resumes_after_the_last_layer(stop_after):
    whole, mask = tiny_model("llama"), half(tiny_model("llama"))
    parts = copy.deepcopy(whole)
    reconstruct(whole, mask, BLOCKS, 3, Kept())
    journal, again = Kept(stop_after), copy.deepcopy(parts)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(parts, mask, BLOCKS, 3, journal)
    journal.stop_after = None
    reconstruct(again, mask, BLOCKS, 3, journal)
    assert len(journal.reports) == 3  # each layer once
    assert all(map(torch.equal, again.parameters(), whole.parameters()))


def test_a_narrow_model_keeps_its_dtype(monkeypatch):
    monkeypatch.setattr(reconstruct_module, "STEP_TOKENS", 64)
    model = tiny_model("llama").bfloat16()
    journal = Kept()
    reconstruct(model, half(model), BLOCKS, 0, journal)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(layer["loss"] <= layer["fitted"] for layer in journal.reports)
    assert journal.reports[0]["loss"] < journal.reports[0]["fitted"]


def test_a_narrow_model_learns_as_a_wide_one(monkeypatch):
    """Its rounded weights are made anew for each step."""
    monkeypatch.setattr(reconstruct_module, "STEP_TOKENS", 64)
    left = {}
    for dtype in (torch.float32, torch.bfloat16):
        # a copy: autocast remembers the casts of its parameters, not of views as they are loaded
        model, journal = copy.deepcopy(tiny_model("llama")).to(dtype), Kept()
        reconstruct(model, half(model), BLOCKS, 0, journal)
        left[dtype] = journal.reports[0]["loss"] / journal.reports[0]["fitted"]
    assert left[torch.float32] < 0.99
    assert left[torch.bfloat16] == pytest.approx(left[torch.float32], abs=0.005)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_layers_whose_attention_stays_whole_learn_too(family):
    model, journal = tiny_mixture(family), Kept()
    space = UnitSpace.of(model)
    mask = Projection(space, Budget.of(keep=0.75)).mask(torch.rand(space.size))
    reconstruct(model, mask, BLOCKS, 0, journal)
    assert UnitSpace.of(model) == mask.pruned_space()
    assert journal.reports[0]["loss"] < journal.reports[0]["fitted"]


def test_a_layer_that_is_cut_wrongly_is_refused(monkeypatch):
    model = tiny_model("llama")
    other, fold_layer = [*half(model, seed=1).layers()], reconstruct_module.fold_layer
    monkeypatch.setattr(
        reconstruct_module,
        "fold_layer",
        lambda modules, units, kept, experts: fold_layer(modules, units, other[0], experts),
    )
    with pytest.raises(GraspError, match=r"model.layers.0 \(\w+\) reads more than its units"):
        reconstruct(model, half(model), BLOCKS, 0, Kept())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_result_is_what_reconstruction_leaves(dtype, tmp_path):
    """From the dense weights: scales that learned along with the gates are left out."""
    folder, text = save_tiny(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j " * 300)
    options = dict(calibration=str(text), samples=8, seq_len=16, epochs=1, ffn_multiple=8)
    options |= dict(eval_windows=2, dtype=dtype, scale_epochs=0, device="cpu")
    made = grasp.prune(folder, tmp_path / "out", compensate="blocks", **options)
    working = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    by_hand, tokenizer = load_model(folder, dtype=working)
    blocks = grasp.blocks(tokenizer, str(text), samples=8, seq_len=16)
    reconstruct(by_hand, made.mask, blocks, 0, Journal())
    found = load_model(made.folder, dtype=torch.float32)[0].model.layers.parameters()
    for ours, theirs in zip(found, by_hand.model.layers.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


def test_the_whole_command(tmp_path):
    model, text = save_tiny(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j " * 300)
    options = dict(calibration=str(text), samples=8, seq_len=16, epochs=1, ffn_multiple=8)
    options |= dict(eval_seq_len=16, eval_windows=2, dtype="bf16")
    made = grasp.prune(model, tmp_path / "out", compensate="blocks", **options)
    assert "learned, layer by layer" in (made.folder / "README.md").read_text()
    assert grasp.verify(made.folder).passed
