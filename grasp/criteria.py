"""The registry of criteria: how each scores units, its source, and what it needs.

Ours are listed below. Register your own in one of two ways; it then works in `method`, `compare`
and reports like ours:

    @grasp.criterion("mine", help="my scores")          # in a program
    def my_scores(model, units): ...

    [project.entry-points."grasp.criteria"]             # in an installed package
    mine = "my_package:my_scores"

A function receives the arguments that its parameters name: `model`, `units` (UnitSpace), `blocks`
(int64 [samples, seq_len]), `journal` (progress, and state to resume from), `projection`, `config`
(PruneConfig), `stage` (a journal by name) and `teacher` (the dense model's
last hidden states, [samples, seq_len, hidden], or None). It returns scores, fp32 [units.size]; the
highest are kept. Only their order matters, not their scale.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from grasp.errors import GraspError, reason

GROUP = "grasp.criteria"
OFFERED = ("model", "units", "blocks", "journal", "projection", "config", "stage", "teacher")
Scores = TypeVar("Scores", bound=Callable[..., Any])


@dataclass(frozen=True)
class Criterion:
    """A named way to score units. Its code is imported when it is first called."""

    name: str
    home: str | Callable[..., Any]  # "module:function"
    help: str
    reference: str = ""  # the paper
    samples: int | None = None  # blocks that it reads; None: all
    learns: bool = False  # makes `epochs` passes over the blocks
    per_budget: bool = False  # its scores hold for one budget only
    updates_weights: bool = False  # refits weights while it selects: `compensate` must be none
    layerwise: bool = False  # runs decoder layers one by one
    shardable: bool = False  # reads no weights: ranks may hold parts of them
    experts: bool = False  # scores the routed experts of a mixture
    dense: bool = True  # scores FFN channels and KV groups; if not, they are kept

    def __call__(self, **offered: Any) -> Any:
        """Call the function with those of `offered` that its parameters name."""
        function = self.home
        if isinstance(function, str):
            module, _, name = function.partition(":")
            function = getattr(importlib.import_module(module), name)
        return function(**{name: offered[name] for name in inspect.signature(function).parameters})


GREEDY = "arXiv 2407.19126"
OURS = (
    Criterion(
        "learned",
        "grasp.select.learned:learned",
        "gates learned under the budget",
        "GRASPrune, arXiv 2604.19398",
        learns=True,
        per_budget=True,
        shardable=True,
        experts=True,
    ),
    Criterion(
        "free",
        "grasp.select.learned:free",
        "gates learned with every unit open, then projected once",
        learns=True,
        shardable=True,
        experts=True,
    ),
    Criterion(
        "fisher",
        "grasp.select.fisher:fisher_scores",
        "squared gradient of the loss with respect to each gate, one backward pass per sample",
        samples=32,
        shardable=True,
        experts=True,
    ),
    Criterion(
        "taylor",
        "grasp.select.taylor:taylor_scores",
        "|gradient x weight|, summed over the weights of a unit",
        "LLM-Pruner, arXiv 2305.11627",
        samples=10,  # as published; the mean of more gradients approaches 0
        experts=True,
    ),
    Criterion(
        "output-approximation",
        "grasp.select.output_approximation:output_approximation_scores",
        "second moment of a unit's contribution to the output",
        GREEDY,
    ),
    Criterion(
        "greedy-output-approximation",
        "grasp.select.greedy_output_approximation:greedy_output_approximation",
        "as output-approximation, module by module, each fitted after its cut",
        GREEDY,
        per_budget=True,
        updates_weights=True,
        layerwise=True,
    ),
    Criterion(
        "greedy-head-similarity",
        "grasp.select.greedy_output_approximation:greedy_head_similarity",
        "as greedy-output-approximation, but heads are scored by similarity to others",
        GREEDY,
        per_budget=True,
        updates_weights=True,
        layerwise=True,
    ),
    Criterion(
        "flap",
        "grasp.select.flap:flap_scores",
        "variance of a channel times its squared weight norm",
        "arXiv 2312.11983",
    ),
    Criterion(
        "wanda-sp",
        "grasp.select.wanda_sp:wanda_sp_scores",
        "mean |weight| times the norm of its input, with the same ratio in every module",
        "arXiv 2306.11695",
    ),
    Criterion(
        "wanda++",
        "grasp.select.wanda_plus_plus:wanda_plus_plus_scores",
        "as wanda-sp, plus the gradient of each decoder block's output norm",
        "arXiv 2503.04992",
        layerwise=True,
    ),
    Criterion(
        "reap",
        "grasp.select.reap:reap_scores",
        "mean router weight times output norm of an expert, over the tokens routed to it",
        "arXiv 2510.13999",
        experts=True,
        dense=False,
    ),
    Criterion(
        "frequency",
        "grasp.select.reap:frequency_scores",
        "tokens routed to an expert",
        experts=True,
        dense=False,
    ),
    Criterion(
        "magnitude",
        "grasp.select.magnitude:magnitude_scores",
        "mean square of a unit's weights",
        experts=True,
    ),
    Criterion(
        "random",
        "grasp.select.random:random_scores",
        "random scores, a baseline",
        shardable=True,
        experts=True,
    ),
)
_known = {criterion.name: criterion for criterion in OURS}


def criterion(name: str, *, help: str = "", **traits: Any) -> Callable[[Scores], Scores]:
    """Register the decorated function as a criterion; `traits` are further fields of `Criterion`.

    Raises GraspError if the name is taken or a parameter is not one of those offered.
    """

    def register(function: Scores) -> Scores:
        taken = _known.get(name)
        if taken is not None and taken.home is not function:
            raise GraspError(f"criterion {name!r} exists already: choose another name")
        unknown = sorted({*inspect.signature(function).parameters} - {*OFFERED})
        if unknown:
            raise GraspError(
                f"criterion {name!r} asks for {', '.join(unknown)}: its parameters may be "
                f"{', '.join(OFFERED)}"
            )
        _known[name] = Criterion(name, function, help or name, **traits)
        return function

    return register


def suits(name: str, *, mixture: bool) -> bool:
    """Whether a criterion scores what can go: in a mixture of experts, the experts too."""
    criterion = get(name)
    return criterion.experts if mixture else criterion.dense


def names() -> tuple[str, ...]:
    """The names that `method` accepts; this imports no criterion."""
    return tuple(dict.fromkeys([*_known, *_installed()]))


def get(name: str) -> Criterion:
    """The criterion called `name`. Raises GraspError: unknown, or its package fails to import."""
    if name not in _known:
        entry = _installed().get(name)
        if entry is None:
            raise GraspError(f"`method` must be one of {', '.join(names())}, got {name!r}")
        try:
            function = entry.load()
        except Exception as error:
            raise GraspError(f"method {name!r}: {entry.value}: {reason(error)}") from error
        if name not in _known:  # a plain function; a decorated one has registered itself
            criterion(name)(function)
    return _known[name]


@cache  # looking through what is installed takes longer than all else here
def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
