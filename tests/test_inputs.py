"""User inputs: each wrong option or folder gives a one-line error before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from families import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from grasp.errors import REASON, GraspError, reason
from grasp.model.header import read_header
from grasp.model.load import load_model
from grasp.model.source import hub_answers
from grasp.model.units import UnitSpace
from grasp.planning.plan import plan
from grasp.run.prune import prune

ROOT = Path(__file__).parents[1]
SHORT = ("--samples=8", "--seq-len=32", "--epochs=1", "--ffn-multiple=8")


def with_config(folder: Path, **values) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def with_weights(folder: Path, **tensors) -> Path:
    """Tensors added to those stored; a name's dots are written as two underscores."""
    file = folder / "model.safetensors"
    added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "m"))


# Options: without torch


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "m", "--keep=7", "--out=x"], "--keep must be above 0 and at most 1, got 7.0"),
        (
            ["prune", "m", "--keep=0.9,7", "--out=x", *SHORT],
            "--keep must be above 0 and at most 1, got 7.0",
        ),
        (
            ["prune", "m", "--seq-len=257", "--out=x"],
            "--seq-len must be at most 256 for this model",
        ),
        (["prune", "m", "--calibration=none.txt", "--out=x"], "none.txt does not exist"),
        (["prune", "m", "--eval-text=none.txt", "--out=x"], "none.txt does not exist"),
        (["prune", "m", "--device=gpu", "--out=x"], "--device must be cpu, cuda, cuda:1 or auto"),
        (["prune", "m", "--method=best", "--out=x"], "--method must be one of learned, free"),
        (["prune", "m", "--out=m"], "m exists already"),
        (
            ["prune", "m", "--out=x", "--seq-len=32", "--ffn-multiple=7"],
            "--ffn-multiple must divide",
        ),
        (["prune", "none", "--out=x"], "no such folder or file: none"),
        (["plan", "m", "--seq-len=257"], "--seq-len must be at most 256 for this model"),
        (
            ["compare", "m", "--keep=0.5,7", "--out=x", "--seq-len=32"],
            "--keep must be above 0 and at most 1, got 7.0",
        ),
        (
            ["sparsify", "m", "--seq-len=257", "--out=x"],
            "--seq-len must be at most 256 for this model",
        ),
        (["sparsify", "m", "--calibration=none.txt", "--out=x"], "none.txt does not exist"),
        (["eval", "m", "--text=none.txt"], "none.txt does not exist"),
        (
            ["eval", "m", "--text=m/config.json", "--seq-len=257"],
            "--seq-len must be between 2 and 256",
        ),
        (["bench", "m", "--device=gpu"], "--device must be cpu, cuda, cuda:1 or auto"),
        (["bench", "none"], "no such folder or file: none"),
        (["export", "none", "--out=x.gguf"], "no such folder or file: none"),
        (["export", "m", "--out=m", "--to=hf-uniform"], "m exists already"),
    ],
)
def test_a_wrong_option_is_refused_without_torch(model, arguments, said):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torch'] = None\n"  # raises
        f"sys.argv = ['grasp', *{arguments!r}]\n"
        "from grasp.cli.main import main; main()\n"
    )
    left = subprocess.run(
        [sys.executable, "-c", program], cwd=model.parent, capture_output=True, text=True
    )
    assert (left.returncode, left.stdout) == (1, ""), left.stderr
    assert left.stderr.startswith(f"error: {said}"), left.stderr
    assert left.stderr.count("\n") == 1
    assert [path.name for path in model.parent.iterdir()] == ["m"]


# Folders that are not a plain model


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bit"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
    ],
)
def test_quantised_weights_are_not_cut(model, refused, config, how):
    with_config(model, quantization_config=config)
    for verb in (
        ["plan"],
        ["prune", "--out=x"],
        ["sparsify", "--out=x"],
        ["export", "--out=x.gguf"],
    ):
        said = refused(verb[0], model, *verb[1:])
        done = "converted" if verb[0] == "export" else "cut"
        assert said == (
            f"{model} is quantised ({how}), and its weights cannot be {done}: name the original "
            "checkpoint"
        )


