"""What a run was asked to do: everything that decides its result, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from grasp.budget import Budget
from grasp.errors import GraspError

Method = Literal["learned", "fisher", "magnitude", "random"]


@dataclass(frozen=True)
class PruneConfig:
    """The options of `grasp prune`. Two runs with equal values end in the same checkpoint."""

    model: str
    budget: Budget
    method: Method = "learned"
    calibration: str = "builtin"
    text_field: str = "text"
    samples: int = 512
    seq_len: int = 512
    epochs: int = 4
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-2
    start: Literal["fisher", "equal"] = "fisher"
    anneal: float = 0.5
    gate_site: Literal["output", "kv"] = "output"
    scale_epochs: int = 1
    eval_text: str | None = None
    eval_seq_len: int = 2048
    eval_windows: int | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--epochs", self.epochs, 1),
            ("--batch-size", self.batch_size, 1),
            ("--accumulate", self.accumulate, 1),
            ("--scale-epochs", self.scale_epochs, 0),
        ):
            if value < least:
                raise GraspError(f"{name} {value} is too small: choose at least {least}")
        if not self.lr > 0:
            raise GraspError(
                f"--lr {self.lr} is no learning rate: choose one above 0, such as 0.01"
            )
        if not 0 <= self.anneal <= 1:
            raise GraspError(f"--anneal {self.anneal} is no part of the run: choose one in [0, 1]")

    def as_published(self) -> PruneConfig:
        """The paper's own setting: gates on K and V, equal scores, full pressure from step one."""
        budget = replace(self.budget, ffn_multiple=1, kv_multiple=1, layout="per-layer")
        return replace(
            self,
            budget=budget,
            method="learned",
            start="equal",
            anneal=0.0,
            gate_site="kv",
            batch_size=1,
            accumulate=1,
            lr=1e-2,
            epochs=4,
            scale_epochs=1,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
