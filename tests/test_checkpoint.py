"""Pruned checkpoints: their files, the classes that load them, and the errors verify finds."""

from __future__ import annotations

import inspect
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin

import grasp
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask
from grasp.checkpoint import probe, shards
from grasp.checkpoint import save as saving
from grasp.checkpoint.save import record_of, save_checkpoint
from grasp.checkpoint.verify import verify
from grasp.compress.fold import fold_mask
from grasp.errors import GraspError
from grasp.model.classes import config_of
from grasp.model.header import of_model
from grasp.model.load import load_model
from grasp.model.units import UnitSpace
from grasp.planning.layouts import check_layout

IDS = torch.arange(3, 43).reshape(2, 20)
UNEVEN = [(7, 1), (50, 4), (96, 3)]  # (FFN channels, KV groups) of each layer
EVEN = [(40, 2)] * 3  # 4 query heads divide the hidden size 64
AWKWARD = [(40, 3)] * 3  # 6 do not


def pruned(family, widths, **options):
    """A folded model with random units left, and the mask."""
    model = tiny_model(family, **options)
    space = UnitSpace.of(model)
    generator = torch.Generator().manual_seed(1)
    keep = torch.zeros(space.size, dtype=torch.bool)
    for (_, ffn, kv), (channels, groups) in zip(space.segments(), widths, strict=True):
        for units, count in ((ffn, channels), (kv, groups)):
            chosen = torch.randperm(units.stop - units.start, generator=generator)[:count]
            keep[units.start + chosen] = True
    mask = Mask(space, keep)
    fold_mask(model, mask)
    return model, mask


def save(model, mask, folder, tokenizer=None):
    folder.mkdir()
    record = record_of(mask, model, name="tiny", seed=5)
    return save_checkpoint(model, tokenizer or tiny_tokenizer(), folder, record)[0]


