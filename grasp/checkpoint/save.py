"""Write a pruned model as a Hugging Face folder.

Layers of different widths are saved as one of the classes in modeling_grasp.py, which is copied
beside the weights. Layers of equal widths are saved as a stock class, without grasp's code.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from grasp import __version__, distributed
from grasp.budget.projection import Mask
from grasp.checkpoint.probe import TEXT, Probe
from grasp.checkpoint.record import Record, sha256
from grasp.checkpoint.shards import SHARD_BYTES
from grasp.checkpoint.verify import check_saved, not_finite
from grasp.errors import GraspError, reason
from grasp.machine import new_beside, readable
from grasp.model.classes import as_saved, without_weights
from grasp.model.load import environment, load_model, quiet, usual_attention
from grasp.model.places import places_of
from grasp.model.source import copy_processor
from grasp.model.units import LayerUnits, UnitSpace


@dataclass(frozen=True)
class Saved:
    """The result of saving: the class that loads the folder, and the bytes of its weights.

    `note` says why the class is not the model's own (None: it is).
    """

    architecture: str
    weight_bytes: int
    note: str | None


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    mask: Mask | None = None,
    seed: int = 0,
) -> Record:
    """Write a folded model as a checkpoint that passes `grasp verify`; it is complete or absent.

    With `mask`, grasp.json also records the original widths and the kept units. `seed` draws the
    tokens of the probe. Raises GraspError if the folder exists, the disk is full, no class can
    express the widths, or the checkpoint would fail `grasp verify`.
    """
    out = Path(folder)
    if os.path.lexists(out):
        raise GraspError(f"{out} exists already: choose another folder or remove it first")
    if mask is None:
        space = UnitSpace.of(model)
        mask = Mask.first(space, space)
    record = record_of(mask, model, name=model.name_or_path or type(model).__name__, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_beside(out) as beside, _as_loaded(model):
        beside.mkdir()
        _, record = save_checkpoint(model, tokenizer, beside, record)
        reread, read_tokenizer = load_model(beside, dtype=None, device=places_of(model))
        check_saved(beside, reread, read_tokenizer)
    return record


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """The model computes as it does once it is loaded: in eval mode, with the same attention."""
    training, attention = model.training, model.config._attn_implementation
    model.eval().set_attn_implementation(usual_attention(model))
    try:
        yield
    finally:
        model.train(training).set_attn_implementation(attention)


def record_of(mask: Mask, model: PreTrainedModel, *, name: str, seed: int, **more: Any) -> Record:
    """Build the record of the folded `model`, loaded as `name`; `more` are further fields."""
    before, after = mask.space, mask.pruned_space()
    found = UnitSpace.of(model)
    if [_widths(layer) for layer in found.layers] != [_widths(layer) for layer in after.layers]:
        raise ValueError("the mask does not describe the widths of this model")
    return Record(
        grasp_version=__version__,
        model=name,
        seed=seed,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        params={
            "prunable_before": before.prunable_params,
            "prunable_after": after.prunable_params,
            "total_before": before.total_params,
            "total_after": found.total_params,  # including added biases
        },
        kv_cache_bytes_per_token={
            "before": before.kv_cache_bytes_per_token(),
            "after": after.kv_cache_bytes_per_token(),
        },
        widths={
            "before": [_widths(layer) for layer in before.layers],
            "after": [_widths(layer) for layer in after.layers],
        },
        mask_sha256=mask.digest(),
        kept=_kept(mask),
        **{"recipe": {}, **more},
    )


def _kept(mask: Mask) -> list[dict[str, list[int]]]:
    kept = [{"ffn": ffn.tolist(), "kv": kv.tolist()} for ffn, kv in mask.layers()]
    if not mask.space.experts:
        return kept
    experts = zip(kept, mask.experts(), strict=True)
    return [{**layer, "experts": own.tolist()} for layer, own in experts]


def _widths(layer: LayerUnits) -> list[int]:
    return [layer.ffn, layer.kv_groups, *([layer.experts] if layer.experts else [])]


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Record,
) -> tuple[Saved, Record]:
    """Write weights, tokenizer, configs, probe and grasp.json into `folder`, which must exist.

    `model` is the folded model: its own class, config and names, with smaller weights, in the dtype
    to save. Returns the record with the hashes of the weights. The caller renames the folder into
    place. Raises GraspError if the disk is full or no class can express the widths.
    """
    target, note = as_saved(model, UnitSpace.of(model))
    weights = dict(target.named_parameters())  # tied tensors once
    weight_bytes = sum(w.numel() * w.element_size() for w in weights.values())
    try:
        write_pretrained(target, tokenizer, folder)
        if model.config.get_text_config() is not model.config and model.name_or_path:
            copy_processor(model.name_or_path, folder)
        probe = Probe.of(model, tokenizer, environment(model.device), record.seed)
        record = seal(folder, probe, record)
    except (OSError, SafetensorError) as error:
        raise GraspError(
            f"cannot write {folder}: {error} (the weights need {weight_bytes:,} bytes)"
        ) from error
    return Saved(type(target).__name__, weight_bytes, note), record


def seal(folder: Path, probe: Probe, record: Record) -> Record:
    """Write the probe, and grasp.json with the hashes of the weights; returns that record."""
    probe.write(folder)
    readable(folder)
    hashes = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    record = replace(record, sha256=hashes)
    record.write(folder)
    return record


def try_saving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, space: UnitSpace
) -> None:
    """Check, before the long work, that a result can be saved and read again.

    Writes `model` with the widths of `space`, without weights, to a new `folder`, then removes it.
    Raises GraspError if files cannot be written or read, the tokenizer changes when it is read
    back, or the logits of `model` in its own dtype are not finite.
    """
    distributed.from_first(lambda: _try_writing(model, tokenizer, folder, space))
    logits = Probe.of(model, tokenizer, environment(model.device)).logits
    if not logits.isfinite().all():
        raise GraspError(f"the model's logits are {not_finite(str(logits.dtype))}")


def _try_writing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, space: UnitSpace
) -> None:
    target, _ = without_weights(model, space)
    try:
        tokens = tokenizer(TEXT).input_ids
        write_pretrained(target, tokenizer, folder, state_dict={})
        AutoConfig.from_pretrained(folder)
        same = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == tokens
    except Exception as error:  # configs and tokenizers fail in many ways
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


def write_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any
) -> None:
    """Write the files of transformers: weights, config, generation config, tokenizer, our classes.

    `options` are passed to `save_pretrained`. The generation config is written as it was read,
    since `save_pretrained` refuses some that load, such as a temperature without sampling or beam
    flags without beams.
    """
    as_read, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, max_shard_size=SHARD_BYTES, **options)
            tokenizer.save_pretrained(folder)
    finally:
        model.generation_config = as_read
    as_read.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
