"""`grasp eval` and `bench`: the verbs that measure one model, or two in one run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from grasp.cli.app import app
from grasp.cli.options import (
    Against,
    Json,
    Limit,
    Model,
    Record,
    Tasks,
    TasksData,
    check_tasks,
    parse_counts,
    with_options,
)
from grasp.cli.output import print_json, print_line, print_table
from grasp.cli.progress import progress, steps_of
from grasp.config import EVAL_WINDOWS, TEXT_FIELD, Dtype, PruneConfig, Runtime
from grasp.distributed import from_first
from grasp.errors import GraspError
from grasp.options import MACHINE
from grasp.planning.check import check_reading

OPTIONS = PruneConfig.options()
READING = {name: OPTIONS[name] for name in ("device", "trust_remote_code")}


@app.command("eval")
@with_options({**READING, "shard": OPTIONS["shard"]})
def eval_command(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, JSON-lines, CSV or Parquet file, or hub data set; once for each text."
        ),
    ] = None,
    tasks: Tasks = None,
    against: Against = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    text_field: Annotated[str, typer.Option(help=TEXT_FIELD)] = PruneConfig.text_field,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window (default: 2048, or the model's limit).")
    ] = None,
    windows: Annotated[int | None, typer.Option(help=EVAL_WINDOWS)] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put a BOS before each window.")] = False,
    batch_size: Annotated[int, typer.Option(help="Windows or answers per forward pass.")] = 1,
    record: Record = False,
    *,
    as_json: Json = False,
    **reading: Any,
) -> None:
    """Perplexity in fp32, in windows without overlap, and zero-shot accuracy."""
    if not text and not tasks:
        raise typer.BadParameter("give --text, --tasks or both")
    check_tasks(tasks, tasks_data, limit)
    if not text and (seq_len or windows or bos or text_field != PruneConfig.text_field):
        raise typer.BadParameter("--seq-len, --windows, --bos and --text-field are for --text")
    if record and not tasks:
        raise typer.BadParameter("--record is for --tasks, which is not given")
    device, shard = reading.get("device", PruneConfig.device), reading.pop("shard", "none")
    if tasks and shard != "none":
        raise typer.BadParameter(
            f"--tasks runs on one rank, which holds no model in --shard {shard}"
        )
    models = [model] if against is None else [model, against]
    for name in models:  # before torch is imported, which takes seconds
        check_reading(name, texts=text or (), seq_len=seq_len, device=device, shard=shard)
    for name, count in (("windows", windows), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise GraspError(f"`{name}` must be at least 1, got {count}")
    from grasp.evaluate.perplexity import evaluate_texts
    from grasp.evaluate.zero_shot import evaluate_tasks
    from grasp.machine import memory_errors

    fix = f"lower `batch_size` (now {batch_size}) or `seq_len`"
    on_text: Any = dict(text_field=text_field, seq_len=seq_len, windows=windows, bos=bos)
    on_text["shard"] = shard
    on_tasks: Any = dict(against=against, tasks_data=tasks_data, limit=limit, record=record)
    with progress() as show, memory_errors(f"device {device}", fix):
        both: Any = dict(batch_size=batch_size, progress=steps_of("evaluate", show), **reading)
        score = partial(evaluate_tasks, model, tasks or "", **on_tasks, **both)
        scores = from_first(score) if tasks else None
        texts = [
            (name, result)
            for name in models
            for result in (evaluate_texts(name, text, **on_text, **both) if text else ())
        ]
    if as_json:
        print_json(_eval_json(texts, scores))
        return
    for name, result in texts:
        print_line(f"{name}: {result}" if against else str(result))
        for note in result.notes:
            print_line(note)
    if scores:
        print_table(scores.head(), scores.rows())
        print_line(scores.measured_on())


def _eval_json(texts: list[tuple[str, Any]], scores: Any) -> dict[str, Any]:
    """The perplexity alone where nothing else was asked for, or all results by their names."""
    if len(texts) == 1 and not scores:
        return texts[0][1].to_json()
    perplexities = [{"model": name, **result.to_json()} for name, result in texts]
    report = {"perplexity": perplexities} if texts else {}
    return report | ({"zero_shot": scores.to_json()} if scores else {})


@app.command("bench")
@with_options(READING)
def bench_command(
    model: Model,
    against: Against = None,
    batch_sizes: Annotated[
        Any, typer.Option(parser=parse_counts, metavar="COUNTS", help="Prompts at once.")
    ] = "1,4",
    prompt_lens: Annotated[
        Any, typer.Option(parser=parse_counts, metavar="COUNTS", help="Tokens of a prompt.")
    ] = "128,512",
    tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 32,
    repetitions: Annotated[
        int, typer.Option(help="Repetitions of each shape, after one to warm up.")
    ] = 5,
    compile: Annotated[
        bool, typer.Option("--compile", help="Decode through torch.compile, with a static cache.")
    ] = False,
    runtime: Annotated[
        Runtime, typer.Option(help="vllm serves both models, prompts arriving at once.")
    ] = "auto",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a plot of tokens/s.")
    ] = None,
    record: Record = False,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Data type of the weights; a .gguf file has its own.", rich_help_panel=MACHINE
        ),
    ] = PruneConfig.dtype,
    *,
    as_json: Json = False,
    **reading: Any,
) -> None:
    """Speed and size: prefill, decode, KV cache, weights. A .gguf file runs in llama.cpp."""
    device = reading.get("device", PruneConfig.device)
    for name in [model] if against is None else [model, against]:  # before torch is imported
        check_reading(name, device=device)
    from grasp.evaluate.bench import bench

    with progress() as show:
        result = bench(
            model,
            against=against,
            batch_sizes=batch_sizes,
            prompt_lens=prompt_lens,
            tokens=tokens,
            repetitions=repetitions,
            dtype=dtype,
            compile=compile,
            runtime=runtime,
            plot=plot,
            record=record,
            progress=steps_of("bench", show),
            **reading,
        )
    if as_json:
        print_json(result.to_json())
        return
    print_table(result.head(), result.rows())
    print_line(result.measured_on())