def read_json(folder, name="config.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_widths_come_back_bit_equal(family, tied, tmp_path):
    model, mask = pruned(family, UNEVEN, tied=tied)
    expected = model(IDS).logits
    folder = tmp_path / "out"
    saved = save(model, mask, folder)
    assert saved.note is None and saved.architecture.startswith("Grasp")

    config = read_json(folder)
    assert config["model_type"] == f"grasp_{family}" and config["head_dim"] == 16
    assert (config["intermediate_size"], config["num_attention_heads"]) == (96, 8)
    assert config["per_layer_config"]["1"] == {
        "intermediate_size": 50,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    names = load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied
    assert names - {"lm_head.weight"} <= tiny_model(family).state_dict().keys()

    loaded, tokenizer = load_model(folder, dtype=torch.float32)
    assert type(loaded).__name__ == saved.architecture
    assert torch.equal(loaded(IDS).logits, expected)
    assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids
    assert UnitSpace.of(loaded) == UnitSpace.of(model)

    again = tmp_path / "again"  # a user saves it once more
    loaded.save_pretrained(again)
    assert (again / "modeling_grasp.py").is_file()
    assert read_json(again) == config
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(IDS).logits, expected)
    decoder = AutoModel.from_pretrained(again)  # what vLLM's transformers backend builds
    assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_caches_and_attention_backends(family, tmp_path):
    model, mask = pruned(family, UNEVEN)
    save(model, mask, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)

    def generate(model, **options):
        return model.generate(
            IDS[:, :6], attention_mask=torch.ones_like(IDS[:, :6]), do_sample=False,
            min_new_tokens=12, max_new_tokens=12, **options
        ).tolist()  # fmt: skip

    expected = generate(loaded, use_cache=False)
    assert generate(loaded) == expected
    assert generate(loaded, cache_implementation="static") == expected
    loaded.set_attn_implementation("eager")
    for layer in loaded.model.layers:
        assert layer.self_attn.config._attn_implementation == "eager"
    assert generate(loaded) == expected
    assert generate(loaded, cache_implementation="static") == expected
    model.set_attn_implementation("eager")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("length", [20, 200])
def test_longrope(length, tmp_path):
    model, mask = pruned("phi3", UNEVEN, rope_parameters=LONGROPE, hidden=128)
    save(model, mask, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 3 + length)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("rope", ["llama3", "dynamic", "yarn"])
def test_rope_scaling(rope, tmp_path):
    parameters = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "dynamic": {},
        "yarn": {},
    }[rope]
    parameters |= {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0}
    parameters["original_max_position_embeddings"] = 32
    model, mask = pruned("llama", UNEVEN, rope_parameters=parameters)
    save(model, mask, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 253).repeat(2)[None, :400]  # dynamic rope rescales beyond 256
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gradient_checkpointing_and_training(tmp_path):
    model, mask = pruned("qwen2", UNEVEN)
    save(model, mask, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    loaded.requires_grad_(True).train()
    loaded.gradient_checkpointing_enable()
    loaded(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_pruned_model_can_be_pruned_again(tmp_path):
    model, mask = pruned("qwen3", UNEVEN)
    save(model, mask, tmp_path / "once")
    once, _ = load_model(tmp_path / "once", dtype=torch.float32)
    space = UnitSpace.of(once)
    keep = torch.ones(space.size, dtype=torch.bool)
    keep[0] = False
    mask = Mask(space, keep)
    fold_mask(once, mask)
    save(once, mask, tmp_path / "twice")
    twice, _ = load_model(tmp_path / "twice", dtype=torch.float32)
    assert torch.equal(twice(IDS).logits, once(IDS).logits)
    config = read_json(tmp_path / "twice")
    assert config["intermediate_size"] == 96
    assert config["per_layer_config"]["0"]["intermediate_size"] == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_with_other_weights_can_be_saved(family, tmp_path):
    model, mask = pruned(family, UNEVEN)
    save(model, mask, tmp_path / "once")
    once, _ = load_model(tmp_path / "once", dtype=torch.float32)
    with torch.no_grad():
        for weight in once.model.layers.parameters():
            weight *= 1.01
    grasp.save(once, tiny_tokenizer(), tmp_path / "twice")
    twice, _ = load_model(tmp_path / "twice", dtype=torch.float32)
    assert type(twice) is type(once) and torch.equal(twice(IDS).logits, once(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_widths_are_a_stock_checkpoint(family, tmp_path):
    model, mask = pruned(family, EVEN)
    saved = save(model, mask, tmp_path / "out")
    assert saved.note is None and saved.architecture == type(model).__name__
    config = read_json(tmp_path / "out")
    assert config["model_type"] == family and config["intermediate_size"] == 40
    assert "auto_map" not in config and "per_layer_config" not in config
    assert not (tmp_path / "out" / "modeling_grasp.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_uniform_llama_with_awkward_heads_becomes_mistral(tmp_path):
    model, mask = pruned("llama", AWKWARD)
    saved = save(model, mask, tmp_path / "out")
    assert saved.architecture == "MistralForCausalLM"
    assert saved.note is not None and "6 query heads do not divide the hidden size 64" in saved.note
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.sliding_window is None
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_awkward_heads_with_biases_load_by_our_class(bias, tmp_path):
    model, mask = pruned("llama", AWKWARD, **{bias: True})
    save(model, mask, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("family", "options", "kv_multiple", "said"),
    [
        ("llama", {}, 1, None),
        ("llama", {"mlp_bias": True}, 1, "6 query heads do not divide the hidden size 64"),
        ("gemma2", {}, 1, "refuses layers of 6 .*not a multiple.*-layer'` or `kv_multiple=2`"),
        ("gemma2", {}, 2, None),
        ("phi3", {}, 1, None),
        ("phi3", {"rope_parameters": LONGROPE, "hidden": 128}, 1, "refuses layers of 2 .*factor"),
    ],
)
def test_widths_without_a_stock_class_are_refused_at_once(family, options, kv_multiple, said):
    model = tiny_model(family, **options)
    budget = Budget("keep", 0.5, layout="uniform", kv_multiple=kv_multiple)
    refusal = pytest.raises(GraspError, match=said) if said else nullcontext()
    with refusal:
        check_layout(of_model(model), budget)


@pytest.mark.parametrize(
    ("name", "said"),
    [("StableLm", "its class does not take"), ("Helium", "its class does not take")],
)
def test_a_class_that_sizes_heads_by_itself_is_refused_at_once(name, said, monkeypatch):
    monkeypatch.setitem(FAMILIES, "another", (name, {}))
    model = tiny_model("another", hidden=128)
    with pytest.raises(GraspError, match=said):
        check_layout(of_model(model), Budget("keep", 0.5, layout="uniform"))


@pytest.mark.parametrize("name", ["Glm4", "Granite", "Cohere2"])
def test_another_family_is_known_by_its_structure(name, tmp_path, monkeypatch):
    """GLM-4, for one, has a fused gate_up_proj beside separate q, k and v."""
    monkeypatch.setitem(FAMILIES, "another", (name, {"pad_token_id": 2}))
    model = tiny_model("another")
    check_layout(of_model(model), Budget("keep", 0.5, layout="uniform"))
    model, mask = pruned("another", EVEN)
    assert save(model, mask, tmp_path / "out").architecture == f"{name}ForCausalLM"
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_llama_biases_survive_per_layer(tmp_path):
    model, mask = pruned("llama", UNEVEN, attention_bias=True, mlp_bias=True)
    save(model, mask, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_family_outside_the_list_gets_a_per_layer_class():
    model, _ = pruned("llama", UNEVEN)
    config = {**model.config.to_dict(), "model_type": "smollm3"}
    assert config_of(config, UnitSpace.of(model))[0].model_type == "grasp_smollm3"
    whole = UnitSpace.of(tiny_model("llama"))
    assert config_of(config, whole)[0].model_type == "smollm3"


def test_shards(tmp_path, monkeypatch):
    model, mask = pruned("llama", UNEVEN)
    monkeypatch.setattr(saving, "SHARD_BYTES", 100_000)
    saved = save(model, mask, tmp_path / "out")
    index = read_json(tmp_path / "out", "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == saved.weight_bytes
    assert len(set(index["weight_map"].values())) > 1
    loaded, _ = load_model(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_who_reads_the_config_reads_the_weights(checkpoint):
    assert len({file.stat().st_mode for file in checkpoint.glob("*.*")}) == 1


@pytest.mark.parametrize("found", ["another token", "no cache"])
def test_verify_generates_with_a_cache_and_without(checkpoint, one_way, monkeypatch, found):
    load, generate, asked = probe.load_and_compare, GenerationMixin.generate, []

    def changed(*of):
        return load(*of) | {"uncached": [0]}

    def seen(*args, **options):
        asked.append(options["use_cache"])
        return generate(*args, **options)

    if found == "another token":
        monkeypatch.setattr(probe, "load_and_compare", changed)
        assert failures(verify(checkpoint)).keys() == {"generate with import grasp"}
    else:
        monkeypatch.setattr(GenerationMixin, "generate", seen)
        assert verify(checkpoint).passed and asked == [True, False]


def test_weights_that_come_one_by_one_fill_file_after_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    writer, tensors = shards.ShardWriter(tmp_path), {f"w{n}": torch.rand(12) for n in range(5)}
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    writer.close()
    index = read_json(tmp_path, "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 5 * 48
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    found = {name: t for file in files for name, t in load_file(tmp_path / file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_disk_full(tmp_path, monkeypatch):
    model, mask = pruned("llama", UNEVEN)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(GraspError, match=r"cannot write .*No space left.*need [\d,]+ bytes"):
        save(model, mask, tmp_path / "out")


def test_kept_indices_must_describe_the_weights(tmp_path):
    model, mask = pruned("llama", UNEVEN)
    with pytest.raises(ValueError, match="does not describe the widths"):
        save(model, Mask(mask.space, ~mask.keep), tmp_path / "out")


# --- verify: each process costs seconds, so few are started ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "out"
    save(*pruned("qwen2", UNEVEN, tied=True, dtype=torch.bfloat16), folder)
    return folder


def failures(report):
    return {check.name: check.detail for check in report.checks if not check.passed}


@pytest.fixture
def one_way(monkeypatch):
    """Load only with grasp, and in this process: tampering is seen the same way in every other."""
    import grasp.checkpoint.verify as module

    def here(folder, way):
        threads = torch.get_num_threads()
        try:
            return probe.load_and_compare(str(folder), way)
        except Exception as error:
            return {"error": str(error)}
        finally:
            torch.set_num_threads(threads)

    check = module._check_loaded
    monkeypatch.setattr(module, "_in_fresh_process", here)
    monkeypatch.setattr(module, "_check_loaded", lambda *a: check(*a) if a[2] == "grasp" else [])


def test_verify_both_ways_in_fresh_processes(checkpoint):
    report = verify(checkpoint)
    assert report.passed, failures(report)
    assert [check.name for check in report.checks] == [
        "files",
        "tensors",
        *(
            f"{check} {way}"
            for way in ("with import grasp", "without grasp")
            for check in ("loads", "widths", "parameters", "logits", "tokenizer", "generate")
        ),
    ]
    details = {check.name: check.detail for check in report.checks}
    assert "bit-equal" in details["logits without grasp"]


def test_verify_a_stock_checkpoint(tmp_path):
    save(*pruned("phi3", EVEN), tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.passed, failures(report)
    details = {check.name: check.detail for check in report.checks}
    assert details["loads as the stock class"] == "modeling_phi3.Phi3ForCausalLM"


def tampered(checkpoint, tmp_path, change):
    folder = tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_verify_names_changed_weights(checkpoint, tmp_path, one_way):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5

    failed = failures(verify(tampered(checkpoint, tmp_path, change)))
    assert failed.keys() == {"files", "logits with import grasp"}
    assert "not as written: model.safetensors" in failed["files"]


def test_verify_names_weights_that_no_logit_shows(checkpoint, tmp_path, one_way):
    probe = load_file(checkpoint / "verify" / "probe.safetensors")["input_ids"]
    unseen = next(i for i in range(256) if i not in probe)

    def change(tensors):
        tensors["model.embed_tokens.weight"][unseen] = tensors["model.embed_tokens.weight"][
            unseen
        ].roll(1)

    assert "files" in failures(verify(tampered(checkpoint, tmp_path, change)))


def test_verify_names_tensors_that_are_not_finite(checkpoint, tmp_path, one_way):
    def change(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    failed = failures(verify(tampered(checkpoint, tmp_path, change)))
    assert failed["tensors"] == "model.norm.weight in model.safetensors is not finite"
    assert "logits with import grasp" in failed


def test_verify_names_logits_that_are_not_finite(tmp_path, one_way):
    """Of weights that are."""
    model, mask = pruned("llama", UNEVEN, dtype=torch.float16)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(300)
        layer.mlp.gate_proj.weight.mul_(300)
    save(model, mask, tmp_path / "out")
    assert failures(verify(tmp_path / "out")) == {
        "logits with import grasp": "not finite in torch.float16: store the model in bf16 or fp32 "
        "first"
    }


def test_verify_names_a_missing_or_another_tokenizer(checkpoint, tmp_path, one_way):
    folder = shutil.copytree(checkpoint, tmp_path / "out")
    tokens = read_json(folder, "tokenizer.json")
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    name = "tokenizer with import grasp"
    assert failures(verify(folder)) == {name: "a text's tokens are not as written"}
    for file in folder.glob("tokenizer*"):
        file.unlink()
    said = failures(verify(folder))["loads with import grasp"]
    assert "Couldn't instantiate the backend tokenizer" in said and said.endswith("a fast one.")


def test_the_source_that_verify_runs_is_ascii():
    assert inspect.getsource(probe).isascii()


def test_verify_passes_a_probe_of_an_older_release(checkpoint, tmp_path, one_way):
    folder = shutil.copytree(checkpoint, tmp_path / "out")
    file = folder / "verify" / "probe.safetensors"
    probe = load_file(file)
    del probe["text_ids"]
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["text"]
    save_file(probe, file, metadata=metadata)
    assert verify(folder).passed


def test_verify_names_missing_and_truncated_weights(checkpoint, tmp_path, one_way):
    folder = tampered(checkpoint, tmp_path, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    assert "missing_keys" in failures(verify(folder))["loads with import grasp"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])
    assert failures(verify(folder)).keys() == {"files", "tensors", "loads with import grasp"}
    weights.unlink()
    assert failures(verify(folder)).keys() == {"files", "tensors", "loads with import grasp"}


def test_verify_compares_with_grasp_json(checkpoint, tmp_path, one_way):
    folder = tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    summary = read_json(folder, "grasp.json")
    summary["params"]["total_after"] += 1
    summary["kept"][1]["ffn"].pop()
    (folder / "grasp.json").write_text(json.dumps(summary))
    failed = failures(verify(folder))
    assert failed.keys() == {"parameters with import grasp", "widths with import grasp"}
    assert failed["widths with import grasp"] == "layers [1] differ from grasp.json"


def test_verify_does_not_run_foreign_code(checkpoint, tmp_path, one_way):
    folder = tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    with (folder / "modeling_grasp.py").open("a") as file:
        file.write("\nraise SystemExit('ran')\n")
    failed = failures(verify(folder))
    assert failed.keys() == {"loads without grasp"}
    assert "was not run" in failed["loads without grasp"]


def test_verify_elsewhere_allows_for_rounding(checkpoint, tmp_path, one_way, monkeypatch):
    monkeypatch.setattr("grasp.model.load.processor", lambda device: "another processor")
    detail = {check.name: check.detail for check in verify(checkpoint).checks}
    assert "differ by 0.0e+00 (limit 5e-02)" in detail["logits with import grasp"]


def test_verify_uses_a_gpu_that_can_hold_the_model_in_fp32(checkpoint, one_way, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(1) or (1000, 10**9))
    environment = probe.Probe.read(checkpoint).environment | {"device": "cuda"}
    with_gpu = probe.Probe.read
    monkeypatch.setattr(
        probe.Probe,
        "read",
        classmethod(lambda _, folder: replace(with_gpu(folder), environment=environment)),
    )
    assert verify(checkpoint).passed and asked


def test_verify_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(GraspError, match=r"not a grasp checkpoint: it has no grasp\.json"):
        verify(tmp_path / "nowhere")
    folder = save_tiny(tmp_path / "stock")
    with pytest.raises(GraspError, match=r"it has no grasp\.json"):
        verify(folder)
    (folder / "grasp.json").write_text("{")
    with pytest.raises(GraspError, match=r"grasp\.json: "):
        verify(folder)
    (folder / "grasp.json").write_text("{}")
    with pytest.raises(GraspError, match=r"grasp\.json: format None, and this release reads 1"):
        verify(folder)
    (folder / "grasp.json").write_text('{"format": 1}')
    with pytest.raises(GraspError, match=r"missing .*'kept'"):
        verify(folder)


def test_tokenizer_is_saved(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
