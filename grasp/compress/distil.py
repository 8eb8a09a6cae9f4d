"""Recovery: the pruned model's weights learn to predict what the dense model predicts.

KL divergence under the head that both share (Hinton et al., arXiv 1503.02531, at temperature 1).
Held-out blocks are watched, and the weights that are best there are handed back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.compress.lora import adapted
from grasp.config import RecoverConfig
from grasp.errors import NEW_START, GraspError
from grasp.gates.objective import Batch, loss
from grasp.gates.training import epoch_order
from grasp.journal import Journal

LARGEST_NORM = 1.0  # of a step's gradient; longer ones are scaled down
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True)
class Recovery:
    """What distillation did: the loss on held-out blocks at its start and at the best step.

    `tokens` are those trained on up to the best step; a best step of 0 is the start.
    """

    before: float
    after: float
    best_step: int
    steps: int  # taken
    tokens: int


@contextmanager
def learnable(model: PreTrainedModel, config: RecoverConfig) -> Iterator[dict[str, Tensor]]:
    """Within the context, the tensors that learn: adapters, or all weights but the embeddings.

    On exit they are part of the frozen model again.
    """
    if config.lora_rank is not None:
        with adapted(model, config.lora_rank, config.seed) as tensors:
            yield tensors
        return
    decoder = model.get_decoder()  # an own head is outside of it, a tied one is an embedding
    frozen = {m.weight for m in decoder.modules() if isinstance(m, nn.Embedding)}
    learned = {name: p for name, p in decoder.named_parameters() if p not in frozen}
    for parameter in learned.values():
        parameter.requires_grad_()
    try:
        yield learned
    finally:
        for parameter in learned.values():
            parameter.requires_grad_(False).grad = None


def distil(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    learned: dict[str, Tensor],
    blocks: Tensor,
    held_out: Batch,
    config: RecoverConfig,
    journal: Journal,
) -> Recovery:
    """Minimise `objective.loss` over `learned`, tensors of `model`; leaves the best values in them.

    blocks: int64 [samples, seq_len]; each epoch visits all of them in its own order, fixed by the
    seed. `held_out` is a batch with its teacher. AdamW has betas (0.9, 0.95) and no weight decay;
    the rate rises over `config.warmup` of the steps and falls to 0 along a half cosine. Stops after
    `config.patience` looks at `held_out` without a lower loss. A run that resumes from its journal
    ends where an uninterrupted one does, on a CPU bit for bit. Raises GraspError if the loss is not
    finite.
    """
    per_step = config.batch_size * config.accumulate
    order = torch.cat([epoch_order(len(blocks), config.seed, e) for e in range(config.epochs)])
    steps = math.ceil(len(order) / per_step)
    optimizer = torch.optim.AdamW(
        learned.values(), lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    course = _Course(learned, optimizer)
    saved = journal.load()
    if saved is None:
        course.look(distance(model, held_out, config))
    else:
        course.restore(saved)
    while course.step < steps and course.worse < config.patience:
        _set_rate(optimizer, config, course.step, steps)
        chosen = order[course.step * per_step : (course.step + 1) * per_step]
        value = _one_step(model, teacher, optimizer, blocks[chosen], config)
        course.step += 1
        if not math.isfinite(value):
            raise GraspError(
                f"the loss is {value} at step {course.step}: try a smaller `lr`; {NEW_START}"
            )
        course.tokens += chosen.numel() * blocks.shape[1]
        if course.step % config.watch_every == 0 or course.step == steps:
            course.look(distance(model, held_out, config))
        tokens = chosen.numel() * blocks.shape[1]
        journal.progress(course.step, steps, value, tokens, held_out=round(course.last, 5))
        stopped = course.worse == config.patience
        journal.save(course.state, final=stopped or course.step == steps)
        if stopped and course.step < steps:
            journal.note(
                f"stopped at step {course.step} of {steps}: {course.worse} looks at the held-out "
                f"blocks without a lower loss than that of step {course.best_step}"
            )
    return course.finish()


@torch.no_grad()
def distance(model: PreTrainedModel, batch: Batch, config: RecoverConfig) -> float:
    """The loss that `distil` minimises, on a batch with its teacher."""
    total = 0.0
    for rows in torch.arange(len(batch)).split(config.batch_size):
        with _autocast(model, config):
            part = loss(model, batch.pick(rows), config.lm_weight)
        total += part.item() * len(rows)
    return total / len(batch)


def _one_step(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    blocks: Tensor,
    config: RecoverConfig,
) -> float:
    """A step of the optimiser on the mean loss of blocks, which is returned."""
    total = torch.zeros((), device=model.device)
    for ids in blocks.to(model.device).split(config.batch_size):
        with _autocast(model, config):
            with torch.no_grad():
                taught = teacher.get_decoder()(ids, use_cache=False).last_hidden_state
            part = loss(model, Batch(ids, taught), config.lm_weight) * (len(ids) / len(blocks))
        part.backward()
        total += part.detach()
    learned = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(learned, LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def _autocast(model: PreTrainedModel, config: RecoverConfig) -> Any:
    """Computes in bf16 if that is chosen; weights that learn stay fp32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bf16")


