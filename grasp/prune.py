"""The main job from end to end: text and model in, a smaller dense checkpoint out."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from grasp.budget import Budget, Layout
from grasp.calibrate import learn_scales
from grasp.checkpoint.hf import save_checkpoint
from grasp.config import PruneConfig
from grasp.data import Corpus, read_corpus, sample_corpus, token_blocks, unused_text
from grasp.errors import GraspError
from grasp.evaluate import perplexity
from grasp.fold import fold_mask, fold_scales
from grasp.models import load_model, pick_device
from grasp.projection import Mask, Projection
from grasp.report import model_card, plot_layers
from grasp.run import Run, Show, disk_errors, open_run
from grasp.select import select
from grasp.training import TrainSettings
from grasp.units import UnitSpace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PruneResult:
    """What `prune` made. `summary` is the content of the checkpoint's grasp.json."""

    folder: Path
    mask: Mask
    summary: dict[str, Any]


def prune(
    model: str,
    out: str | Path,
    *,
    keep: float | None = None,
    params: float | None = None,
    kv_cache: float | None = None,
    ffn_multiple: int = 32,
    kv_multiple: int = 1,
    layout: Layout = "per-layer",
    as_published: bool = False,
    show: Show = lambda record: None,
    **options: Any,
) -> PruneResult:
    """Select, calibrate, fold, save, evaluate. The folder `out` is complete or absent.

    `keep` (default 0.5), `params` or `kv_cache` is the budget (see `Budget`); `options` are the
    other fields of `PruneConfig`; `as_published` sets those that the paper sets. Interrupted at any
    moment, the same call resumes and ends in the same mask. `show` receives each log record.
    Raises GraspError.
    """
    budget = Budget.of(
        keep=keep,
        params=params,
        kv_cache=kv_cache,
        ffn_multiple=ffn_multiple,
        kv_multiple=kv_multiple,
        layout=layout,
    )
    config = _concrete(PruneConfig(model, budget, **options))
    if as_published:
        config = config.as_published()
    try:
        with open_run(Path(out), config.to_json(), show) as run:
            return _prune(config, run)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(config, error) from None
    except RuntimeError as error:
        if "allocate memory" in str(error):  # the CPU allocator's own words
            raise _out_of_memory(config, error) from None
        raise


def _prune(config: PruneConfig, run: Run) -> PruneResult:
    model, tokenizer = _load(config)
    corpus = _calibration_text(config, model, tokenizer, run)
    picked = {"seq_len": config.seq_len, "samples": config.samples, "seed": config.seed}
    blocks = token_blocks(corpus, **picked)
    space = UnitSpace.of(model)
    projection = Projection(space, config.budget, seed=config.seed, device=config.device)

    score = _evaluation(config, corpus, tokenizer, picked)
    dense = run.remember("dense", lambda: score and score(model, "dense", run))
    model.to(DTYPES[config.dtype])
    mask = projection.mask(select(model, projection, blocks, config, run.stage))
    fold_mask(model, mask)
    if config.scale_epochs:
        settings = TrainSettings(
            config.scale_epochs, config.batch_size, config.accumulate, seed=config.seed
        )
        fold_scales(model, learn_scales(model, blocks, settings, run.stage("calibrate")))

    pruned_space = mask.pruned_space()
    summary = {
        "format": 1,
        "grasp_version": version("grasp"),
        "model": config.model,
        "recipe": config.to_json(),
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "calibration": corpus.to_json(),
        "budget": {
            "kind": config.budget.kind,
            "asked": config.budget.asked,
            "limit": projection.limit,
            "obtained": config.budget.cost(pruned_space),
            "of": config.budget.cost(space),
        },
        "params": {
            "prunable_before": space.prunable_params,
            "prunable_after": pruned_space.prunable_params,
            "total_before": space.total_params,
            "total_after": pruned_space.total_params,
        },
        "kv_cache_bytes_per_token": {
            "before": space.kv_cache_bytes_per_token(),
            "after": pruned_space.kv_cache_bytes_per_token(),
        },
        "widths": {
            "before": [[layer.ffn, layer.kv_groups] for layer in space.layers],
            "after": [[layer.ffn, layer.kv_groups] for layer in pruned_space.layers],
        },
        "mask_sha256": mask.digest(),
        "results": {},
    }
    kept = [(ffn.tolist(), kv.tolist()) for ffn, kv in mask.layers()]
    run.checkpoint.mkdir()
    saved = save_checkpoint(
        model, tokenizer, run.checkpoint, kept=kept, grasp_json=summary, card=model_card(summary)
    )
    if saved.note:
        run.log(event="note", text=saved.note)
    del model
    gc.collect()

    after = None
    if score:
        reread, _ = load_model(run.checkpoint, dtype=torch.float32, device=config.device)
        after = score(reread, "pruned", run)
    summary["results"] = {
        "dense": dense,
        "pruned": after,
        "seconds": round(time.time() - run.records()[0]["time"], 1),
        "architecture": saved.architecture,
        "weight_bytes": saved.weight_bytes,
        "note": saved.note,
    }
    _add_results(run.checkpoint, summary)
    run.log(event="finished", folder=str(run.out), **summary["results"])
    run.publish()
    return PruneResult(run.out, mask, summary)


