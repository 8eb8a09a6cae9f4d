"""The command `grasp`, to which each file of verbs adds its own."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any

import typer
from typer.main import get_command

from grasp import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
FIELD = re.compile(r"`(\w+)(?:=([^`]+))?`")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"grasp {__version__}")
        raise typer.Exit


@app.callback()
def grasp_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Structured pruning of large language models under an exact budget."""


def as_options(text: str) -> str:
    """`seq_len` as --seq-len, `layout='uniform'` as --layout uniform: for who reads a terminal."""
    return FIELD.sub(_as_option, text)


def _as_option(field: re.Match[str]) -> str:
    name, value = field.groups()
    if name not in _options():
        return field[0]
    return _options()[name] + (f" {value.strip(chr(39))}" if value and value != "True" else "")


@cache
def verbs() -> Any:
    """All verbs as one command of click, built once: that takes 20 ms."""
    return get_command(app)


@cache
def _options() -> dict[str, str]:
    """Options of all verbs by their fields: seq_len -> --seq-len."""
    return {
        option.name: option.opts[0]
        for verb in verbs().commands.values()
        for option in verb.params
        if option.param_type_name == "option"
    }
