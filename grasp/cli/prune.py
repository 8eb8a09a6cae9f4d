"""`grasp prune`, `compare`, `sparsify` and `recover`: the verbs that make checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from grasp.cli.app import app
from grasp.cli.options import (
    Folder,
    Json,
    Limit,
    Model,
    Out,
    Tasks,
    TasksData,
    check_tasks,
    parse_counts,
    with_options,
)
from grasp.cli.output import print_json, print_line, print_table
from grasp.cli.progress import progress
from grasp.config import (
    CALIBRATION,
    COMPARED_WIDTHS,
    KEEP,
    SEEDS,
    SET_BY_COMPARE,
    PruneConfig,
    RecoverConfig,
    SparsifyConfig,
)

OPTIONS = PruneConfig.options()
PRUNED = OPTIONS | {
    "keep": replace(
        OPTIONS["keep"],
        help="Part of the prunable parameters to keep, or several (default: 0.5).",
        metavar="RATIOS",
    )
}
COMPARED = {
    name: replace(option, default=COMPARED_WIDTHS.get(name, option.default))
    for name, option in OPTIONS.items()
    if name not in SET_BY_COMPARE
} | {
    "keep": replace(
        OPTIONS["keep"],
        help="Parts of the prunable parameters to keep.",
        metavar="RATIOS",
        default=",".join(map(str, KEEP)),
    )
}


@app.command("prune")
@with_options(PRUNED)
def prune_command(model: Model, out: Out, *, as_json: Json = False, **options: Any) -> None:
    """Select, cut, compensate, calibrate, save, evaluate: a smaller dense checkpoint in --out."""
    from grasp.run.ready import ready

    keep = options.pop("keep", None)
    ready(model, out, keep, **options)  # before torch is imported, which takes seconds
    from grasp.report.summary import measured_on, size_rows
    from grasp.run.prune import prune

    with progress() as show:
        made: Any = prune(model, out, keep=keep, show=show, **options)
    results = made if isinstance(made, list) else [made]
    if as_json:
        summaries = [result.summary for result in results]
        print_json(summaries if isinstance(made, list) else summaries[0])
        return
    for result in results:
        print_table(("", "dense", "pruned", ""), size_rows(result.record), result.folder)
    print_line(measured_on(results[0].record))


@app.command("compare")
@with_options(COMPARED)
def compare_command(
    model: Model,
    out: Out,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="As learned,fisher,fisher+blocks (default: all)."),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            parser=parse_counts, metavar="NUMBERS", help="Every method runs once per seed."
        ),
    ] = ",".join(map(str, SEEDS)),
    *,
    tasks: Tasks = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Every method at every budget with every seed: tables and a plot in --out."""
    from grasp.run.ready import ready

    check_tasks(tasks, tasks_data, limit)
    options["seeds"] = seeds
    shared = {name: value for name, value in options.items() if name in OPTIONS}
    ready(model, out, **{"keep": KEEP} | COMPARED_WIDTHS | shared)  # before torch is imported
    from grasp.report.comparison import explained, perplexity_table
    from grasp.run.compare import compare

    if methods is not None:
        options["methods"] = methods.split(",")
    with progress() as show:
        result = compare(
            model, out, tasks=tasks, tasks_data=tasks_data, limit=limit, show=show, **options
        )
    if as_json:
        print_json(result.summary)
        return
    print_table(*perplexity_table(result.summary), result.folder)
    print_line(explained(result.summary))


@app.command("sparsify")
@with_options(SparsifyConfig.options())
def sparsify_command(model: Model, out: Out, *, as_json: Json = False, **options: Any) -> None:
    """Zeros in a pattern such as 2:4, stored dense: the same model, sparse, in --out."""
    from grasp.run.ready import check_run

    check_run(SparsifyConfig.of(model, **options), out)  # before torch is imported
    from grasp.report.summary import measured_on, size_rows
    from grasp.run.sparsify import sparsify

    with progress() as show:
        result = sparsify(model, out, show=show, **options)
    if as_json:
        print_json(result.summary)
        return
    print_table(("", "dense", "sparse", ""), size_rows(result.record), result.folder)
    print_line(measured_on(result.record))


@app.command("recover")
@with_options(RecoverConfig.options())
def recover_command(
    folder: Folder,
    out: Out,
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="The dense model that DIR was pruned from.")
    ],
    calibration: Annotated[
        str, typer.Option(help=f"Text to learn from, other than DIR was pruned with. {CALIBRATION}")
    ],
    *,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print steps, memory and time, and do nothing.")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Distillation after pruning: the same widths, better weights, in --out."""
    from grasp.run.ready import check_recovery

    config = RecoverConfig.of(folder, teacher=teacher, calibration=calibration, **options)
    headers = check_recovery(config, out)  # before torch is imported
    if plan:
        from grasp.model.load import pick_device
        from grasp.planning.recovery import plan_recovery

        if config.device == "auto":
            config = replace(config, device=pick_device("auto"))
        planned = plan_recovery(config, *headers)
        print_json(planned.to_json()) if as_json else print(planned)
        return
    from grasp.report.summary import measured_on, recovered, size_rows
    from grasp.run.recover import recover

    given: Any = dict(teacher=teacher, calibration=calibration, **options)
    with progress() as show:
        result = recover(folder, out, show=show, **given)
    if as_json:
        print_json(result.summary)
        return
    print_table(("", "dense", "recovered", ""), size_rows(result.record), result.folder)
    print_line(recovered(result.record))
    print_line(measured_on(result.record))
