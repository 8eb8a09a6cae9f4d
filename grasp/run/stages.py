"""The stages of `grasp.prune` one by one, on a live model, for programs that add their own.

`learn`, `refit`, `reconstruct` and `calibrate` freeze their model and change its weights. Copy the
model first (`copy.deepcopy`) if you still need the original.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.compress.calibrate import learn_scales
from grasp.compress.reconstruct import reconstruct as reconstruct_layers
from grasp.compress.refit import refit as refit_columns
from grasp.config import PruneConfig, ScaleKind
from grasp.data.corpus import read_corpus
from grasp.data.mixture import read_mixture
from grasp.errors import GraspError
from grasp.evaluate import perplexity as measure
from grasp.gates.memory import memory_mode
from grasp.gates.objective import last_hidden
from grasp.gates.scales import fold_scales
from grasp.gates.training import TrainSettings
from grasp.journal import Journal
from grasp.model.classes import as_saved
from grasp.model.units import UnitSpace
from grasp.select import select


def blocks(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    text_field: str = "text",
) -> Tensor:
    """Return blocks of a text or mixture, as on the command line: int64 [samples, seq_len]."""
    mixture = read_mixture(text, tokenizer, samples=samples, text_field=text_field)
    return mixture.blocks(seq_len=seq_len, seed=seed)


def learn(
    model: PreTrainedModel,
    blocks: Tensor,
    *,
    keep: float | None = None,
    params: float | None = None,
    kv_cache: float | None = None,
    ffn_multiple: int = 32,
    kv_multiple: int = 1,
    layout: Any = "auto",
    units: Any = "auto",
    **options: Any,
) -> Mask:
    """Learn gates under the budget and return the mask (GRASPrune, arXiv 2604.19398).

    `options` are the other fields of `Budget` and `PruneConfig`: `epochs`, `lr`, `method` for
    another criterion and so on. Scales learned with the gates are multiplied into the weights of
    `model`. Raises GraspError.
    """
    more = {name: options.pop(name) for name in Budget.options() if name in options}
    budget = Budget.of(
        keep=keep,
        params=params,
        kv_cache=kv_cache,
        ffn_multiple=ffn_multiple,
        kv_multiple=kv_multiple,
        layout=layout,
        units=units,
        **more,
    )
    config = PruneConfig(model.name_or_path or "", budget, device=str(model.device), **options)
    projection = Projection(UnitSpace.of(model), budget, seed=config.seed, device=config.device)
    _freeze(model)
    teacher = last_hidden(model, blocks) if config.distils else None
    with memory_mode(model, config):
        selection = select(model, projection, blocks, config, lambda stage: Journal(), teacher)
    if selection.scales is not None:
        fold_scales(model, config.scales, selection.scales)
    return projection.mask(selection.scores)


def refit(model: PreTrainedModel, mask: Mask, blocks: Tensor) -> None:
    """Refit the columns that `mask` keeps to replace the dropped ones; use it before `fold`.

    The fit is by least squares; blocks: int64 [samples, seq_len].
    """
    _freeze(model)
    refit_columns(model, mask, blocks)


def reconstruct(
    model: PreTrainedModel, mask: Mask, blocks: Tensor, *, seed: int = 0
) -> PreTrainedModel:
    """Fit, cut and train the dense model to the units that `mask` keeps, in place of `fold`.

    Each layer's weights learn to give the dense hidden states; blocks: int64 [samples, seq_len].
    Returns the dense smaller model, whose weights are those left in `model`. Raises GraspError.
    """
    if len(blocks) < 2:
        raise GraspError(f"`blocks` must be at least 2, one of them held out, got {len(blocks)}")
    _freeze(model)
    reconstruct_layers(model, mask, blocks, seed, Journal())
    return as_saved(model, UnitSpace.of(model))[0]


def calibrate(
    model: PreTrainedModel,
    blocks: Tensor,
    *,
    scales: ScaleKind = "channel",
    epochs: int = 1,
    lr: float = 1e-2,
    seed: int = 0,
    teacher: PreTrainedModel | None = None,
) -> None:
    """Learn scales of the folded model on `blocks`, and multiply them into its weights.

    They learn from the predictions of `teacher`, the dense model; without one, from the text.
    """
    _freeze(model)
    weight = 1.0 if teacher is None else 0.0
    settings = TrainSettings(
        epochs, lr=lr, schedule="cosine", decay=1.0, seed=seed, lm_weight=weight
    )
    taught = None if teacher is None else last_hidden(teacher, blocks)
    fold_scales(model, scales, learn_scales(model, scales, blocks, settings, Journal(), taught))


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    text_field: str = "text",
    **how: Any,
) -> measure.Perplexity:
    """Measure perplexity, in fp32, on a text that is named as on the command line.

    `how`: `seq_len`, `windows`, `batch_size` and `bos` of `grasp.evaluate.perplexity.perplexity`.
    """
    corpus = read_corpus(text, tokenizer, text_field=text_field, split="test")
    return measure.perplexity(model, corpus, **how)


def _freeze(model: PreTrainedModel) -> None:
    model.eval().requires_grad_(False)
