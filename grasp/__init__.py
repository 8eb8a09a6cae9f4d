"""grasp: structured pruning of large language models under an exact budget.

    import grasp

    grasp.plan("MODEL", keep=0.5)                       # what it will cost and give
    grasp.prune("MODEL", keep=0.5, out="DIR")           # a smaller dense checkpoint in DIR
    model, tokenizer = grasp.load("DIR")

Importing grasp also lets transformers' Auto classes load pruned checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from grasp.model.registration import register

__version__ = "0.1.0"

_HOMES = {
    "GraspError": "grasp.errors",
    "Mask": "grasp.budget.projection",
    "UnitSpace": "grasp.model.units",
    "blocks": "grasp.run.stages",
    "calibrate": "grasp.run.stages",
    "fold": "grasp.compress.fold",
    "learn": "grasp.run.stages",
    "perplexity": "grasp.run.stages",
    "project": "grasp.budget.projection",
    "Record": "grasp.checkpoint.record",
    "refit": "grasp.run.stages",
    "save": "grasp.checkpoint.save",
    "units": "grasp.model.units",
    "bench": "grasp.evaluate.bench",
    "criterion": "grasp.criteria",
    "compare": "grasp.run.compare",
    "evaluate_tasks": "grasp.evaluate.zero_shot",
    "evaluate_text": "grasp.evaluate.perplexity",
    "export": "grasp.checkpoint.export",
    "load": "grasp.model.load",
    "plan": "grasp.planning.plan",
    "prune": "grasp.run.prune",
    "sparsify": "grasp.run.sparsify",
    "verify": "grasp.checkpoint.verify",
}
__all__ = sorted(_HOMES)

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
