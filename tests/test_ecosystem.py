"""Typical uses of a checkpoint, in the libraries that people use for them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from huggingface_hub import HfApi, ModelCard
from test_checkpoint import IDS, UNEVEN, pruned, save
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TorchAoConfig,
    pipeline,
)

import grasp

PROMPTS = ["the stone moves", "under every house a light"]


@pytest.fixture(scope="module")
def model():
    """The pruned model, as it was in memory."""
    return pruned("llama", UNEVEN)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecosystem") / "out"
    save(*model, folder)
    return folder


@pytest.fixture(scope="module")
def logits(model):
    return model[0](IDS).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_beam_search(model, checkpoint):
    """Its cache is reordered layer by layer."""
    options = dict(attention_mask=torch.ones_like(IDS), num_beams=3, do_sample=False)
    options |= dict(min_new_tokens=8, max_new_tokens=8)
    expected = model[0].generate(IDS, **options)
    assert torch.equal(load(checkpoint).generate(IDS, **options), expected)


def test_pipeline(model, checkpoint):
    write = pipeline("text-generation", model=str(checkpoint))
    together = write(PROMPTS, batch_size=2, max_new_tokens=6, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt, (answer,) in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model[0].generate(**ids, max_new_tokens=6, do_sample=False)[0]
        assert answer["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.parametrize("how", ["auto", "small", "explicit"])
def test_device_maps(how, model, checkpoint, logits, tmp_path):
    options = {"device_map": "auto", "offload_folder": tmp_path}
    if how == "small":
        options["max_memory"] = {"cpu": 400_000}
    if how == "explicit":
        names = [*dict(model[0].model.named_children()).keys() - {"layers"}]
        places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
        layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
        options["device_map"] = places | layers
    loaded = load(checkpoint, **options)
    offloaded = {n for n, p in loaded.named_parameters() if p.device.type == "meta"}
    assert bool(offloaded) == (how != "auto")
    assert torch.equal(loaded(IDS).logits, logits)


def test_accelerate_keeps_layers_whole(checkpoint, logits, tmp_path):
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    device_map = infer_auto_device_map(
        empty, {"cpu": 400_000, "disk": 10**9}, no_split_module_classes=empty._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not [name for name in device_map if "self_attn" in name or "mlp" in name]
    loaded = load_checkpoint_and_dispatch(
        empty, checkpoint, device_map=device_map, offload_folder=tmp_path
    )
    assert torch.equal(loaded(IDS).logits, logits)


def test_lora(checkpoint, logits, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    tuned = peft.get_peft_model(load(checkpoint), config)
    learning = [p for p in tuned.parameters() if p.requires_grad]
    assert len(learning) == 2 * 7 * len(UNEVEN)
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = tuned(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[2] < losses[0] - 0.1
    learned = tuned(IDS).logits

    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, learned)

    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reloaded = load(tmp_path / "merged")
    assert torch.equal(reloaded(IDS).logits, merged(IDS).logits)
    assert torch.allclose(reloaded(IDS).logits, learned, atol=1e-4)
    assert (tmp_path / "merged" / "modeling_grasp.py").is_file()
    assert not torch.allclose(learned, logits, atol=0.1)


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_int8(library, checkpoint, logits):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    quantized = load(checkpoint, quantization_config=config)
    error = ((quantized(IDS).logits.float() - logits).norm() / logits.norm()).item()
    assert 0 < error < 0.05


# --- a model hub, which no test reaches ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that commits end in, without a network."""
    folder = tmp_path / "hub"

    def create_commit(self, repo_id, operations, **_options):
        for operation in operations:
            target = folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as source:
                target.write_bytes(source.read())

    replaced = {
        "create_repo": lambda self, name, **_: SimpleNamespace(repo_id=name),
        "create_commit": create_commit,
        "_validate_yaml": lambda self, content, **_: ModelCard(content).data["tags"],
    }
    for name, function in replaced.items():
        monkeypatch.setattr(HfApi, name, function)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr(ModelCard, "load", lambda name, **_: ModelCard(""))
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WITHOUT_GRASP = """
import sys
sys.modules["grasp"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, again = sys.argv[1:]
write = pipeline("text-generation", model=folder, trust_remote_code=True)
print(write("the stone", max_new_tokens=6, do_sample=False)[0]["generated_text"].encode())
write.model.save_pretrained(again)
saved = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
ids = torch.arange(40).reshape(2, 20)
assert torch.equal(saved(ids).logits, write.model(ids).logits)
"""


def test_an_uploaded_folder_runs_without_grasp(tiny, text, hub, tmp_path):
    out = tmp_path / "out"
    options = dict(method="random", scale_epochs=0, samples=8, seq_len=32, eval_windows=1)
    grasp.prune(tiny, out, calibration=text, device="cpu", **options)
    HfApi().upload_folder(repo_id="someone/small", folder_path=out)
    assert files(hub) == files(out) >= {"modeling_grasp.py", "README.md", "model.safetensors"}

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GRASP, hub, tmp_path / "again"],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "modeling_grasp.py" in files(tmp_path / "again")
    write = pipeline("text-generation", model=str(out))
    expected = write("the stone", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert done.stdout.strip() == str(expected.encode())


def test_push_to_hub(checkpoint, hub, logits):
    """What loads it, and neither grasp.json nor the card: those go with the folder."""
    load(checkpoint).push_to_hub("someone/small")
    AutoTokenizer.from_pretrained(checkpoint).push_to_hub("someone/small")
    needed = {"config.json", "model.safetensors", "modeling_grasp.py", "tokenizer.json"}
    assert needed <= files(hub) and "grasp.json" not in files(hub)
    assert torch.equal(load(hub)(IDS).logits, logits)
