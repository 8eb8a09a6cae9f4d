"""`grasp verify`, `show` and `export`: the verbs that read a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.app import app
from grasp.cli.options import Folder, Json
from grasp.cli.output import print_json, print_line, print_table
from grasp.cli.progress import progress, steps_of


@app.command("verify")
def verify_command(folder: Folder, as_json: Json = False) -> None:
    """Is this checkpoint what it says it is? Exit code 1 if not."""
    from rich.text import Text

    from grasp.checkpoint.verify import verify

    report = verify(folder)
    if as_json:
        print_json(asdict(report))
    else:
        for check in report.checks:
            mark = Text("ok  ", "green") if check.passed else Text("FAIL", "red")
            print_line(mark.append(f" {check.name}: {check.detail}", "default"))
    if not report.passed:
        raise typer.Exit(1)


@app.command("show")
def show_command(folder: Folder, as_json: Json = False) -> None:
    """What was kept, layer by layer."""
    from grasp.checkpoint.record import Record
    from grasp.report.summary import kept_units, layer_rows, measured_on, recovered, size_rows

    record = Record.read(folder)
    if as_json:
        print_json(record.to_json())
        return
    head, columns = ["layer"], [[index for index, *_ in layer_rows(record)]]
    for kind, units in kept_units(record).items():
        if kind == "KV groups":
            head += [kind]
            columns += [["●" * kept + "○" * (of - kept) for kept, of in units]]
        else:
            head += [kind, ""]
            columns += [[f"{kept} / {of}" for kept, of in units]]
            columns += [["█" * round(20 * kept / of) if of else "" for kept, of in units]]
    print_table(head, list(zip(*columns, strict=True)), folder)
    for what, dense, pruned, ratio in size_rows(record):
        print_line(f"{what}: {dense} -> {pruned} ({ratio})")
    if record.recovery:
        print_line(recovered(record))
    print_line(measured_on(record))


@app.command("export")
def export_command(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint made by grasp, or any MODEL.")
    ],
    out: Annotated[Path, typer.Option(help="File or folder of the result; must not exist.")],
    to: Annotated[
        str, typer.Option(help="gguf (for llama.cpp) or hf-uniform (stock class, zero-padded).")
    ] = "gguf",
    type: Annotated[
        str | None,
        typer.Option(help="Type of GGUF matrices: f32, f16, bf16 or q8_0 (default: f16)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in the format of another runtime."""
    from grasp.checkpoint.export import export

    with progress() as show:
        result = export(model, out, to=to, type=type, progress=steps_of("export", show))
    if as_json:
        print_json(asdict(result))
    else:
        print_line(str(result))
