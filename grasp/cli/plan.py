"""`grasp plan`: the options of `prune`, answered without running anything."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from grasp.cli.app import app, as_options
from grasp.cli.options import Json, Model, with_options
from grasp.cli.output import print_json
from grasp.config import PlannedDtype, PlannedMemory, PruneConfig
from grasp.options import MACHINE

OPTIONS = PruneConfig.options()
# A plan may be for another machine, so it names what "auto" finds out about this one, and every
# way to lay weights over its GPUs.
PLANNED = {
    name: option for name, option in OPTIONS.items() if name not in ("dtype", "memory", "shard")
}


@app.command("plan")
@with_options(PLANNED)
def plan_command(
    model: Model,
    *,
    dtype: Annotated[
        PlannedDtype, typer.Option(help=OPTIONS["dtype"].help, rich_help_panel=MACHINE)
    ] = "bf16",
    memory: Annotated[
        PlannedMemory,
        typer.Option(
            help="Which layers are recomputed: none, every second, or all.", rich_help_panel=MACHINE
        ),
    ] = "fast",
    tokens_per_second: Annotated[
        float | None,
        typer.Option(help="Speed of your machine, for a time estimate.", rich_help_panel=MACHINE),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="GPUs of a machine, to plan for.", rich_help_panel=MACHINE),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GB of each of them.", rich_help_panel=MACHINE)
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="Number of machines with --gpus GPUs each.", rich_help_panel=MACHINE)
    ] = 1,
    as_json: Json = False,
    **options: Any,
) -> None:
    """What pruning with the same options will give and take, from config.json alone."""
    from grasp.planning.plan import plan

    result = plan(
        model,
        tokens_per_second=tokens_per_second,
        dtype=dtype,
        memory=memory,
        gpus=gpus,
        gpu_memory=gpu_memory,
        nodes=nodes,
        **options,
    )
    if as_json:
        print_json(result.to_json())
    else:
        print(as_options(str(result)))