def _set_rate(
    optimizer: torch.optim.Optimizer, config: RecoverConfig, step: int, steps: int
) -> None:
    rising = config.warmup * steps
    part = (step + 1) / rising if step + 1 < rising else 1.0
    falling = max(0.0, step - rising) / max(1.0, steps - rising)
    optimizer.param_groups[0]["lr"] = config.rate * part * (1 + math.cos(math.pi * falling)) / 2


class _Course:
    """Where a run is: the values, the optimiser's moments, and the best values so far.

    The best values are in the host's memory.
    """

    def __init__(self, learned: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._learned, self._optimizer = learned, optimizer
        self._best: dict[str, Tensor] = {}
        self.step = self.tokens = self.best_step = self.best_tokens = self.worse = 0
        self.before = self.least = self.last = math.inf

    def look(self, held_out: float) -> None:
        """Take note of the loss on the held-out blocks after this step."""
        self.last = held_out
        if self.step == 0:
            self.before = held_out
        if self.step == 0 or held_out < self.least:
            self._best = {n: t.detach().to("cpu", copy=True) for n, t in self._learned.items()}
            self.least, self.worse = held_out, 0
            self.best_step, self.best_tokens = self.step, self.tokens
        else:
            self.worse += 1

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs, by name; four values for each one that learns."""
        counts = (self.step, self.tokens, self.best_step, self.best_tokens, self.worse)
        losses = torch.tensor((self.before, self.least, self.last), dtype=torch.float64)
        state = {"counts": torch.tensor(counts), "losses": losses}
        for name, tensor in self._learned.items():
            state |= {f"now {name}": tensor.detach(), f"best {name}": self._best[name]}
            state |= {f"{m} {name}": self._optimizer.state[tensor][m] for m in MOMENTS}
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        self.step, self.tokens, self.best_step, self.best_tokens, self.worse = state[
            "counts"
        ].tolist()
        self.before, self.least, self.last = state["losses"].tolist()
        self._best = {name: state[f"best {name}"] for name in self._learned}
        for name, tensor in self._learned.items():
            tensor.copy_(state[f"now {name}"])
        moments = {
            index: {"step": torch.tensor(float(self.step))}
            | {moment: state[f"{moment} {name}"] for moment in MOMENTS}
            for index, name in enumerate(self._learned)
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    @torch.no_grad()
    def finish(self) -> Recovery:
        """Put the best values in place."""
        for name, tensor in self._learned.items():
            tensor.copy_(self._best[name])
        return Recovery(self.before, self.least, self.best_step, self.step, self.best_tokens)
