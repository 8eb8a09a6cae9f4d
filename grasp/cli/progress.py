"""The line on stderr that follows a long run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grasp.cli.app import as_options
from grasp.distributed import is_first

Show = Callable[[dict[str, Any]], None]


@contextmanager
def progress() -> Iterator[Show]:
    """One line that follows log records: stage, bar, loss, kept, tokens/s, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:16}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        disable=not (console.is_terminal and is_first()),
    ) as bars:
        task = bars.add_task("loading", total=None, note="")

        def show(record: dict[str, Any]) -> None:
            if not is_first():
                return
            if "step" in record:
                bars.update(
                    task,
                    description=record["stage"],
                    completed=record["step"],
                    total=record["steps"],
                    note=note(record),
                )
                if record["step"] == record["steps"]:
                    bars.console.print(
                        f"{record['stage']}: {note(record)}",
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )
            elif record["event"] in ("resumed", "note"):
                said = as_options(record.get("text", "resumed"))
                bars.console.print(said, markup=False, highlight=False, soft_wrap=True)

        yield show


def steps_of(stage: str, show: Show) -> Callable[[int, int], None]:
    """The `progress` of functions that count steps of one stage."""
    return lambda step, steps: show({"stage": stage, "step": step, "steps": steps})


def note(record: dict[str, Any]) -> str:
    """What a log record says beside its step: loss, kept cost, speed, time left."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "held_out" in record:
        parts.append(f"held out {record['held_out']:.3f}")
    if "cost" in record:
        parts.append(
            f"kept {record['cost'] / record['of']:.2%} of {record['limit'] / record['of']:.2%}"
        )
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
    if record.get("eta"):
        minutes, seconds = divmod(round(record["eta"]), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    return "  ".join(parts) or f"{record['step']} of {record['steps']}"
