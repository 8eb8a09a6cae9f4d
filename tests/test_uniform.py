"""Checkpoints padded to equal widths: the stock class computes what the pruned model did."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from test_checkpoint import EVEN, IDS, UNEVEN, pruned, save
from transformers import AutoModelForCausalLM

from grasp.checkpoint import uniform
from grasp.checkpoint.export import export
from grasp.errors import GraspError

FOUR_HEADS = [(7, 1), (50, 2), (80, 1)]  # at most 4 query heads, which divide the hidden size 64


def padded(folder, family, widths, **options):
    """The pruned model, the stock one made of it, and what export says."""
    model, mask = pruned(family, widths, **options)
    save(model, mask, folder / "model")
    done = export(folder / "model", folder / "stock", to="hf-uniform")
    return model, AutoModelForCausalLM.from_pretrained(done.path), done


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_class_and_config(family, tied, tmp_path):
    model, stock, done = padded(tmp_path, family, FOUR_HEADS, tied=tied)
    files = {path.name for path in done.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert "modeling_grasp.py" not in files
    config = json.loads((done.path / "config.json").read_text())
    assert config["model_type"] == family and config["intermediate_size"] == 80
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert not {"auto_map", "per_layer_config"} & config.keys()

    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, stock))
    assert done.note == f"{before:,} parameters became {after:,}, padded with zeros"
    assert done.bytes == sum(path.stat().st_size for path in done.path.iterdir())
    assert done.architecture == type(stock).__name__
    assert type(stock).__module__.startswith("transformers.")
    assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-4)
    options = dict(attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=12)
    assert torch.equal(stock.generate(IDS, **options), model.generate(IDS, **options))


def test_biases(tmp_path):
    biases = dict(attention_bias=True, mlp_bias=True)
    model, stock, _ = padded(tmp_path, "llama", UNEVEN, **biases)
    assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)


def test_heads_that_llama_forbids(tmp_path):
    model, stock, done = padded(tmp_path, "llama", [(7, 1), (50, 3), (80, 2)])
    assert done.architecture == "MistralForCausalLM"
    assert "6 query heads do not divide the hidden size 64" in done.note
    assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)


def test_the_dtype_stays(tmp_path):
    _, _, done = padded(tmp_path, "qwen2", FOUR_HEADS, dtype=torch.bfloat16)
    assert json.loads((done.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_neither_other_files_nor_their_readers_are_shut_out(tmp_path):
    other = tmp_path / "stock.new"
    other.mkdir()
    (other / "mine").write_text("kept")
    _, _, done = padded(tmp_path, "llama", UNEVEN)
    assert (other / "mine").read_text() == "kept"
    assert {file.stat().st_mode for file in done.path.iterdir()} == {
        (other / "mine").stat().st_mode
    }
    assert {path.name for path in tmp_path.iterdir()} == {"model", "stock", "stock.new"}


def test_equal_widths_need_no_padding(tmp_path):
    with pytest.raises(GraspError, match="same widths already: use the checkpoint as it is"):
        padded(tmp_path, "llama", EVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(GraspError, match=r"has 1,000 bytes free and the weights need [\d,]{7}: fr"):
        padded(tmp_path, "llama", UNEVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model, mask = pruned("llama", UNEVEN)
    save(model, mask, tmp_path / "model")

    def full(self, folder, **_options):
        (folder / "config.json").parent.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(GraspError, match=r"cannot write .*stock: the disk is full"):
        export(tmp_path / "model", tmp_path / "stock", to="hf-uniform")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_computes_something_else_is_not_published(tmp_path, monkeypatch):
    def write_damaged(target, *args, **options):
        target.model.norm.weight.data = target.model.norm.weight.roll(1)
        write(target, *args, **options)

    write = uniform.write_pretrained
    monkeypatch.setattr(uniform, "write_pretrained", write_damaged)
    with pytest.raises(GraspError, match=r"is not published, .*\(logits: differ by .*limit 1e-04"):
        padded(tmp_path, "llama", UNEVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
