"""The training loop for gates and scales: AdamW on one small vector, with the model frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp import distributed
from grasp.config import PruneConfig, Schedule
from grasp.errors import NEW_START, GraspError, reason
from grasp.gates.compiled import compiled
from grasp.gates.objective import Batch, loss
from grasp.journal import Journal
from grasp.model.places import places_of
from grasp.model.sharding import is_sharded

READ_EVERY = 10  # steps between reads of the loss from an accelerator
COMPARE_EVERY = 50  # steps, of which READ_EVERY is a divisor; scores must agree over ranks
GRAPH_TOKENS = 2048  # per pass; up to here, launching kernels takes longer than running them


@dataclass(frozen=True)
class TrainSettings:
    """How gates and scales are trained; `lr` is the learning rate of AdamW."""

    epochs: int
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-2
    schedule: Schedule = "constant"
    decay: float = 0.0  # of scales, per epoch at the full rate
    seed: int = 0
    lm_weight: float = 1.0  # of the next-token loss; the rest is the distance from a teacher

    @classmethod
    def of(cls, config: PruneConfig, epochs: int) -> TrainSettings:
        return cls(
            epochs,
            config.batch_size,
            config.accumulate,
            config.lr,
            config.schedule,
            config.scale_decay,
            config.seed,
            config.lm_weight,
        )


class Multipliers(Protocol):
    """Factors on channels of a live model: `Gates` or `Scales`."""

    def set(self, values: Tensor, open_counts: list[int] | None = None) -> None: ...

    def count(self, values: Tensor) -> list[int]: ...


def train_gates(
    model: PreTrainedModel,
    gates: Multipliers,
    theta: Tensor,
    gate_values: Callable[[Tensor, Tensor], Tensor],
    blocks: Tensor,
    settings: TrainSettings,
    journal: Journal,
    info: Callable[[], dict[str, Any]] = dict,
    *,
    scales: int = 0,
    teacher: Tensor | None = None,
) -> Tensor:
    """Minimise `objective.loss` over `theta` (fp32 [units]) and return the trained vector.

    `gate_values(theta, progress)` gives the gates; progress is an fp64 scalar on the device, in
    [0, 1). `blocks` is int64 [samples, seq_len], and `teacher` their `last_hidden`; each epoch
    visits all of them in its own order, fixed by the seed. AdamW has betas (0.9, 0.99) and a rate
    that is constant, as published, or falls to 0 along a half cosine. There is no weight decay
    (GRASPrune, section 4.1), except on the last `scales` entries of theta: those that a short text
    cannot tell from noise stay near 0, a scale of 1. Decay is set per epoch, so more text means
    less decay per step (arXiv 2405.13698).
    `info` adds to the log. Raises GraspError if the loss is not finite. A run that resumes from its
    journal ends where an uninterrupted one does, on a CPU bit for bit.

    On a GPU, norms and RoPE are compiled. A small step is launched as one CUDA graph. A large step
    reads back once how many units are open, and computes only those.
    """
    theta = theta.detach().clone().requires_grad_()
    on_gpu = theta.device.type == "cuda"
    rate = torch.tensor(settings.lr, device=theta.device) if on_gpu else settings.lr
    optimizer = torch.optim.AdamW(
        [theta], lr=rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=on_gpu
    )
    per_step = settings.batch_size * settings.accumulate
    order = torch.cat([epoch_order(len(blocks), settings.seed, e) for e in range(settings.epochs)])
    examples = Batch(blocks.to(theta.device), teacher)
    steps = math.ceil(len(order) / per_step)
    small = settings.batch_size * blocks.shape[1] <= GRAPH_TOKENS
    decay = None
    if scales and settings.decay:
        decay = torch.zeros_like(theta, requires_grad=False)
        decay[-scales:] = settings.decay * settings.epochs / steps / settings.lr
    one_step = Step(
        model,
        gates,
        theta,
        gate_values,
        optimizer,
        settings.batch_size,
        decay,
        settings.lm_weight,
    )
    run_step: Callable[[Batch, Tensor], Tensor] = one_step
    # a graph holds no collectives, and lies on one GPU
    alone = distributed.ranks() == 1 and not is_sharded(model) and isinstance(places_of(model), str)
    if on_gpu and small and alone:
        run_step = CapturedStep(one_step, journal.note)
    elif on_gpu:
        run_step = partial(one_step, count=True)

    start = _restore(theta, optimizer, journal.load())
    read_every = 1 if theta.device.type == "cpu" else READ_EVERY
    losses: list[Tensor] = []
    progress = torch.zeros((), dtype=torch.float64, device=theta.device)
    tokens = 0  # since the last read
    with compiled(model, journal.note) if on_gpu else nullcontext():
        for step in range(start, steps):
            chosen = order[step * per_step : (step + 1) * per_step]
            progress.fill_(step / steps)
            _set_rate(optimizer, _rate(settings, step / steps))
            losses.append(run_step(examples.pick(chosen), progress))
            tokens += chosen.numel() * blocks.shape[1]
            if len(losses) == read_every or step + 1 == steps:
                mean = finite_mean(losses, step + 1)
                journal.progress(step + 1, steps, mean, tokens, **info())
                losses.clear()
                tokens = 0
                done = step + 1
                if done == steps or done % COMPARE_EVERY == 0:
                    distributed.check_same(f"theta after step {done}", digest(theta))
                journal.save(partial(_state, theta, optimizer, done), final=done == steps)
    return theta.detach()


@dataclass(frozen=True)
class Step:
    """One step of the optimiser. Without `count` nothing in it makes a GPU wait for the host."""

    model: PreTrainedModel
    gates: Multipliers
    theta: Tensor
    gate_values: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    batch_size: int
    decay: Tensor | None = None  # [units], of theta, per unit of the rate
    lm_weight: float = 1.0

    def __call__(self, batch: Batch, progress: Tensor, *, count: bool = False) -> Tensor:
        """Update theta on the mean loss of a batch; returns that loss.

        `count` reads back how many gates are open, so that a GPU computes only those.
        """
        values = self.gate_values(self.theta, progress)
        z = values.detach().requires_grad_()
        counts = self.gates.count(z) if count else None

        def of_part(part: Batch) -> Tensor:  # [units + 1]: the gradient, then the loss
            self.gates.set(z, counts)
            part_loss = loss(self.model, part, self.lm_weight) * (len(part) / len(batch))
            return torch.cat([torch.autograd.grad(part_loss, z)[0], part_loss.detach()[None]])

        total = torch.zeros(len(z) + 1, device=z.device)
        at_once = min(self.batch_size, math.ceil(len(batch) / distributed.ranks()))
        for found in distributed.in_order(of_part, list(batch.split(at_once))):
            total += found
        gradient = total[:-1]
        (self.theta.grad,) = torch.autograd.grad(values, self.theta, gradient)
        if self.decay is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self.theta.detach().mul_(torch.exp(-rate * self.decay))
        self.optimizer.step()
        return total[-1]


class CapturedStep:
    """A step as one CUDA graph, captured after the first `WARM_UP` calls.

    A step with another shape than the first, such as the last of a run, runs without the graph.
    """

    WARM_UP = 3  # kernels compile, the optimiser creates its state

    def __init__(self, step: Step, note: Callable[[str], None]) -> None:
        self._step, self._note = step, note
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, progress: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 1:
            self._batch, self._progress = batch.empty_like(), torch.empty_like(progress)
        if self._calls <= self.WARM_UP or batch.ids.shape != self._batch.ids.shape:
            return self._step(batch, progress)
        self._batch.copy_(batch)
        self._progress.copy_(progress)
        if self._calls == self.WARM_UP + 1:
            self._capture()
        if self._graph is None:
            return self._step(batch, progress)
        self._graph.replay()
        return self._loss.clone()

    def _capture(self) -> None:
        graph, device = torch.cuda.CUDAGraph(), self._batch.ids.device
        pool = torch.cuda.graph_pool_handle()
        try:
            with (
                torch.cuda.device(device),  # which need not be the first
                torch.cuda.stream(torch.cuda.current_stream(device)),  # back to it after a failure
                torch.cuda.graph(graph, pool, torch.cuda.Stream(device)),
            ):
                self._loss = self._step(self._batch, self._progress)
        except RuntimeError as error:
            with suppress(RuntimeError):  # torch before 2.12 leaves the allocator in the capture
                torch._C._cuda_endAllocateToPool(device.index or 0, pool)
            self._note(f"steps run one kernel at a time, not as a CUDA graph: {reason(error)}")
        else:
            self._graph = graph


def digest(values: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return sha256(values.detach().cpu().numpy().tobytes()).hexdigest()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):  # in place, where a CUDA graph reads it
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _rate(settings: TrainSettings, progress: float) -> float:
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 + math.cos(math.pi * progress)) / 2


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits its blocks, int64 [samples]."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(samples, generator=generator)


def finite_mean(losses: list[Tensor], step: int) -> float:
    """Mean of the losses up to `step`, read back from the device. Raises GraspError."""
    values: list[float] = torch.stack(losses).tolist()
    for back, value in enumerate(reversed(values)):
        if not math.isfinite(value):
            raise GraspError(
                f"the loss is {value} at step {step - back}: try a smaller `lr` or `dtype='fp32'`, "
                f"and check that the dense model's own loss is finite; {NEW_START}"
            )
    return sum(values) / len(values)


def _state(theta: Tensor, optimizer: torch.optim.Optimizer, done: int) -> dict[str, Tensor]:
    adam = optimizer.state[theta]
    return {
        "theta": theta.detach(),
        "exp_avg": adam["exp_avg"],
        "exp_avg_sq": adam["exp_avg_sq"],
        "step": torch.tensor(done),
    }


def _restore(
    theta: Tensor, optimizer: torch.optim.Optimizer, state: dict[str, Tensor] | None
) -> int:
    """Restore a saved state; returns the number of steps that it had done."""
    if state is None:
        return 0
    with torch.no_grad():
        theta.copy_(state["theta"])
    counter_device = theta.device if optimizer.param_groups[0]["capturable"] else "cpu"
    optimizer.state[theta] = {
        "step": state["step"].float().to(counter_device),
        "exp_avg": state["exp_avg"].to(theta.device),
        "exp_avg_sq": state["exp_avg_sq"].to(theta.device),
    }
    return int(state["step"])
