"""Plan a run: its result and its cost, from `config.json` or a GGUF header alone.

No torch is imported, so that the answer comes at once. Counts and limits are exact; memory is an
estimate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from grasp import criteria
from grasp.budget.budget import NAMES, Budget, UnitKind
from grasp.config import PlannedDtype, PlannedMemory, PruneConfig, window
from grasp.errors import GraspError
from grasp.model.header import FAMILIES, MIXTURES, STATIC_ROPE, Header
from grasp.model.units import UnitSpace
from grasp.planning.check import check
from grasp.planning.memory import (
    MODES,
    Memory,
    choosing_memory,
    compensation_memory,
    evaluation_memory,
    learning_memory,
)
from grasp.planning.ranks import Gpus, Spread, spread

BLOCK_TOKEN = 1.6  # times as long as a token of gates takes; measured on a CPU
DTYPE_BYTES = {"bf16": 2, "fp32": 4}


class Range(NamedTuple):
    """Bounds that hold for any data, both inclusive."""

    least: int
    most: int

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.most:,}"
        return f"{self.least:,} to {self.most:,}"


class Size(NamedTuple):
    """A number for the dense model, and its bounds for the pruned one."""

    before: int
    after: Range


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime loads the result, and why."""

    name: str
    loads: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """A planned run: parameter counts, bytes of weights and of KV cache per token at `dtype`."""

    model: str
    family: str
    source: str  # what was read
    budget: Budget
    dtype: str
    layers: int
    channels: int
    kv_groups: int
    experts: int  # 0 for a model that is not a mixture
    prunes: tuple[UnitKind, ...]  # what may go
    whole: tuple[str, ...]  # what stays whole besides, and why
    params: Size
    prunable: Size
    weight_bytes: Size
    kv_bytes_per_token: Size
    memory: Memory
    choosing_memory: int | None  # estimated peak bytes while a one-shot method chooses, if it does
    compensation_memory: int | None  # the same of block reconstruction or refit, if one runs
    teacher_bytes: int | None  # of the dense model's hidden states, in the host's memory
    evaluation_memory: int  # estimated peak bytes of the dense model's perplexity
    learning_tokens: int  # forward and backward, for gates and for the scales after the mask
    block_tokens: int  # the same in block reconstruction, for each layer
    learning_seconds: float | None  # of both
    runtimes: tuple[Runtime, ...]
    gpus: Spread | None  # over several GPUs, if asked

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("params", "prunable", "weight_bytes", "kv_bytes_per_token"):
            size: Size = getattr(self, name)
            values[name] = {"before": size.before, "after": size.after._asdict()}
        values["memory"]["total"] = self.memory.total
        return values

    def __str__(self) -> str:
        budget, memory = self.budget, self.memory
        stages = {
            "choosing": self.choosing_memory,
            "gates learn": memory.total if self.learning_tokens else None,
            "compensating": self.compensation_memory,
            "evaluating": self.evaluation_memory,
        }
        peaks = ", ".join(f"{n / 1e9:,.1f} GB while {stage}" for stage, n in stages.items() if n)
        teacher = ""
        if self.teacher_bytes is not None:
            teacher = f"; {self.teacher_bytes / 1e9:,.1f} GB of the host's for the teacher"
        tokens = f"{self.learning_tokens:,} tokens forward and backward"
        if self.block_tokens:
            tokens += f", {self.block_tokens:,} more for block reconstruction"
        time = "give `tokens_per_second` for the time"
        if self.learning_seconds is not None:
            time = f"{self.learning_seconds / 60:,.1f} minutes"
        facts = [
            ("model", f"{self.model} ({self.family}, from {self.source})"),
            ("budget", f"{budget.kind.replace('_', '-')} {budget.asked:,}, {budget.layout} layout"),
            ("widths", f"multiples of {budget.ffn_multiple} channels, {budget.kv_multiple} groups"),
            (
                "units",
                f"{self.channels:,} FFN channels, {self.kv_groups:,} KV groups, "
                + (f"{self.experts:,} experts, " if self.experts else "")
                + f"{self.layers} layers",
            ),
            ("may go", " and ".join(NAMES[part] for part in self.prunes)),
            *(("stays whole", why) for why in self.whole),
            *([("protected", self._protected())] if budget.protected(self.layers) else []),
            ("parameters", _change(self.params)),
            ("prunable", _change(self.prunable)),
            ("weights", f"{_change(self.weight_bytes)} bytes in {self.dtype}"),
            ("KV cache", f"{_change(self.kv_bytes_per_token)} bytes per token"),
            ("memory", f"about {peaks} (estimates){teacher}"),
            ("learning", f"{tokens}; {time}"),
        ]
        for runtime in self.runtimes:
            answer = "yes" if runtime.loads else "no "
            facts.append(("loads in", f"{answer} {runtime.name}: {runtime.why}"))
        facts += self.gpus.lines() if self.gpus else []
        return "\n".join(f"{name:<12}{text}" for name, text in facts)

    def _protected(self) -> str:
        whole = sorted(self.budget.protected(self.layers))
        return f"{len(whole)} layers keep all units: {', '.join(map(str, whole))}"


