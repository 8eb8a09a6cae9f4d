"""Plan a recovery: its steps, memory, disk and operations, from headers alone, without torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from grasp.config import RECOMPUTE_EVERY, MemoryMode, RecoverConfig
from grasp.model.header import Header
from grasp.model.load import pick_dtype
from grasp.model.units import UnitSpace
from grasp.planning.memory import LOGITS_AT_ONCE

MASTER = 4  # bytes of a value that learns
OPTIMISER = 3 * MASTER  # of each: its gradient and AdamW's two moments
PER_WEIGHT = 6  # operations per token to learn: 2 forward, 2 for each of two gradients
FROZEN = 4  # operations per token and weight under adapters, which need only one gradient
FORWARD = 2


@dataclass(frozen=True)
class RecoveryMemory:
    """Estimated peak bytes while weights learn, on top of the memory of the runtime itself.

    `optimiser` holds gradients and AdamW's two moments. `activations` are those that the backward
    pass needs, for all tokens of a forward pass, and the logits of a chunk. `best` is the copy of
    the best values, in the host's memory.
    """

    weights: int
    teacher: int
    optimiser: int
    activations: int
    best: int

    @property
    def total(self) -> int:
        return self.weights + self.teacher + self.optimiser + self.activations + self.best


@dataclass(frozen=True)
class RecoveryPlan:
    """A planned recovery. `state_bytes` are those that the run's folder holds to resume from."""

    model: str
    teacher: str
    learned: int  # values that learn
    tokens: int  # trained on, if it does not stop early
    steps: int
    memory: RecoveryMemory
    state_bytes: int
    operations: int

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values

    def __str__(self) -> str:
        memory, hours = self.memory, self.operations / 1e12 / 3600
        facts = [
            ("model", f"{self.model}, from the predictions of {self.teacher}"),
            ("learning", f"{self.learned:,} values, {self.tokens:,} tokens, {self.steps:,} steps"),
            (
                "memory",
                f"about {memory.total / 1e9:,.1f} GB (an estimate): {memory.weights / 1e9:,.1f} "
                f"weights, {memory.teacher / 1e9:,.1f} teacher, {memory.optimiser / 1e9:,.1f} "
                f"gradients and moments, {memory.activations / 1e9:,.1f} activations, "
                f"{memory.best / 1e9:,.1f} best weights (in the host's)",
            ),
            ("disk", f"{self.state_bytes / 1e9:,.1f} GB to resume from, until it is done"),
            ("time", f"{self.operations:.1e} operations, {hours:,.1f} hours at 1 TFLOP/s"),
        ]
        return "\n".join(f"{name:<12}{text}" for name, text in facts)


def plan_recovery(config: RecoverConfig, pruned: Header, teacher: Header) -> RecoveryPlan:
    """Plan the run of `config`; headers are those of its model and its teacher.

    Operations are counted as 6 per token and weight that learns, 4 per frozen weight under
    adapters and 2 of the teacher's, with those of recomputed layers and of looks at the held-out
    blocks; attention's own are left out.
    """
    frozen, dense = active(pruned.space), active(teacher.space)
    learned = learned_values(pruned, config.lora_rank)
    tokens = config.epochs * (config.samples - config.held_out) * config.seq_len
    per_token = FORWARD * dense + PER_WEIGHT * (learned if config.lora_rank else frozen)
    per_token += FROZEN * frozen if config.lora_rank else 0
    mode: MemoryMode = "fast" if config.memory == "auto" else config.memory
    per_token += FORWARD * frozen // every if (every := RECOMPUTE_EVERY.get(mode)) else 0
    looks = 3 + math.ceil(config.steps / config.watch_every)  # those at both ends included
    watched = looks * config.held_out * config.seq_len
    width = 4 if pick_dtype(config.dtype, config.device) == "fp32" else 2
    return RecoveryPlan(
        model=config.model,
        teacher=config.teacher,
        learned=learned,
        tokens=tokens,
        steps=config.steps,
        memory=recovery_memory(config, pruned, teacher, mode, width),
        state_bytes=4 * MASTER * learned,
        operations=tokens * per_token + watched * FORWARD * frozen,
    )


def active(space: UnitSpace) -> int:
    """Parameters that compute a token: of routed experts, only as many as the router picks."""
    idle = sum(
        (layer.experts - layer.experts_per_token) * layer.expert_cost
        for layer in space.layers
        if layer.experts
    )
    return space.total_params - idle * space.hidden_size


def recovery_memory(
    config: RecoverConfig, pruned: Header, teacher: Header, mode: MemoryMode, width: int
) -> RecoveryMemory:
    """Estimate for a forward pass in a dtype of `width` bytes; weights that learn are fp32."""
    learned = learned_values(pruned, config.lora_rank)
    stored = pruned.stored_bytes if config.lora_rank and width < MASTER else MASTER
    return RecoveryMemory(
        weights=stored * pruned.space.total_params + (MASTER * learned if config.lora_rank else 0),
        teacher=width * teacher.space.total_params,
        optimiser=OPTIMISER * learned,
        activations=saved_activations(config, pruned, mode, width),
        best=MASTER * learned,
    )


def learned_values(header: Header, rank: int | None) -> int:
    """The number of values that learn: those of the adapters, or all outside of embeddings."""
    space, hidden = header.space, header.space.hidden_size
    if rank is None:
        tables = 1 if space.fixed_params < 2 * header.vocab_size * hidden else 2
        return space.total_params - tables * header.vocab_size * hidden
    fused, ends = header.facts.fused_qkv, 0
    for layer in space.layers:  # inputs and outputs of all linear layers
        queries, keys = layer.queries, layer.keys
        if queries:
            ends += (2 if fused else 4) * hidden + 2 * queries + 2 * keys
        if layer.ffn:
            ends += (2 if fused else 3) * hidden + 3 * layer.ffn
    return rank * ends


def saved_activations(config: RecoverConfig, header: Header, mode: MemoryMode, width: int) -> int:
    """Bytes that the backward pass of one forward pass needs.

    A layer saves four FFN widths, queries, keys, values and attention output, and for each norm its
    input in fp32, the normed one if the norm learns, and what it gives. A recomputed layer saves
    only its input.
    """
    space, facts = header.space, header.facts
    in_norm = 4 if config.lora_rank else 8
    tokens, hidden = config.batch_size * config.seq_len, space.hidden_size
    saved = []
    for layer in space.layers:
        queries, keys = layer.queries, layer.keys
        own = width * (4 * layer.ffn + 3 * queries + 2 * keys)
        own += width * layer.experts_per_token * (4 * layer.expert_width + 3 * hidden)
        own += facts.norms * hidden * (in_norm + width) + facts.qk_norm * in_norm * (queries + keys)
        if facts.softcap:  # scores after tanh and softmax
            own += 8 * layer.heads * config.seq_len
        saved.append(own)
    most = max(saved)
    if every := RECOMPUTE_EVERY.get(mode):
        saved[::every] = [4 * hidden] * len(saved[::every])
    logits = min(2 * tokens * header.vocab_size, max(LOGITS_AT_ONCE, 2 * header.vocab_size))
    recomputed = tokens * most if mode != "fast" else 0
    return tokens * sum(saved) + max(recomputed, 8 * logits)
