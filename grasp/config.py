"""What a run was asked to do: everything a user can choose that decides its result."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from grasp import criteria
from grasp.budget.budget import Budget
from grasp.budget.pattern import Pattern
from grasp.errors import GraspError
from grasp.model.load import ShardMode, check_device
from grasp.options import (
    ABLATION,
    EVALUATION,
    LEARNING,
    MACHINE,
    Option,
    check_choices,
    check_least,
    option,
    options_of,
)

InitScores = Literal["fisher", "equal"]
GateSite = Literal["output", "kv"]
Schedule = Literal["cosine", "constant"]
ScaleKind = Literal["channel", "unit"]
Compensation = Literal["auto", "refit", "blocks", "bias", "none"]
Dtype = Literal["auto", "fp32", "bf16"]
Runtime = Literal["auto", "vllm"]  # auto: transformers, or llama.cpp for a .gguf file
MemoryMode = Literal["auto", "fast", "balanced", "low"]
PlannedDtype = Literal["fp32", "bf16"]  # "auto" depends on the machine; a plan needs a choice
PlannedMemory = Literal["fast", "balanced", "low"]
SparseMethod = Literal["wanda++", "wanda", "sparsegpt", "magnitude"]

RECOMPUTE_EVERY = {"low": 1, "balanced": 2}  # every n-th layer, the first included
TOKENS_PER_CHANNEL = 16  # of the widest FFN, that refit sees; its matrices change little with more
BLOCK_ROUNDS = 3  # of block reconstruction over its text, at most
ENOUGH_TOKENS = 200_000  # in all its rounds
PUBLISHED = {  # the choices of the paper (arXiv 2604.19398) where our defaults are others
    "method": "learned",
    "init_scores": "equal",
    "schedule": "constant",
    "lm_weight": 1.0,
    "anneal": 0.0,
    "gate_site": "kv",
    "compensate": "none",
    "scales": "unit",
    "scale_decay": 0.0,
}
PUBLISHED_WIDTHS = {"ffn_multiple": 1}
HELD_OUT = 8  # every so many-th block is held out of fits, and chooses their ridge
FITTING_SAMPLES = 3  # the least that criteria which fit weights can divide
RATE, LORA_RATE = 1e-4, 1e-3  # of recovery
KEEP = (0.8, 0.5, 0.4)  # what `compare` measures unless it is told
SEEDS = (0, 1, 2)
COMPARED_WIDTHS = {"ffn_multiple": 1}
SET_BY_COMPARE = {"params", "kv_cache", "method", "compensate", "seed", "as_published"}
CALIBRATION = (
    "Text, JSON-lines, CSV or Parquet file, hub data set, self, or builtin; several as "
    "a.txt,b.jsonl:0.3, with weights."
)
TEXT_FIELD = "Field or column that holds texts or conversations."
EVAL_TEXT = "Text to evaluate on, once for each text (default: calibration text that was not used)."
EVAL_SEQ_LEN = "Tokens per window of --eval-text; windows of held-out text are as long as blocks."
EVAL_WINDOWS = "Evaluate on the first windows only (default: all)."
SHARD = (
    "Under torchrun, the frozen weights lie on each rank (none), in parts over the ranks of each "
    "machine (node), or over all (full)."
)
DEVICE = "cpu, cuda, cuda:1, or auto."
SEED = "Seed of everything that is drawn at random."
MEMORY = (
    "Which layers are recomputed to save memory: fast (none), balanced (every second), low (all), "
    "or auto (by the free memory)."
)
REMOTE_CODE = "Run code that comes with the model."


@dataclass(frozen=True)
class PruneConfig:
    """The options of `grasp prune`, with their defaults. Raises GraspError on impossible values."""

    model: str
    budget: Budget
    method: str = option(
        "learned", "How units are scored", metavar="NAME", choices=criteria.names
    )  # a name in grasp.criteria
    calibration: str = option("builtin", CALIBRATION)
    text_field: str = option("text", TEXT_FIELD)
    samples: int = option(512, "Blocks of calibration text.")
    seq_len: int = option(512, "Tokens per block.")
    epochs: int = option(4, "Passes over the blocks while gates learn.", LEARNING)
    batch_size: int = option(1, "Blocks per forward pass.", LEARNING)
    accumulate: int = option(1, "Forward passes per step.", LEARNING)
    lr: float = option(1e-2, "Learning rate of gates and scales.", LEARNING)
    lm_weight: float = option(
        1.0,
        "Weight of the next-token loss while gates and scales learn; the rest is the KL divergence "
        "from the dense model's predictions.",
        LEARNING,
    )
    schedule: Schedule = option(
        "cosine", "Learning rate schedule of the scales that learn after the mask.", ABLATION
    )
    init_scores: InitScores = option("fisher", "Initial scores.", ABLATION)
    anneal: float = option(0.5, "Part of the steps over which the budget shrinks.", ABLATION)
    gate_site: GateSite = option("output", "Where attention gates sit.", ABLATION)
    compensate: Compensation = option(
        "auto",
        "What makes up for the dropped units: blocks (each layer's weights learn to give the dense "
        "hidden states), refit (least squares on the kept ones), bias (FLAP's), none, or auto "
        "(blocks, but none where the method updates weights).",
        metavar="HOW",
    )
    scales: ScaleKind = option(
        "channel", "One scale per channel (trained together with the gates), or per unit.", ABLATION
    )
    scale_epochs: int = option(1, "Passes over the blocks while scales learn.", LEARNING)
    scale_decay: float = option(1.0, "Decay rate that pulls scales towards 1, per epoch.", ABLATION)
    eval_text: tuple[str, ...] = option((), EVAL_TEXT, EVALUATION)
    eval_seq_len: int = option(2048, EVAL_SEQ_LEN, EVALUATION)
    eval_windows: int | None = option(None, EVAL_WINDOWS, EVALUATION)
    dtype: Dtype = option("auto", "Data type of the frozen model.", MACHINE)
    memory: MemoryMode = option("auto", MEMORY, MACHINE, metavar="MODE")
    shard: ShardMode = option("none", SHARD, MACHINE)
    device: str = option("auto", DEVICE, MACHINE)
    seed: int = option(0, SEED)
    trust_remote_code: bool = option(False, REMOTE_CODE, MACHINE)

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(
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
        _check_part(self, "anneal", "lm_weight")
        if not 0 <= self.scale_decay < math.inf:
            raise GraspError(
                f"`scale_decay` must be a finite number from 0 up, got {self.scale_decay}"
            )
        updates = criteria.get(self.method).updates_weights
        if updates and self.compensate not in ("auto", "none"):
            raise GraspError(
                f"`compensate` must be none with {self.method}, which fits weights as it chooses, "
                f"got {self.compensate!r}"
            )
        if self.compensation == "blocks" and self.samples < 2:
            raise GraspError(
                "`samples` must be at least 2 with `compensate='blocks'`, which checks on some of "
                f"them, got {self.samples}"
            )
        if updates and self.samples < FITTING_SAMPLES:
            raise GraspError(
                f"`samples` must be at least {FITTING_SAMPLES} with {self.method}, which scores, "
                f"fits and checks on different ones, got {self.samples}"
            )

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What `of` accepts besides the model, by name."""
        published = Option(
            "The paper's own setting; options that it sets may not be given otherwise.",
            ABLATION,
            type=bool,
            default=False,
        )
        return {**Budget.options(), **options_of(cls), "as_published": published}

    @classmethod
    def of(
        cls, model: str | os.PathLike[str], *, as_published: bool = False, **options: Any
    ) -> PruneConfig:
        """From what a user says: the budget in parts (see `Budget.of`), paths as they come."""
        if as_published:
            _check_published(options)
            options |= PUBLISHED | PUBLISHED_WIDTHS
        budget = {name: options.pop(name) for name in Budget.options() if name in options}
        return cls(os.fspath(model), Budget.of(**budget), **_plain(options))

    @property
    def distils(self) -> bool:
        """Whether gates or scales learn from the dense model's predictions."""
        return self.lm_weight < 1 and (criteria.get(self.method).learns or self.scale_epochs > 0)

    @property
    def compensation(self) -> Literal["refit", "blocks", "bias", "none"]:
        """`compensate` with "auto" resolved."""
        if self.compensate == "auto":
            return "none" if criteria.get(self.method).updates_weights else "blocks"
        return self.compensate

    @property
    def block_tokens(self) -> int:
        """Tokens that each layer learns from in block reconstruction, in all rounds; 0 without."""
        if self.compensation != "blocks":
            return 0
        tokens = self.seq_len * (self.samples - self.samples // min(HELD_OUT, self.samples))
        return tokens * block_rounds(tokens)

    def as_published(self) -> PruneConfig:
        """With the paper's choices where our defaults are others; ties and floors stay ours."""
        widths: Any = PUBLISHED_WIDTHS
        choices: Any = PUBLISHED
        return replace(self, budget=replace(self.budget, **widths), **choices)

    def to_json(self) -> dict[str, Any]:
        """What decides the result: a run may go on under another `memory` or `shard`."""
        recipe = asdict(self) | {"compensate": self.compensation, "eval_text": [*self.eval_text]}
        recipe["budget"]["protect"] = [*self.budget.protect]  # as JSON reads it back
        del recipe["memory"], recipe["shard"]
        return recipe


@dataclass(frozen=True)
class SparsifyConfig:
    """The options of `grasp sparsify`, with their defaults. Raises GraspError on impossible values.

    `rounds` and `lr` are those of Wanda++'s regional optimisation (see `by_wanda_plus_plus`).
    """

    model: str
    pattern: str = option("2:4", "2:4 or 4:8 keeps N of M inputs; 0.5 zeroes a part of each row.")
    method: SparseMethod = option("wanda++", "How weights are chosen.")
    calibration: str = option("builtin", CALIBRATION)
    text_field: str = option("text", TEXT_FIELD)
    samples: int = option(128, "Blocks of calibration text.")
    seq_len: int = option(512, "Tokens per block.")
    rounds: int = option(5, "Rounds of Wanda++'s regional optimisation.", LEARNING)
    lr: float = option(
        1e-2,
        "Step size of Wanda++'s regional optimisation, relative to the output of each matrix.",
        LEARNING,
    )
    eval_text: tuple[str, ...] = option((), EVAL_TEXT, EVALUATION)
    eval_seq_len: int = option(2048, EVAL_SEQ_LEN, EVALUATION)
    eval_windows: int | None = option(None, EVAL_WINDOWS, EVALUATION)
    shard: ShardMode = option("none", SHARD, MACHINE)
    device: str = option("auto", DEVICE, MACHINE)
    seed: int = option(0, SEED)
    trust_remote_code: bool = option(False, REMOTE_CODE, MACHINE)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What `of` accepts besides the model, by name."""
        return options_of(cls)

    @classmethod
    def of(cls, model: str | os.PathLike[str], **options: Any) -> SparsifyConfig:
        """From what a user says, paths as they come."""
        return cls(os.fspath(model), **_plain(options))

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        check_choices(self)
        check_least(self, samples=1, seq_len=2, rounds=0, eval_seq_len=2, eval_windows=1)
        _check_draw(self.seed, self.lr)
        check_device(self.device)

    def to_json(self) -> dict[str, Any]:
        """What decides the result: a run may go on under another `shard`."""
        recipe = asdict(self) | {"eval_text": [*self.eval_text]}
        del recipe["shard"]
        return recipe


@dataclass(frozen=True)
class RecoverConfig:
    """The options of `grasp recover`, with their defaults. Raises GraspError on impossible values.

    `model` is the pruned checkpoint, `teacher` the dense model, `calibration` the text to train on.
    """

    model: str
    teacher: str
    calibration: str
    text_field: str = option("text", TEXT_FIELD)
    samples: int = option(2048, "Blocks of text, the held-out ones included.")
    held_out: int = option(16, "Blocks of these that are watched and not trained on.")
    seq_len: int = option(512, "Tokens per block.")
    epochs: int = option(1, "Passes over the blocks.", LEARNING)
    batch_size: int = option(1, "Blocks per forward pass.", LEARNING)
    accumulate: int = option(8, "Forward passes per step.", LEARNING)
    lr: float | None = option(
        None, f"Highest learning rate (default: {RATE:g}, or {LORA_RATE:g} with LoRA).", LEARNING
    )
    warmup: float = option(0.05, "Part of the steps over which the rate rises.", LEARNING)
    lora_rank: int | None = option(
        None, "Train LoRA adapters of this rank, then merge them (default: all weights).", LEARNING
    )
    lm_weight: float = option(
        0.5,
        "Weight of the next-token loss; the rest is the KL divergence from the teacher's "
        "predictions.",
        LEARNING,
    )
    watch_every: int = option(25, "Steps between looks at the held-out blocks.", LEARNING)
    patience: int = option(4, "Looks without a lower loss before training stops.", LEARNING)
    eval_text: tuple[str, ...] = option((), EVAL_TEXT, EVALUATION)
    eval_seq_len: int = option(2048, EVAL_SEQ_LEN, EVALUATION)
    eval_windows: int | None = option(None, EVAL_WINDOWS, EVALUATION)
    dtype: Dtype = option("auto", "Data type to compute in; weights that learn are fp32.", MACHINE)
    memory: MemoryMode = option("auto", MEMORY, MACHINE, metavar="MODE")
    device: str = option("auto", DEVICE, MACHINE)
    seed: int = option(0, SEED)
    trust_remote_code: bool = option(False, REMOTE_CODE, MACHINE)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What `of` accepts besides the model, the teacher and the text, by name."""
        return options_of(cls)

    @classmethod
    def of(cls, model: str | os.PathLike[str], **options: Any) -> RecoverConfig:
        """From what a user says, paths as they come."""
        return cls(os.fspath(model), **_plain(options))

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(
            self,
            samples=2,
            held_out=1,
            seq_len=2,
            epochs=1,
            batch_size=1,
            accumulate=1,
            lora_rank=1,
            watch_every=1,
            patience=1,
            eval_seq_len=2,
            eval_windows=1,
        )
        _check_draw(self.seed, self.rate)
        check_device(self.device)
        _check_part(self, "lm_weight", "warmup")
        if self.held_out >= self.samples:
            raise GraspError(
                f"`held_out` must be below `samples` ({self.samples}), got {self.held_out}"
            )

    @property
    def rate(self) -> float:
        """The highest learning rate, by default ten times as high for adapters."""
        return self.lr if self.lr is not None else LORA_RATE if self.lora_rank else RATE

    @property
    def steps(self) -> int:
        """The steps of a run that does not stop early."""
        blocks = self.epochs * (self.samples - self.held_out)
        return math.ceil(blocks / (self.batch_size * self.accumulate))

    def to_json(self) -> dict[str, Any]:
        """What decides the result: a run may go on under another `memory`."""
        recipe = asdict(self) | {"lr": self.rate, "eval_text": [*self.eval_text]}
        del recipe["memory"]
        return recipe


RunConfig = PruneConfig | SparsifyConfig | RecoverConfig


def block_rounds(tokens: int) -> int:
    """Rounds of block reconstruction over a text of so many tokens: the more the fewer."""
    return min(BLOCK_ROUNDS, max(1, round(ENOUGH_TOKENS / tokens)))


def window(config: RunConfig, longest: int | None) -> int:
    """Tokens per window of the evaluation; text that was held out has windows like its blocks."""
    asked = config.eval_seq_len if config.eval_text else config.seq_len
    return min(asked, longest or asked)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Paths as text, and texts to evaluate on as a tuple, however many there are."""
    plain = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    if "eval_text" in plain:
        plain["eval_text"] = named_texts(plain["eval_text"])
    return plain


def named_texts(given: str | os.PathLike[str] | Sequence[str] | None) -> tuple[str, ...]:
    """The names of texts, given as none, one, or several. Raises GraspError if one is repeated."""
    if given is None:
        return ()
    names = [given] if isinstance(given, str | os.PathLike) else given
    texts = tuple(os.fspath(name) for name in names)
    for name in texts:
        if texts.count(name) > 1:
            raise GraspError(f"`eval_text` names {name} twice: give it once")
    return texts


def _check_published(options: dict[str, Any]) -> None:
    for name, value in {**PUBLISHED_WIDTHS, **PUBLISHED}.items():
        if (given := options.get(name, value)) != value:
            raise GraspError(
                f"`as_published` sets `{name}` to {value!r}, got {given!r}: leave out one of them"
            )


def _check_part(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise GraspError(f"`{name}` must be between 0 and 1, got {value}")


def _check_draw(seed: int, lr: float) -> None:
    if not 0 <= seed < 2**32:
        raise GraspError(f"`seed` must be between 0 and {2**32 - 1}, got {seed}")
    if not 0 < lr < math.inf:
        raise GraspError(f"`lr` must be a finite number above 0, got {lr}")