def _concrete(config: PruneConfig) -> PruneConfig:
    """bf16 on a GPU; fp32 on a CPU, where bf16 without instructions for it is 5 times slower."""
    device = pick_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    return replace(config, device=device, dtype=dtype)


def _load(config: PruneConfig) -> tuple[PreTrainedModel, Any]:
    # fp32 first: the dense model is evaluated in it
    return load_model(
        config.model,
        dtype=torch.float32,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _calibration_text(
    config: PruneConfig, model: PreTrainedModel, tokenizer: Any, run: Run
) -> Corpus:
    if config.calibration != "self":
        return read_corpus(config.calibration, tokenizer, text_field=config.text_field)
    done = run.stage("self").load()
    if done is None:
        corpus = sample_corpus(
            model,
            tokenizer,
            samples=config.samples,
            seq_len=config.seq_len,
            seed=config.seed,
            progress=lambda n, total: run.log(stage="self", step=n, steps=total),
        )
        run.stage("self").save(lambda: {"ids": corpus.ids}, final=True)
        return corpus
    return Corpus.written_by_model(done["ids"])


Score = Callable[[PreTrainedModel, str, Run], dict[str, Any]]


def _evaluation(
    config: PruneConfig, corpus: Corpus, tokenizer: Any, picked: dict[str, int]
) -> Score | None:
    """How both models will be measured; None where there is no text left to measure on."""
    if config.eval_text:
        text: Corpus | None = read_corpus(config.eval_text, tokenizer, split="test")
        seq_len = config.eval_seq_len
    else:
        text, seq_len = unused_text(corpus, **picked), config.seq_len
    if text is None:
        return None

    def score(model: PreTrainedModel, which: str, run: Run) -> dict[str, Any]:
        result = perplexity(
            model,
            text,
            seq_len=seq_len,
            windows=config.eval_windows,
            progress=lambda n, total: run.log(stage=f"evaluate {which}", step=n, steps=total),
        )
        return result.to_json()

    return score


def _add_results(folder: Path, summary: dict[str, Any]) -> None:
    """Results come last, since they are measured on the checkpoint as it reads from disk."""
    with disk_errors(folder):
        stored = json.loads((folder / "grasp.json").read_text())
        stored["results"] = summary["results"]
        (folder / "grasp.json").write_text(json.dumps(stored, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(summary), encoding="utf-8")
        plot_layers(summary, folder / "layers.png")


def _out_of_memory(config: PruneConfig, error: Exception) -> GraspError:
    reason = str(error).strip().split("\n")[0]
    return GraspError(
        f"out of memory on {config.device} ({reason}): lower --batch-size (now {config.batch_size}) "
        f"or --seq-len (now {config.seq_len}), or use --dtype bf16"
    )
