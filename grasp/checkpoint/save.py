"""Write a pruned model as a Hugging Face folder.

Layers of different widths are saved as one of the classes in modeling_grasp.py, which is copied
beside the weights. Equal widths need nothing of ours: they are saved as a stock class.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grasp.budget.budget import Budget
from grasp.checkpoint.probe import TEXT, Probe
from grasp.errors import GraspError, reason
from grasp.model.load import processor, quiet
from grasp.model.modeling_grasp import FAMILIES
from grasp.model.units import LayerUnits, UnitSpace

# Config keys that a class or save_pretrained sets anew.
_WRITTEN_ANEW = (
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "per_layer_config",
    "serialize_explicit_per_layer_config",
    "transformers_version",
)


@dataclass(frozen=True)
class Saved:
    """What was written: the class that loads it, the bytes of its weights, and why another class
    than the model's own was taken (None when its own was)."""

    architecture: str
    weight_bytes: int
    note: str | None


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    kept: Sequence[tuple[list[int], list[int]]],
    grasp_json: dict[str, Any],
    max_shard_size: str = "5GB",
) -> Saved:
    """Write weights, tokenizer, configs, grasp.json and probe into `folder`.

    `model` is the folded model: its own class, config and names, with smaller weights, in the dtype
    to save. `kept` holds the (FFN channels, KV groups) of each layer by their original indices and
    becomes `kept` in grasp.json. The folder must exist; renaming it into place is the caller's.
    Raises GraspError: no room, or widths that no class can express.
    """
    space = UnitSpace.of(model)
    grasp_json = {**grasp_json, "kept": [{"ffn": ffn, "kv": kv} for ffn, kv in kept]}
    widths = [(len(ffn), len(kv)) for ffn, kv in kept]
    if widths != [(layer.ffn, layer.kv_groups) for layer in space.layers]:
        raise ValueError("the kept indices do not describe this model's widths")

    target, note = as_saved(model, space)
    weights = dict(target.named_parameters())  # tied tensors once
    weight_bytes = sum(w.numel() * w.element_size() for w in weights.values())
    try:
        write_pretrained(target, tokenizer, folder, max_shard_size=max_shard_size)
        seed = int(grasp_json.get("seed", 0))
        Probe.of(model, tokenizer, environment(model.device), seed).write(folder)
        for path in folder.rglob("*.safetensors"):  # some releases write them for the owner alone
            path.chmod((folder / "config.json").stat().st_mode)
        hashes = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        write_json(folder / "grasp.json", {**grasp_json, "sha256": hashes})
    except (OSError, SafetensorError) as error:
        raise GraspError(
            f"cannot write {folder}: {error} (the weights need {weight_bytes:,} bytes)"
        ) from error
    return Saved(type(target).__name__, weight_bytes, note)


def as_saved(model: PreTrainedModel, space: UnitSpace) -> tuple[PreTrainedModel, str | None]:
    """The model as the class that will load it, sharing the weights; and why, if not its own."""
    target, note = _empty(model, space)
    target.load_state_dict(model.state_dict(), assign=True)
    target.tie_weights()
    return target, note


def _empty(model: PreTrainedModel, space: UnitSpace) -> tuple[PreTrainedModel, str | None]:
    """`model` in the widths of `space` as the class that will load it, on the meta device."""
    config, note = _config(model.config, space)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    target.generation_config = model.generation_config
    return target, note


def try_saving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, space: UnitSpace
) -> None:
    """Find out before the long work whether a result can be saved, and read again.

    Writes `model` in the widths of `space`, without weights, into the new `folder`, which it
    removes. Raises GraspError: what cannot be written or read, a tokenizer that comes back as
    another, logits of `model` in its own dtype that are not finite.
    """
    target, _ = _empty(model, space)
    try:
        tokens = tokenizer(TEXT).input_ids
        write_pretrained(target, tokenizer, folder, state_dict={})
        AutoConfig.from_pretrained(folder)
        same = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == tokens
    except Exception as error:  # configs and tokenizers fail in as many ways
        raise GraspError(
            f"cannot write {folder} as a result will be (nothing is computed yet): {reason(error)}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not same:
        raise GraspError(
            "the tokenizer gives other tokens once it is saved and read again by transformers "
            f"{transformers.__version__}: repair its files first"
        )
    logits = Probe.of(model, tokenizer, environment(model.device)).logits
    if not logits.isfinite().all():
        raise GraspError(
            f"the model's logits are not finite in {logits.dtype}, in which it is stored: store it "
            "in bf16 or fp32 first"
        )


def check_layout(config: PreTrainedConfig, space: UnitSpace, budget: Budget) -> None:
    """Raises GraspError if some widths that `budget` allows have no class to be saved as."""
    if budget.layout == "per-layer":
        _own_classes(_family(config))
        return
    for groups in range(budget.kv_multiple, space.layers[0].kv_groups + 1, budget.kv_multiple):
        _config(config, space.resized([(layer.ffn, groups) for layer in space.layers]))
    least = space.resized([(budget.ffn_multiple, budget.kv_multiple)] * len(space.layers))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(config, least)[0])
    made = UnitSpace.of(model).layers
    if any(
        (_widths(a), a.head_dim) != (_widths(b), b.head_dim)
        for a, b in zip(made, least.layers, strict=True)
    ):
        raise GraspError(f"{type(model).__name__} does not take the widths that its config names")


