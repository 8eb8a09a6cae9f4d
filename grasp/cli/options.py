"""Options that verbs share, and the one way from a field to an option of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from grasp.options import EVALUATION, Option

Command = Callable[..., None]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a .gguf file, a hub name, or demo:smollm2-135m."
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint made by grasp.")]
Out = Annotated[Path, typer.Option(help="Folder of the result; must not exist.")]
Against = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A second model, as the dense one.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Tasks of lm-eval, as piqa,arc_easy.", rich_help_panel=EVALUATION
    ),
]
TasksData = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Documents as TASK.SPLIT.jsonl (default: from the hub).",
        rich_help_panel=EVALUATION,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="First documents of each task only.", rich_help_panel=EVALUATION),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record", help="Add the result to MODEL's report.html, README.md and grasp.json."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_options(options: Mapping[str, Option]) -> Callable[[Command], Command]:
    """The `**options` of a command become these; it receives those of them that were given.

    So a default is the Python function's own, and what a user did not say overrides nothing.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            *(p for p in own if p.kind is Parameter.POSITIONAL_OR_KEYWORD),
            Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(_parameter(name, option) for name, option in options.items()),
            *(p for p in own if p.kind is Parameter.KEYWORD_ONLY),
        ]

        @wraps(command)
        def run(context: typer.Context, **values: Any) -> None:
            for name in options:
                source = context.get_parameter_source(name)
                if source is None or source.name == "DEFAULT":
                    del values[name]
            command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(name: str, option: Option) -> Parameter:
    help, parse, flag = option.help, PARSERS.get(name), option.type is bool
    if option.choices is not None:
        help += f": {', '.join(option.choices())}."
    info = typer.Option(
        None if option.default == () else option.default,
        *([f"--{name.replace('_', '-')}"] if flag else []),  # without its negation
        help=help,
        metavar=option.metavar,
        parser=parse,
        rich_help_panel=option.panel,
    )
    kind: Any = str | None if parse else option.type
    if kind == tuple[str, ...]:  # given once for each
        kind = list[str]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=info, annotation=kind)


def parse_ratios(text: str) -> float | list[float]:
    """0.5 as a number, 0.8,0.5 as a list."""
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected a number or a list such as 0.8,0.5, got {text!r}"
        ) from None
    return parts if len(parts) > 1 else parts[0]


def parse_count(text: str) -> float:
    """3.5B, 120M, 800k or a plain number."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        return round(float(text[:-1]) * unit) if unit else float(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"expected a number such as 3500000000, 3.5B or 120M, got {text!r}"
        ) from None


def parse_counts(text: str) -> list[int]:
    """1,4 as a list."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected a list of whole numbers such as 1,4, got {text!r}"
        ) from None


PARSERS: dict[str, Callable[[str], Any]] = {
    "keep": parse_ratios,
    "params": parse_count,
    "protect": parse_counts,
}


def check_tasks(tasks: str | None, data: str | None, limit: int | None) -> None:
    """Refuse options of tasks where there are none."""
    if not tasks and (limit is not None or data is not None):
        raise typer.BadParameter("--limit and --tasks-data are for --tasks, which is not given")
