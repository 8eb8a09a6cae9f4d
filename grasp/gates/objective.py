"""What gates and scales minimise: the next-token loss, or the distance from the dense model.

The dense model's predictions are kept as its last hidden states: the head, which both models
share, turns them into logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from grasp.gates.gating import unpadded
from grasp.model.patched import patched
from grasp.model.places import sent
from grasp.model.sharding import whole
from grasp_kernels import linear_cross_entropy, linear_distillation


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks to learn from, and what the dense model makes of them.

    `ids`: int64 [samples, seq_len]. `teacher`: the dense model's last hidden states,
    [samples, seq_len, hidden], or None.
    """

    ids: Tensor
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, rows: Tensor) -> Batch:
        """Blocks by index, int64 [n] on the CPU, on the device of the ids."""
        taught = None if self.teacher is None else sent(self.teacher[rows], self.ids.device)
        return Batch(self.ids[sent(rows, self.ids.device)], taught)

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of `size` blocks; the last may be smaller."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(self.ids[part], None if self.teacher is None else self.teacher[part])

    def empty_like(self) -> Batch:
        """Return a batch of the same shape, which `copy_` fills."""
        teacher = None if self.teacher is None else torch.empty_like(self.teacher)
        return Batch(torch.empty_like(self.ids), teacher)

    def copy_(self, other: Batch) -> None:
        """Overwrite the tensors, which a CUDA graph reads."""
        self.ids.copy_(other.ids)
        if self.teacher is not None and other.teacher is not None:
            self.teacher.copy_(other.teacher)


@torch.no_grad()
def last_hidden(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Return the teacher of a `Batch`: the model's last hidden states, in its dtype, on the CPU.

    blocks: int64 [samples, seq_len], run one by one.
    """
    decoder, found = model.get_decoder(), torch.empty(0)
    for index, block in enumerate(blocks.split(1)):
        hidden = decoder(block.to(model.device), use_cache=False).last_hidden_state
        if not index:
            found = torch.empty(len(blocks), *hidden.shape[1:], dtype=hidden.dtype)
        found[index] = hidden[0]
    return found


def loss(model: PreTrainedModel, batch: Batch, lm_weight: float) -> Tensor:
    """The objective, fp32 scalar: a mean over predicted tokens.

    It is `lm_weight` times the next-token loss, plus 1 - `lm_weight` times the KL divergence of the
    model's predictions from the teacher's. Without a teacher, it is the next-token loss.
    """
    ids, teacher = batch.ids, batch.teacher
    if teacher is None or lm_weight == 1:
        return next_token_loss(model, ids)
    if not _head_is_plain(model, ids):
        logits = model(input_ids=ids, attention_mask=unpadded(ids), use_cache=False).logits
        given = BaseModelOutputWithPast(last_hidden_state=teacher)
        with torch.no_grad(), patched(model.get_decoder(), lambda *_, **__: given):
            taught = model(input_ids=ids, use_cache=False).logits
        own, known = (x[:, :-1].flatten(0, 1).float().log_softmax(1) for x in (logits, taught))
        divergence = F.kl_div(own, known, log_target=True, reduction="batchmean")
        return (1 - lm_weight) * divergence + lm_weight * F.nll_loss(own, ids[:, 1:].flatten())
    hidden, known = (x[:, :-1].flatten(0, 1) for x in (_hidden(model, ids), teacher))
    return linear_distillation(hidden, _head(model), known, ids[:, 1:].flatten(), lm_weight)


def next_token_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, fp32 scalar; ids: int64 [batch, seq_len].

    If the head is frozen and a plain linear layer, logits are computed in chunks. Other models
    (capped or scaled logits, heads that train) use their own loss.
    """
    if not _head_is_plain(model, ids):
        mask = unpadded(ids)
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    hidden = _hidden(model, ids)[:, :-1].flatten(0, 1)
    return linear_cross_entropy(hidden, _head(model), ids[:, 1:].flatten())


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    decoder = model.get_decoder()
    hidden: Tensor = decoder(ids, attention_mask=unpadded(ids), use_cache=False).last_hidden_state
    return hidden


def _head(model: PreTrainedModel) -> Tensor:
    """The weight of the head, [vocabulary, hidden]; if sharded, gathered while it is in use."""
    return whole(model.get_output_embeddings().weight)


_PLAIN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _head_is_plain(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether the head is frozen and nothing but a matrix product; tested once per model."""
    head = model.get_output_embeddings()
    if head is None or head.weight.requires_grad:
        return False
    if model not in _PLAIN:
        _PLAIN[model] = _gives_logits(model, ids[:1, :2])
    return _PLAIN[model]


@torch.no_grad()
def _gives_logits(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether logits are the decoder's output times the head's weight.

    Compares bit for bit within one pass: two passes may differ by a bit on a GPU, and a soft cap
    may differ by little more.
    """
    passed: list[Any] = []
    hook = model.get_decoder().register_forward_hook(lambda *args: passed.append(args[-1]))
    with hook:
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.equal(logits, F.linear(passed.pop().last_hidden_state, _head(model)))
