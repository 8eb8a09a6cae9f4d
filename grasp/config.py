"""What a run was asked to do: everything a user can choose that decides its result."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from grasp import criteria
from grasp.budget.budget import Budget, Layout
from grasp.budget.pattern import Pattern
from grasp.errors import GraspError
from grasp.model.load import check_device

Start = Literal["fisher", "equal"]
GateSite = Literal["output", "kv"]
Schedule = Literal["cosine", "constant"]
ScaleKind = Literal["channel", "unit"]
Compensation = Literal["refit", "bias", "none"]
Dtype = Literal["auto", "fp32", "bf16"]
MemoryMode = Literal["auto", "fast", "balanced", "low"]
PlannedDtype = Literal["fp32", "bf16"]  # "auto" asks the machine, a plan is of any
PlannedMemory = Literal["fast", "balanced", "low"]
SparseMethod = Literal["wanda++", "wanda", "sparsegpt", "magnitude"]

RECOMPUTE_EVERY = {"low": 1, "balanced": 2}  # every so many layers, from the first on
TOKENS_PER_CHANNEL = 16  # of the widest FFN, that refit sees; its matrices change little with more


@dataclass(frozen=True)
class PruneConfig:
    """The options of `grasp prune`, with their defaults. Raises GraspError on impossible values."""

    model: str
    budget: Budget
    method: str = "learned"  # a name in grasp.criteria
    calibration: str = "builtin"
    text_field: str = "text"
    samples: int = 512
    seq_len: int = 512
    epochs: int = 4
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-2
    schedule: Schedule = "cosine"
    start: Start = "fisher"
    anneal: float = 0.5
    gate_site: GateSite = "output"
    compensate: Compensation = "refit"
    scales: ScaleKind = "channel"
    scale_epochs: int = 1
    decay: float = 1.0
    eval_text: str | None = None
    eval_seq_len: int = 2048
    eval_windows: int | None = None
    dtype: Dtype = "auto"
    memory: MemoryMode = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_least(
            self,
            samples=1,
            seq_len=2,
            epochs=1,
            batch_size=1,
            accumulate=1,
            scale_epochs=0,
            eval_seq_len=2,
            eval_windows=1,
        )
        _check_draw(self.seed, self.lr)
        check_device(self.device)
        if not 0 <= self.anneal <= 1:
            raise GraspError(f"--anneal {self.anneal} is no part of the run: choose one in [0, 1]")
        if not 0 <= self.decay < math.inf:
            raise GraspError(f"--decay {self.decay} is no decay: choose 0 or more, as 1")
        if criteria.get(self.method).updates_weights:  # nothing is left to compensate
            object.__setattr__(self, "compensate", "none")

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        *,
        as_published: bool = False,
        keep: float | None = None,
        params: float | None = None,
        kv_cache: float | None = None,
        ffn_multiple: int = 32,
        kv_multiple: int = 1,
        layout: Layout = "per-layer",
        **options: Any,
    ) -> PruneConfig:
        """From what a user says: the budget in parts (see `Budget.of`), paths as they come."""
        budget = Budget.of(
            keep=keep,
            params=params,
            kv_cache=kv_cache,
            ffn_multiple=ffn_multiple,
            kv_multiple=kv_multiple,
            layout=layout,
        )
        config = cls(os.fspath(model), budget, **_plain(options))
        return config.as_published() if as_published else config

    def as_published(self) -> PruneConfig:
        """With the paper's choices where our defaults are others; ties and floors stay ours."""
        return replace(
            self,
            budget=replace(self.budget, ffn_multiple=1),
            method="learned",
            start="equal",
            schedule="constant",
            anneal=0.0,
            gate_site="kv",
            compensate="none",
            scales="unit",
            decay=0.0,
        )

    def to_json(self) -> dict[str, Any]:
        """What decides the result: a run may go on under another `memory`."""
        return {name: value for name, value in asdict(self).items() if name != "memory"}


@dataclass(frozen=True)
class SparsifyConfig:
    """The options of `grasp sparsify`, with their defaults. Raises GraspError on impossible values.

    `rounds` and `lr` are those of Wanda++'s regional optimisation.
    """

    model: str
    pattern: str = "2:4"
    method: SparseMethod = "wanda++"
    calibration: str = "builtin"
    text_field: str = "text"
    samples: int = 128
    seq_len: int = 512
    rounds: int = 5
    lr: float = 3e-7
    eval_text: str | None = None
    eval_seq_len: int = 2048
    eval_windows: int | None = None
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: str | os.PathLike[str], **options: Any) -> SparsifyConfig:
        """From what a user says, paths as they come."""
        return cls(os.fspath(model), **_plain(options))

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        _check_choices(self)
        _check_least(self, samples=1, seq_len=2, rounds=0, eval_seq_len=2, eval_windows=1)
        _check_draw(self.seed, self.lr)
        check_device(self.device)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Paths as text."""
    return {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}


def _check_choices(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        choices, value = get_args(hint), getattr(config, name)
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise GraspError(f"{_option(name)} {value!r}: choose {', '.join(choices)}")


def _check_least(config: Any, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise GraspError(f"{_option(name)} {value} is too small: choose at least {smallest}")


def _check_draw(seed: int, lr: float) -> None:
    if not 0 <= seed < 2**32:
        raise GraspError(f"--seed {seed} is outside 0 to {2**32 - 1}")
    if not lr > 0:
        raise GraspError(f"--lr {lr} is no learning rate: choose one above 0, as 0.01")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
