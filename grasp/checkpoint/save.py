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
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grasp.checkpoint.probe import TEXT, Probe
from grasp.errors import GraspError, reason
from grasp.model.classes import as_saved, without_weights
from grasp.model.load import processor, quiet
from grasp.model.units import UnitSpace


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


def try_saving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, space: UnitSpace
) -> None:
    """Find out before the long work whether a result can be saved, and read again.

    Writes `model` in the widths of `space`, without weights, into the new `folder`, which it
    removes. Raises GraspError: what cannot be written or read, a tokenizer that comes back as
    another, logits of `model` in its own dtype that are not finite.
    """
    target, _ = without_weights(model, space)
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