@pytest.mark.parametrize("bits", [8, 4])
def test_eval_and_bench_of_quantised_weights_work_or_say_why_not(model, text, call, tmp_path, bits):
    """Its path for AVX-512 in bf16 cannot pack 4-bit rows that do not fill its blocks."""
    from bitsandbytes.functional import has_avx512bf16

    runs = bits == 8 or not has_avx512bf16()
    how = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    packed = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=how)
    packed.save_pretrained(tmp_path / "q")
    tiny_tokenizer().save_pretrained(tmp_path / "q")
    bench = ("--prompt-lens=8", "--batch-sizes=1", "--tokens=2", "--repetitions=1")
    for verb in (["eval", f"--text={text}", "--seq-len=32", "--windows=2"], ["bench", *bench]):
        code, _, err = call(verb[0], tmp_path / "q", *verb[1:])
        assert code == (0 if runs else 1), err
        if not runs:
            assert f"q is quantised (bitsandbytes, {bits} bit), and cannot be run here: " in err


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_named_and_to_be_merged_first(model, refused, beside):
    (model / "adapter_config.json").write_text(json.dumps(ADAPTER))
    what = "beside a model's weights"
    if not beside:
        (model / "config.json").unlink()
        what = "of org/base"
    for verb in (["plan"], ["prune", "--out=x"], ["eval", f"--text={__file__}"], ["bench"]):
        said = refused(verb[0], model, *verb[1:])
        assert said.startswith(f"{model} holds a LoRA adapter {what} (adapter_config.json): merge")


def test_a_model_without_its_tokenizer(model, refused):
    for file in model.glob("tokenizer*"):
        file.unlink()
    said = refused("prune", model, "--out=x", *SHORT)
    assert said.startswith(f"{model} has no tokenizer (no tokenizer.json, tokenizer.model or vocab")


def test_a_tokenizer_that_does_not_load_is_named(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(GraspError, match=f"cannot read the tokenizer of {model}: "):
        load_model(model, dtype=None)


def test_a_reason_is_whole_and_one_line():
    assert reason(ValueError("from one of: \n (1) a file\n (2) another")) == (
        "from one of: (1) a file (2) another"
    )
    assert reason(ValueError("")) == "ValueError"
    assert len(reason(ValueError("word " * 1000))) <= REASON


# Weights that are not what config.json says


def test_weights_that_the_config_does_not_use_are_refused(model):
    bias = torch.zeros(128)
    with_weights(model, model__layers__0__self_attn__q_proj__bias=bias)
    with pytest.raises(
        GraspError, match=r"unused by it, model.layers.0.self_attn.q_proj.bias \(1 "
    ):
        load_model(model, dtype=None)


def test_a_layer_more_than_the_config_has_is_refused(model, call):
    with_weights(model, model__layers__3__mlp__up_proj__weight=torch.zeros(96, 64))
    code, _, err = call("prune", model, "--out=x", *SHORT)
    assert code == 1
    assert err.startswith(f"error: {model} is not the model that its config.json describes: ")
    assert err.count("\n") == 1  # and no table of transformers' own


def test_buffers_that_old_checkpoints_store_are_no_weights(model):
    with_weights(model, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load_model(model, dtype=None)


def test_a_shard_that_is_missing_or_damaged_is_named(model):
    file = model / "model.safetensors"
    index = {"weight_map": {"lm_head.weight": "b.safetensors"}}
    file.rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        GraspError, match=r"b.safetensors is missing, which model.*index.json names"
    ):
        load_model(model, dtype=None)
    (model / "b.safetensors").write_bytes(b"\x08" + bytes(7) + b"nothing!" + bytes(50))
    with pytest.raises(GraspError, match=r"b.safetensors is damaged \(Expecting"):
        load_model(model, dtype=None)


@pytest.fixture
def own_head(tmp_path):
    """Tied by its config, with another head in its weights."""
    folder = save_tiny(tmp_path / "own", tied=True)
    head = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    return with_weights(folder, lm_head__weight=head)


def test_a_head_of_its_own_is_kept_whatever_the_config_says(own_head, text, tmp_path):
    model, _ = load_model(own_head, dtype=None)
    assert not model.config.tie_word_embeddings
    assert read_header(str(own_head)).space == UnitSpace.of(model)
    options = dict(samples=8, seq_len=32, epochs=1, ffn_multiple=8)
    for layout in ("per-layer", "uniform"):
        out = tmp_path / layout
        prune(own_head, out, layout=layout, calibration=text, **options)
        stored = load_file(out / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], model.lm_head.weight)
        again, _ = load_model(out, dtype=None)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert plan(str(own_head), seq_len=32).params.before == UnitSpace.of(model).total_params