def _change(size: Size) -> str:
    return f"{size.before:,} -> {size.after}"


def plan(
    spec: str,
    *,
    tokens_per_second: float | None = None,
    dtype: PlannedDtype = "bf16",
    memory: PlannedMemory = "fast",
    gpus: int | None = None,
    gpu_memory: float | None = None,
    nodes: int = 1,
    **options: Any,
) -> Plan:
    """Plan `grasp prune` with the same options, those of `PruneConfig.of`.

    `spec` is anything that `grasp.model.source.resolve` accepts, or a config.json. `gpus` on each
    of `nodes` machines, with `gpu_memory` GB each, are planned for, too. Raises GraspError wherever
    `prune` would, at its start (see `check`).
    """
    if dtype not in DTYPE_BYTES:
        raise GraspError(f"`dtype` of a plan must be {' or '.join(DTYPE_BYTES)}, got {dtype!r}")
    if memory not in MODES:
        raise GraspError(f"`memory` of a plan must be fast, balanced or low, got {memory!r}")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise GraspError(f"`tokens_per_second` must be above 0, got {tokens_per_second}")
    over = _gpus(gpus, nodes, gpu_memory)
    config = PruneConfig.of(spec, **options)
    header = check(config)
    space, width = header.space, DTYPE_BYTES[dtype]
    budget = config.budget.for_space(space)
    cost, kv_values = obtained(space, budget)
    after = params_left(space, budget, cost)
    epochs = config.epochs if criteria.get(config.method).learns else 0
    tokens = config.samples * config.seq_len * (epochs + config.scale_epochs)
    at_once = config.seq_len * config.batch_size
    return Plan(
        model=spec,
        family=header.family,
        source=header.source,
        budget=budget,
        dtype=dtype,
        layers=len(space.layers),
        channels=sum(layer.ffn for layer in space.layers),
        kv_groups=sum(layer.kv_groups for layer in space.layers),
        experts=space.experts,
        prunes=budget.prunes(space),
        whole=_whole(header, budget),
        params=Size(space.total_params, after),
        prunable=Size(space.prunable_params, _times(space.hidden_size, cost)),
        weight_bytes=Size(width * space.total_params, _times(width, after)),
        kv_bytes_per_token=Size(
            space.kv_cache_bytes_per_token(width), _times(2 * width, kv_values)
        ),
        memory=learning_memory(header, at_once, config.seq_len, width, memory, config.scales),
        choosing_memory=choosing_memory(header, config, width),
        compensation_memory=compensation_memory(header, config, width),
        teacher_bytes=(
            width * config.samples * config.seq_len * space.hidden_size if config.distils else None
        ),
        evaluation_memory=evaluation_memory(header, window(config, header.longest)),
        learning_tokens=tokens,
        block_tokens=config.block_tokens,
        learning_seconds=(
            (tokens + BLOCK_TOKEN * config.block_tokens) / tokens_per_second
            if tokens_per_second
            else None
        ),
        runtimes=tuple(_runtimes(header, budget)),
        gpus=spread(header, config, width, over) if over else None,
    )


def _gpus(each: int | None, nodes: int, memory: float | None) -> Gpus | None:
    """The GPUs that are planned for, if any. Raises GraspError."""
    if each is None and memory is None and nodes == 1:
        return None
    if each is None or memory is None:
        one = "`nodes` needs them" if nodes != 1 else "one is missing"
        raise GraspError(f"`gpus` and `gpu_memory` belong together, and {one}: give both")
    if not 0 < memory < math.inf:
        raise GraspError(f"`gpu_memory` must be a finite number of GB above 0, got {memory}")
    return Gpus(each, nodes, round(memory * 1e9))


def _whole(header: Header, budget: Budget) -> tuple[str, ...]:
    """What stays whole in the layers, and why: by structure, or as the budget asks."""
    prunes, reason = budget.prunes(header.space), f"`units={budget.units!r}`"
    if budget.kind == "kv_cache":
        reason = "`kv_cache` is a budget of KV groups"
    have = dict.fromkeys(segment.kind for segment in budget.segments(header.space))
    asked = (f"{NAMES[kind]}: {reason}" for kind in have if kind not in prunes)
    return (*asked, *header.whole)