def _family(config: PreTrainedConfig) -> str:
    return config.model_type.removeprefix("grasp_")  # a pruned model may be pruned again


def _config(config: PreTrainedConfig, space: UnitSpace) -> tuple[PreTrainedConfig, str | None]:
    """A config of the class that can express the widths of `space`, and why, if not its own."""
    family = _family(config)
    values = {k: v for k, v in config.to_dict().items() if k not in _WRITTEN_ANEW}
    values["head_dim"] = space.layers[0].head_dim
    widths = [_widths(layer) for layer in space.layers]
    if all(layer == widths[0] for layer in widths):
        values |= widths[0]
        if family == "llama" and values["hidden_size"] % values["num_attention_heads"]:
            return _mistral_config(values)
        try:
            return CONFIG_MAPPING[family](**values), None
        except StrictDataclassError as error:  # a rule on head counts
            reason = str(error.__cause__ or error)
            raise GraspError(
                f"{family} takes no layers of {values['num_attention_heads']} query heads "
                f"({reason}): use --layout per-layer, or a --kv-multiple that avoids them"
            ) from None

    classes = _own_classes(family)
    config_class: Any = classes[0]
    auto_names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    auto_map = {a: f"modeling_grasp.{c.__name__}" for a, c in zip(auto_names, classes, strict=True)}
    return (
        config_class(
            **values,
            per_layer_config=dict(enumerate(widths)),
            serialize_explicit_per_layer_config=True,  # all three widths of every layer
            auto_map=auto_map,
        ),
        None,
    )


def _own_classes(family: str) -> tuple[Any, Any, Any]:
    if family not in FAMILIES:
        raise GraspError(
            f"{family} has no class with per-layer widths (there are {', '.join(FAMILIES)}): "
            "use --layout uniform"
        )
    return FAMILIES[family]


def _widths(layer: LayerUnits) -> dict[str, int]:
    return {
        "intermediate_size": layer.ffn,
        "num_attention_heads": layer.kv_groups * layer.group_size,
        "num_key_value_heads": layer.kv_groups,
    }


def _mistral_config(values: dict[str, Any]) -> tuple[PreTrainedConfig, str]:
    """Llama's config class wants heads that divide the hidden size; Mistral's is the same decoder
    without that rule, and without biases."""
    heads = values["num_attention_heads"]
    rule = f"{heads} query heads do not divide the hidden size {values['hidden_size']}"
    if values.pop("attention_bias") or values.pop("mlp_bias"):
        raise GraspError(
            f"{rule}, which LlamaConfig demands, and no other stock class has its biases: "
            "use --layout per-layer"
        )
    values.pop("pretraining_tp", None)
    config = MistralConfig(**values, sliding_window=None)
    return config, f"{rule}, which LlamaConfig demands: saved as the equivalent Mistral class"


def write_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any
) -> None:
    """The files of transformers: weights, config, generation config, tokenizer, our classes.

    `options` are those of `save_pretrained`. The generation config is written as it was read: that
    method refuses some that can be read, a temperature without sampling or beam flags without
    beams, say.
    """
    as_read, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, **options)
            tokenizer.save_pretrained(folder)
    finally:
        model.generation_config = as_read
    as_read.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def environment(device: torch.device) -> dict[str, str]:
    """What has to be the same for two runs of one model to agree bit for bit."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "processor": processor(device),
        "threads": str(torch.get_num_threads()),
    }


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One line per top-level key: the kept indices would otherwise take one line each."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
