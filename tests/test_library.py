"""grasp as a library: a program composes the stages itself, as documented."""

from __future__ import annotations

import copy

import pytest
import torch
from families import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import grasp
from grasp.checkpoint import save as saving
from grasp.checkpoint.save import save_checkpoint
from grasp.errors import GraspError
from grasp.run import stages
from grasp.select import select


@pytest.fixture
def scores():
    def draw(units):
        return torch.rand(units.size, generator=torch.Generator().manual_seed(5))

    return draw


def test_values_print_in_a_line_and_a_mask_survives_a_file(scores, tmp_path):
    units = grasp.units(tiny_model("llama"))
    mask = grasp.project(scores(units), units, keep=0.5, ffn_multiple=8)
    mask.save(tmp_path / "mask.safetensors")
    assert grasp.Mask.load(tmp_path / "mask.safetensors") == mask
    for value in (units, mask):
        assert "\n" not in repr(value) and len(repr(value)) < 150
    assert "50.00%" in repr(mask)
    (tmp_path / "other").write_bytes(b"not a mask")
    with pytest.raises(GraspError, match="other is not a mask"):
        grasp.Mask.load(tmp_path / "other")


def test_scores_that_are_not_one_per_unit():
    units = grasp.units(tiny_model("llama"))
    for wrong in (torch.zeros(units.size - 1), torch.full((units.size,), torch.nan)):
        with pytest.raises(GraspError, match=rf"expected \[{units.size}\]: one finite number"):
            grasp.project(wrong, units)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_a_folded_model_is_what_its_checkpoint_says(family, scores, tmp_path):
    """The ordinary save_pretrained of transformers writes a folder that loads."""
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    units = grasp.units(model)
    mask = grasp.project(scores(units), units, keep=0.5, ffn_multiple=8)
    small = grasp.fold(model, mask)
    assert type(small).__name__.startswith("Grasp") and grasp.units(small) == mask.pruned_space()
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = small(input_ids=ids).logits
        small.generate(ids, max_new_tokens=4, do_sample=False)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, logits)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert grasp.units(model) == units


def test_stages_one_by_one(text, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    blocks = grasp.blocks(tokenizer, str(text), samples=8, seq_len=32)
    mask = grasp.learn(model, blocks, keep=0.5, ffn_multiple=8, epochs=1)
    grasp.refit(model, mask, blocks)
    small = grasp.fold(model, mask)
    before = grasp.perplexity(small, tokenizer, str(text), seq_len=32, windows=4).value
    grasp.calibrate(small, blocks)
    assert grasp.perplexity(small, tokenizer, str(text), seq_len=32, windows=4).value < before


def test_reconstruction_in_place_of_a_fold(text):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    blocks = grasp.blocks(tokenizer, str(text), samples=8, seq_len=32)
    mask = grasp.learn(copy.deepcopy(model), blocks, keep=0.5, ffn_multiple=8, epochs=1)
    cut = grasp.fold(model, mask)
    with pytest.raises(GraspError, match="`blocks` must be at least 2"):
        grasp.reconstruct(model, mask, blocks[:1])
    small = grasp.reconstruct(model, mask, blocks)
    assert grasp.units(small) == grasp.units(cut) and type(small) is type(cut)
    with torch.no_grad():
        dense, ours, plain = (
            m(input_ids=blocks[:1]).logits for m in (tiny_model("llama"), small, cut)
        )
    assert (ours - dense).norm() < 0.9 * (plain - dense).norm()


def test_gates_learn_in_the_memory_that_is_asked_for(text, monkeypatch):
    model, seen = tiny_model("llama"), []
    blocks = grasp.blocks(tiny_tokenizer(), str(text), samples=2, seq_len=32)

    def recomputed():
        return ["forward" in vars(layer) for layer in model.model.layers]

    def see(*args):
        seen.extend(recomputed())
        return select(*args)

    monkeypatch.setattr(stages, "select", see)
    grasp.learn(model, blocks, keep=0.5, ffn_multiple=8, epochs=1, memory="low")
    assert seen and all(seen) and not any(recomputed())


def test_as_documented(text, tmp_path, capsys):
    """A researcher's own scores, to a checkpoint that every verb knows."""

    def my_scores(model, units):
        return torch.arange(units.size, dtype=torch.float32)

    folder = save_tiny(tmp_path / "MODEL")
    model, tokenizer = grasp.load(folder, device="cpu")
    units = grasp.units(model)
    scores = my_scores(model, units)
    mask = grasp.project(scores, units, keep=0.5, ffn_multiple=32)
    small = grasp.fold(model, mask)
    grasp.save(small, tokenizer, tmp_path / "DIR", mask=mask)
    print(grasp.perplexity(small, tokenizer, str(text), windows=2))
    assert "perplexity" in capsys.readouterr().out
    assert grasp.verify(tmp_path / "DIR").passed
    grasp.export(tmp_path / "DIR", tmp_path / "uniform", to="hf-uniform")
    with pytest.raises(GraspError, match="DIR exists already"):
        grasp.save(small, tokenizer, tmp_path / "DIR")


def test_a_model_that_trains_with_eager_attention_is_saved(tmp_path):
    model = tiny_model("llama").train()
    model.set_attn_implementation("eager")
    grasp.save(model, tiny_tokenizer(), tmp_path / "DIR")
    assert model.training and model.config._attn_implementation == "eager"
    assert grasp.verify(tmp_path / "DIR").passed
    assert [path.name for path in tmp_path.iterdir()] == ["DIR"]


def test_what_would_fail_verify_is_not_published(tmp_path, monkeypatch):
    def damaged(model, tokenizer, folder, record):
        saved = save_checkpoint(model, tokenizer, folder, record)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x3c")
        return saved

    monkeypatch.setattr(saving, "save_checkpoint", damaged)
    with pytest.raises(GraspError, match="is not published, as it would fail `grasp verify`"):
        grasp.save(tiny_model("llama"), tiny_tokenizer(), tmp_path / "DIR")
    assert not [*tmp_path.iterdir()]


def test_a_model_without_its_mask_is_a_checkpoint_too(scores, tmp_path):
    model = tiny_model("llama")
    units = grasp.units(model)
    small = grasp.fold(model, grasp.project(scores(units), units, keep=0.5, ffn_multiple=8))
    record = grasp.save(small, tiny_tokenizer(), tmp_path / "DIR")
    assert record.widths["before"] == record.widths["after"]
    assert grasp.verify(tmp_path / "DIR").passed