def obtained(space: UnitSpace, budget: Budget) -> tuple[Range, Range]:
    """Bounds on the cost of any mask under `budget`, and on the K values per token that it keeps.

    The upper bound is the budget's limit. The lower bound holds because the projection fills the
    remainder: less than one block stays unspent, an FFN block as long as one can be added.
    """
    limit = budget.limit(space)
    # bounds on KV groups follow from the least and the most that all other units can cost
    in_params = replace(budget, kind="keep", asked=1.0, units="auto")
    segments = [s for s in in_params.segments(space) if s.kind == "kv"]
    kv = sum(s.unit_cost * s.size for s in segments)
    kv_floor = sum(s.unit_cost * s.least for s in segments)
    # cost of a KV group per head_dim; the same in all layers, except in foreign per-layer models
    attentions = [layer for layer in space.layers if layer.kv_groups]
    ratios = [2 * layer.group_size + 2 for layer in attentions] or [1]
    keys = sum(layer.keys for layer in attentions)
    spent = Range(max(budget.floor(space), limit - budget.step(space) + 1), limit)
    if budget.kind == "kv_cache":
        others = space.cost - kv
        cost = Range(others + spent.least * min(ratios), others + spent.most * max(ratios))
        return cost, _plus(space.fixed_keys, spent)
    # units of a kind that is not under the budget stay
    cost = _plus(space.cost - budget.cost(space), spent)
    if "kv" not in budget.prunes(space):
        return cost, _plus(space.fixed_keys, Range(keys, keys))
    others, others_floor = budget.cost(space) - kv, budget.floor(space) - kv_floor
    groups = Range(max(kv_floor, spent.least - others), min(kv, spent.most - others_floor))
    values = Range(-(-groups.least // max(ratios)), groups.most // min(ratios))
    return cost, _plus(space.fixed_keys, values)


def params_left(space: UnitSpace, budget: Budget, cost: Range) -> Range:
    """Bounds on all parameters of a result that costs `cost`, biases of kept units included."""
    most = space.total_params - space.fixed_params - space.prunable_params
    least = sum(
        layer.channel_bias * min(layer.ffn, budget.ffn_multiple)
        + layer.group_bias * min(layer.kv_groups, budget.kv_multiple)
        + layer.expert_bias * layer.experts_per_token
        for layer in space.layers
    )
    if cost.least == space.cost:  # nothing is dropped
        least = most
    fixed, d = space.fixed_params, space.hidden_size
    return Range(fixed + d * cost.least + least, fixed + d * cost.most + most)


def _plus(term: int, values: Range) -> Range:
    return Range(term + values.least, term + values.most)


def _times(factor: int, values: Range) -> Range:
    return Range(factor * values.least, factor * values.most)


def _runtimes(header: Header, budget: Budget) -> list[Runtime]:
    """Which runtimes load the result. Sources: docs of each, and runs on transformers 5.17-5.23."""
    no_gguf = None
    if header.rope not in STATIC_ROPE:
        no_gguf = f"its architectures for {header.family} have no rope of type {header.rope}"
    if budget.layout == "uniform":
        stock = "equal widths in all layers: a stock class, no code of grasp's"
        if header.family == "llama":  # its config requires heads that divide the hidden size
            stock += " (Mistral's, the same decoder, for head counts that Llama's refuses)"
        return [
            Runtime("transformers", True, stock),
            Runtime("vLLM", True, stock),
            Runtime("llama.cpp", no_gguf is None, no_gguf or stock),
            Runtime("SGLang, TensorRT-LLM, MLX", True, stock),
        ]
    if header.family not in (*FAMILIES, *MIXTURES):  # equal widths are for llama.cpp's own tools
        no_gguf = f"grasp export writes no {header.family}"
    elif header.facts.deci_lacks:
        no_gguf = f"deci, its per-layer architecture, has no {header.facts.deci_lacks}"
        no_gguf += ": needs `layout='uniform'`"
    gguf = "grasp export --to gguf writes its per-layer architecture, deci"
    vllm = "sizes each layer by its own config; tensor parallelism by divisors of "
    vllm += f"`kv_multiple` ({budget.kv_multiple})"
    if header.stateful:
        vllm = "keeps keys and values only, and this family's mixers have other states too"
    return [
        Runtime("transformers, after import grasp", True, "grasp's class"),
        Runtime(
            "transformers, trust_remote_code=True",
            True,
            "modeling_grasp.py travels with the weights",
        ),
        Runtime("vLLM, Transformers backend", not header.stateful, vllm),
        Runtime("llama.cpp", no_gguf is None, no_gguf or gguf),
        Runtime(
            "transformers, stock class", False, "one width for all layers: needs `layout='uniform'`"
        ),
        Runtime(
            "SGLang, TensorRT-LLM, MLX",
            False,
            "their per-layer models cannot drop query heads: needs `layout='uniform'`",
        ),
    ]
