"""grasp: structured pruning of large language models under an exact budget.

    import grasp

    grasp.plan("MODEL", keep=0.5)                       # what it will cost and give
    grasp.prune("MODEL", keep=0.5, out="DIR")           # a smaller dense checkpoint in DIR
    model, tokenizer = grasp.load("DIR")

Importing grasp also lets transformers' Auto classes load pruned checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grasp.model.registration import register

if TYPE_CHECKING:  # the same names for type checkers; test_house holds them together
    from grasp.budget.projection import Mask as Mask
    from grasp.budget.projection import project as project
    from grasp.checkpoint.export import export as export
    from grasp.checkpoint.record import Record as Record
    from grasp.checkpoint.save import save as save
    from grasp.checkpoint.verify import verify as verify
    from grasp.compress.fold import fold as fold
    from grasp.criteria import criterion as criterion
    from grasp.errors import GraspError as GraspError
    from grasp.evaluate.bench import bench as bench
    from grasp.evaluate.perplexity import evaluate_text as evaluate_text
    from grasp.evaluate.perplexity import evaluate_texts as evaluate_texts
    from grasp.evaluate.zero_shot import evaluate_tasks as evaluate_tasks
    from grasp.model.load import load as load
    from grasp.model.units import UnitSpace as UnitSpace
    from grasp.model.units import units as units
    from grasp.planning.plan import plan as plan
    from grasp.run.compare import compare as compare
    from grasp.run.prune import prune as prune
    from grasp.run.recover import recover as recover
    from grasp.run.sparsify import sparsify as sparsify
    from grasp.run.stages import blocks as blocks
    from grasp.run.stages import calibrate as calibrate
    from grasp.run.stages import learn as learn
    from grasp.run.stages import perplexity as perplexity
    from grasp.run.stages import reconstruct as reconstruct
    from grasp.run.stages import refit as refit

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
    "reconstruct": "grasp.run.stages",
    "refit": "grasp.run.stages",
    "save": "grasp.checkpoint.save",
    "units": "grasp.model.units",
    "bench": "grasp.evaluate.bench",
    "criterion": "grasp.criteria",
    "compare": "grasp.run.compare",
    "evaluate_tasks": "grasp.evaluate.zero_shot",
    "evaluate_text": "grasp.evaluate.perplexity",
    "evaluate_texts": "grasp.evaluate.perplexity",
    "export": "grasp.checkpoint.export",
    "load": "grasp.model.load",
    "plan": "grasp.planning.plan",
    "prune": "grasp.run.prune",
    "recover": "grasp.run.recover",
    "sparsify": "grasp.run.sparsify",
    "verify": "grasp.checkpoint.verify",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
