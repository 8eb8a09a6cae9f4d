"""What a user can choose, described once: on the field that holds it.

The command line, its help and the checks read the fields of `PruneConfig` and its neighbours, so an
option is added by adding a field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from grasp.errors import GraspError

# Panels of the help, below the main options.
LEARNING, EVALUATION, MACHINE = "Learning", "Evaluation", "Machine"
ABLATION = "Ablation"  # what only a comparison with the published method needs


@dataclass(frozen=True)
class Option:
    """One choice: its help text, the panel of the help that shows it, its type and default."""

    help: str
    panel: str | None = None
    metavar: str | None = None
    choices: Callable[[], Sequence[str]] | None = None  # where the type does not list them
    type: Any = None
    default: Any = None


def option(default: Any, help: str, panel: str | None = None, **more: Any) -> Any:
    """A dataclass field that is an option; `more` are further fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, panel, **more)})


def options_of(kind: Any) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name, in their order."""
    hints = get_type_hints(kind)
    return {
        own.name: replace(own.metadata["option"], type=hints[own.name], default=own.default)
        for own in fields(kind)
        if "option" in own.metadata
    }


def check_choices(config: Any) -> None:
    """Raise GraspError where a field of a dataclass is none of the words that its type lists."""
    for name, hint in get_type_hints(type(config)).items():
        choices, value = get_args(hint), getattr(config, name)
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise GraspError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def check_least(config: Any, **least: int) -> None:
    """Raise GraspError where a field is below the least that is given for it, unless it is None."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise GraspError(f"`{name}` must be at least {smallest}, got {value}")