def test_a_head_that_is_stored_twice_stays_tied(tmp_path):
    folder = save_tiny(tmp_path / "twice", tied=True)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_weights(folder, lm_head__weight=embeddings.clone())
    model, _ = load_model(folder, dtype=None)
    assert model.config.tie_word_embeddings
    assert read_header(str(folder)).space == UnitSpace.of(model)


# Names that are on no disk


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, refused):
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **o: asked.append(o) or gone()
    )

    def gone():
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    assert not hub_answers()
    said = refused("plan", "org/name")
    assert "http://127.0.0.1:9 cannot be reached: set HF_ENDPOINT to a mirror" in said
    assert all(options["local_files_only"] for options in asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refused("plan", "org/name")


# Layouts: nothing is advised that is then refused


def refusals(folder: Path, **options) -> dict[str, str | None]:
    """What `plan` has against each layout, after `prune` has said the same."""
    said: dict[str, str | None] = {}
    for layout in ("per-layer", "uniform"):
        said[layout] = None
        try:
            plan(str(folder), layout=layout, seq_len=32, **options)
        except GraspError as error:
            said[layout] = str(error)
            with pytest.raises(GraspError) as again:
                prune(folder, folder / "out", layout=layout, seq_len=32, samples=4, **options)
            assert str(again.value) == said[layout]
    return said


def family_folder(monkeypatch, folder: Path, name: str, **config) -> Path:
    monkeypatch.setitem(FAMILIES, "another", (name, {"pad_token_id": 0}))
    return save_tiny(folder, "another", **config)


def test_a_class_that_ignores_head_sizes_is_sent_to_ours_or_to_whole_heads(tmp_path, monkeypatch):
    folder = family_folder(monkeypatch, tmp_path / "m", "StableLm", head_dim=8)
    said = refusals(folder, ffn_multiple=8)
    assert said["per-layer"] is None
    assert said["uniform"].endswith("use `layout='per-layer'` or `kv_multiple=4`")
    assert refusals(folder, ffn_multiple=8, kv_multiple=4)["uniform"] is None


def test_layers_that_differ_by_themselves_are_no_obstacle(tmp_path):
    """Full attention of Gemma 4 has larger heads than sliding attention."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=256)
    sizes |= dict(num_key_value_heads=2, num_hidden_layers=3, max_position_embeddings=256)
    config = transformers.Gemma4TextConfig(**sizes)
    config.save_pretrained(tmp_path)
    for layout in ("per-layer", "uniform"):
        assert plan(str(tmp_path), layout=layout, seq_len=32).channels == 3 * 96


def test_a_family_outside_of_the_table_has_both_layouts(tmp_path, monkeypatch):
    folder = family_folder(monkeypatch, tmp_path / "m", "Granite")
    assert plan(str(folder), layout="uniform", ffn_multiple=8, seq_len=32)
    assert plan(str(folder), layout="per-layer", ffn_multiple=8, seq_len=32)


def test_six_heads_of_gemma_3_are_refused_by_plan_as_by_prune(tmp_path):
    folder = save_tiny(tmp_path / "m", "gemma3_text")
    said = refusals(folder, ffn_multiple=8)
    assert said["per-layer"] is None
    assert "refuses layers of 6 query heads" in said["uniform"]
    assert said["uniform"].endswith("use `layout='per-layer'` or `kv_multiple=2`")
    assert refusals(folder, ffn_multiple=8, kv_multiple=2)["uniform"] is None


def test_a_config_alone_can_be_planned(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert plan(str(tmp_path), seq_len=32).layers == 3
