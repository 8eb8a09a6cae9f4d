"""The command line: each verb parses, calls its Python twin and prints; it decides nothing."""

from __future__ import annotations

import inspect
import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from grasp import criteria
from grasp.budget.budget import Layout
from grasp.config import (
    Compensation,
    Dtype,
    GateSite,
    MemoryMode,
    PlannedDtype,
    PlannedMemory,
    PruneConfig,
    ScaleKind,
    Schedule,
    SparseMethod,
    SparsifyConfig,
    Start,
)
from grasp.errors import GraspError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Structured pruning of large language models under an exact budget.",
)
INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells have it
out_console, err_console = Console(), Console(stderr=True)


class Terminated(BaseException):
    """SIGTERM, by which schedulers stop a job: nothing on the way takes it for a failure."""


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 1, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # in ASCII, say; stderr replaces by itself
    signal.signal(signal.SIGTERM, _terminate)
    code = None
    try:
        code = app(standalone_mode=False)  # that of typer.Exit, or None
    except GraspError as error:
        _fail(f"error: {error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Terminated:
        code = TERMINATED
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        message = error.format_message()  # none where the help was printed instead
        _fail(f"error: {message}" if message else "", 2)
    if code in (INTERRUPTED, TERMINATED):  # newer releases of typer return the first
        stopped = "stopped" if code == INTERRUPTED else "stopped by SIGTERM"
        resumable = sys.argv[1:2] in (["prune"], ["compare"], ["sparsify"])
        _fail(stopped + ": the same command goes on from where it was" * resumable, code)
    sys.exit(code)


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
    raise Terminated


def _fail(message: str, code: int) -> None:
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)


def parse_count(text: str) -> float:
    """3.5B, 120M, 800k or a plain number."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        return round(float(text[:-1]) * unit) if unit else float(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no number: write 3500000000, 3.5B or 120M") from None


def parse_counts(text: str) -> list[int]:
    """1,4 as a list."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers: write 1,4") from None


def parse_ratios(text: str) -> list[float]:
    """0.8,0.5 as a list."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no number and no list: write 0.5 or 0.8,0.5", param_hint="'--keep'"
        ) from None


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a .gguf file, a hub name, or demo:smollm2-135m."
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Part of the prunable parameters to keep (default: 0.5)."),
]
Params = Annotated[
    float | None,
    typer.Option(parser=parse_count, metavar="COUNT", help="Parameters of the result, e.g. 3.5B."),
]
KvCache = Annotated[float | None, typer.Option(help="Part of the KV cache to keep.")]
FfnMultiple = Annotated[int, typer.Option(help="FFN widths are multiples of this.")]
KvMultiple = Annotated[int, typer.Option(help="KV head counts are multiples of this.")]
LayoutOption = Annotated[Layout, typer.Option(help="Widths of each layer, or the same in all.")]
MethodOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"How units are scored: {', '.join(criteria.names())}.",
        autocompletion=criteria.names,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Samples = Annotated[int, typer.Option(help="Blocks of calibration text.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per block.")]
Epochs = Annotated[int, typer.Option(help="Passes over the blocks while gates learn.")]
BatchSize = Annotated[int, typer.Option(help="Blocks per forward pass.")]
TextField = Annotated[str, typer.Option(help="Field or column that holds texts or conversations.")]
Calibration = Annotated[
    str,
    typer.Option(help="Text, JSON-lines, CSV or Parquet file, hub data set, self, or builtin."),
]
Rate = Annotated[float, typer.Option(help="Learning rate of gates and scales.")]
Scales = Annotated[
    ScaleKind, typer.Option(help="One a unit, or one a channel, which learn with gates too.")
]
Compensate = Annotated[
    Compensation,
    typer.Option(help="For what is dropped: least squares on what stays, or FLAP's biases."),
]
ScaleEpochs = Annotated[int, typer.Option(help="Passes while scales learn.")]
Decay = Annotated[
    float, typer.Option(help="Of scales towards 1: an epoch leaves e to the minus this of them.")
]
EvalText = Annotated[
    str | None,
    typer.Option(help="Text to report on (default: calibration text that was not used)."),
]
EvalSeqLen = Annotated[int, typer.Option(help="Tokens per window of --eval-text.")]
EvalWindows = Annotated[int | None, typer.Option(help="First windows only (default: all).")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the frozen model.")]
MemoryOption = Annotated[
    MemoryMode, typer.Option(help="Layers computed again to save memory: none, every second, all.")
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Tasks of lm-eval, as piqa,arc_easy.")
]
TasksData = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Documents as TASK.SPLIT.jsonl (default: from the hub)."),
]
Limit = Annotated[int | None, typer.Option(help="First documents of each task only.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")]
Record = Annotated[
    bool, typer.Option("--record", help="Add it to MODEL's report.html, README.md and grasp.json.")
]
RemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the model.")]


@app.command("prune")
def prune_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the result; must not exist.")],
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="RATIOS",
            help="Part of the prunable parameters to keep, or several (default: 0.5).",
        ),
    ] = None,
    params: Params = None,
    kv_cache: KvCache = None,
    ffn_multiple: FfnMultiple = 32,
    kv_multiple: KvMultiple = 1,
    layout: LayoutOption = "per-layer",
    method: MethodOption = PruneConfig.method,
    calibration: Calibration = PruneConfig.calibration,
    text_field: TextField = PruneConfig.text_field,
    samples: Samples = PruneConfig.samples,
    seq_len: SeqLen = PruneConfig.seq_len,
    epochs: Epochs = PruneConfig.epochs,
    batch_size: BatchSize = PruneConfig.batch_size,
    accumulate: Annotated[
        int, typer.Option(help="Forward passes per step.")
    ] = PruneConfig.accumulate,
    lr: Rate = PruneConfig.lr,
    schedule: Annotated[
        Schedule, typer.Option(help="Of the learning rate of scales after the mask.")
    ] = PruneConfig.schedule,
    start: Annotated[Start, typer.Option(help="What scores start from.")] = PruneConfig.start,
    anneal: Annotated[
        float, typer.Option(help="Part of the steps over which the budget shrinks.")
    ] = PruneConfig.anneal,
    gate_site: Annotated[
        GateSite, typer.Option(help="Where attention gates sit.")
    ] = PruneConfig.gate_site,
    compensate: Compensate = PruneConfig.compensate,
    scales: Scales = PruneConfig.scales,
    scale_epochs: ScaleEpochs = PruneConfig.scale_epochs,
    decay: Decay = PruneConfig.decay,
    as_published: Annotated[bool, typer.Option(help="The paper's own setting.")] = False,
    eval_text: EvalText = None,
    eval_seq_len: EvalSeqLen = PruneConfig.eval_seq_len,
    eval_windows: EvalWindows = None,
    dtype: DtypeOption = PruneConfig.dtype,
    memory: MemoryOption = PruneConfig.memory,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Fixes everything that is drawn.")] = 0,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Select, refit, calibrate, fold, save, evaluate: a smaller dense checkpoint in --out."""
    options = dict(locals())
    del options["as_json"]
    ratios = parse_ratios(keep) if keep else [None]
    if len(ratios) > 1 and (params, kv_cache) != (None, None):
        raise typer.BadParameter("several --keep go without --params and --kv-cache")
    _check(PruneConfig, options, [{"keep": ratio} for ratio in ratios])
    from grasp.report.summary import measured_on, size_rows
    from grasp.run.prune import prune, prune_each

    with _progress() as show:
        if len(ratios) == 1:
            results = [prune(**options | {"keep": ratios[0]}, show=show)]
        else:
            del options["params"], options["kv_cache"]
            results = prune_each(**options | {"keep": ratios}, show=show)
    if as_json:
        summaries = [result.summary for result in results]
        print(json.dumps(summaries if len(ratios) > 1 else summaries[0], indent=2))
        return
    for result in results:
        table = Table("", "dense", "pruned", "", title=Text(str(result.folder)))
        for row in size_rows(result.record):
            table.add_row(*row)
        out_console.print(table)
    _line(measured_on(results[0].record))


@app.command("compare")
def compare_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the results; must not exist.")],
    keep: Annotated[
        str, typer.Option(metavar="RATIOS", help="Parts of the prunable parameters to keep.")
    ] = "0.8,0.5,0.4",
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="As learned,fisher,fisher+refit (default: all)."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="NUMBERS", help="One run of all each.")] = "0,1,2",
    ffn_multiple: FfnMultiple = 1,
    kv_multiple: KvMultiple = 1,
    layout: LayoutOption = "per-layer",
    calibration: Calibration = PruneConfig.calibration,
    text_field: TextField = PruneConfig.text_field,
    samples: Samples = PruneConfig.samples,
    seq_len: SeqLen = PruneConfig.seq_len,
    epochs: Epochs = PruneConfig.epochs,
    batch_size: BatchSize = PruneConfig.batch_size,
    lr: Rate = PruneConfig.lr,
    scales: Scales = PruneConfig.scales,
    scale_epochs: ScaleEpochs = PruneConfig.scale_epochs,
    decay: Decay = PruneConfig.decay,
    eval_text: EvalText = None,
    eval_seq_len: EvalSeqLen = PruneConfig.eval_seq_len,
    eval_windows: EvalWindows = None,
    tasks: Tasks = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    memory: MemoryOption = PruneConfig.memory,
    dtype: DtypeOption = PruneConfig.dtype,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Every method at every budget with every seed: tables and a plot in --out."""
    options = dict(locals())
    del options["as_json"], options["methods"]
    _check_tasks(tasks, tasks_data, limit)
    options |= {"keep": parse_ratios(keep), "seeds": parse_counts(seeds)}
    _check(PruneConfig, options, [{"keep": ratio} for ratio in options["keep"]])
    from grasp.report.comparison import explained, perplexity_table
    from grasp.run.compare import compare

    if methods:
        options["methods"] = methods.split(",")
    with _progress() as show:
        result = compare(**options, show=show)
    if as_json:
        print(json.dumps(result.summary, indent=2))
        return
    head, rows = perplexity_table(result.summary)
    table = Table(*head, title=Text(str(result.folder)))
    for row in rows:
        table.add_row(*row)
    out_console.print(table)
    _line(explained(result.summary))


@app.command("sparsify")
def sparsify_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the result; must not exist.")],
    pattern: Annotated[
        str, typer.Option(help="2:4 or 4:8 keeps N of M inputs; 0.5 zeroes a part of each row.")
    ] = SparsifyConfig.pattern,
    method: Annotated[
        SparseMethod, typer.Option(help="How weights are chosen.")
    ] = SparsifyConfig.method,
    calibration: Calibration = SparsifyConfig.calibration,
    text_field: TextField = SparsifyConfig.text_field,
    samples: Samples = SparsifyConfig.samples,
    seq_len: SeqLen = SparsifyConfig.seq_len,
    rounds: Annotated[
        int, typer.Option(help="Rounds of Wanda++'s regional optimisation.")
    ] = SparsifyConfig.rounds,
    lr: Annotated[float, typer.Option(help="Its learning rate.")] = SparsifyConfig.lr,
    eval_text: EvalText = None,
    eval_seq_len: EvalSeqLen = SparsifyConfig.eval_seq_len,
    eval_windows: EvalWindows = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Fixes everything that is drawn.")] = 0,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Zeros in a pattern such as 2:4, stored dense: the same model, sparse, in --out."""
    options = dict(locals())
    del options["as_json"]
    _check(SparsifyConfig, options)
    from grasp.report.summary import measured_on, size_rows
    from grasp.run.sparsify import sparsify

    with _progress() as show:
        result = sparsify(**options, show=show)
    if as_json:
        print(json.dumps(result.summary, indent=2))
        return
    table = Table("", "dense", "sparse", "", title=Text(str(result.folder)))
    for row in size_rows(result.record):
        table.add_row(*row)
    out_console.print(table)
    _line(measured_on(result.record))


@app.command("plan")
def plan_command(
    model: Model,
    keep: Keep = None,
    params: Params = None,
    kv_cache: KvCache = None,
    ffn_multiple: FfnMultiple = 32,
    kv_multiple: KvMultiple = 1,
    layout: LayoutOption = "per-layer",
    method: MethodOption = PruneConfig.method,
    samples: Samples = PruneConfig.samples,
    seq_len: SeqLen = PruneConfig.seq_len,
    epochs: Epochs = PruneConfig.epochs,
    batch_size: BatchSize = PruneConfig.batch_size,
    scales: Scales = PruneConfig.scales,
    scale_epochs: ScaleEpochs = PruneConfig.scale_epochs,
    compensate: Compensate = PruneConfig.compensate,
    eval_seq_len: EvalSeqLen = PruneConfig.eval_seq_len,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Speed of your machine, for a time estimate.")
    ] = None,
    dtype: Annotated[PlannedDtype, typer.Option(help="Of the frozen model.")] = "bf16",
    memory: Annotated[
        PlannedMemory, typer.Option(help="Layers computed again to save memory.")
    ] = "fast",
    as_json: Json = False,
) -> None:
    """What pruning will give and take, from config.json alone."""
    options = dict(locals())
    del options["as_json"], options["model"]
    from grasp.planning.plan import plan

    result = plan(model, **options)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(result)


@app.command("eval")
def eval_command(
    model: Model,
    text: Annotated[
        str | None, typer.Option(help="Text, JSON-lines, CSV or Parquet file, or hub data set.")
    ] = None,
    tasks: Tasks = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, as the dense one.")
    ] = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    text_field: TextField = PruneConfig.text_field,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window (default: 2048, or the model's limit).")
    ] = None,
    windows: EvalWindows = None,
    bos: Annotated[bool, typer.Option(help="Put a BOS before each window.")] = False,
    batch_size: Annotated[int, typer.Option(help="Windows or answers per forward pass.")] = 1,
    device: Device = "auto",
    record: Record = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Perplexity in fp32, in windows without overlap, and zero-shot accuracy."""
    if not text and not tasks:
        raise typer.BadParameter("give --text, --tasks or both")
    _check_tasks(tasks, tasks_data, limit)
    if record and not tasks:
        raise typer.BadParameter("--record is for --tasks, which is not given")
    from grasp.planning.check import check_reading

    models = [model] if against is None else [model, against]
    for name in models:  # before torch is imported, which takes seconds
        check_reading(name, text=text, seq_len=seq_len, device=device)
    from grasp.evaluate.perplexity import evaluate_text
    from grasp.evaluate.zero_shot import evaluate_tasks
    from grasp.machine import memory_errors

    fix = f"lower --batch-size (now {batch_size}) or --seq-len"
    with _progress() as show, memory_errors(f"device {device}", fix):
        common: dict[str, Any] = dict(
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda n, of: show({"stage": "evaluate", "step": n, "steps": of}),
        )
        on_text: dict[str, Any] = dict(
            text_field=text_field, seq_len=seq_len, windows=windows, bos=bos
        )
        on_tasks: dict[str, Any] = dict(
            against=against, data=tasks_data, limit=limit, record=record
        )
        scores = evaluate_tasks(model, tasks, **on_tasks, **common) if tasks else None
        texts = [evaluate_text(name, text, **on_text, **common) for name in models if text]
    if as_json:
        print(json.dumps(_eval_json(models, texts, scores), indent=2))
        return
    for name, result in zip(models, texts, strict=False):
        _line(f"{name}: {result}" if against else str(result))
        for note in result.notes:
            _line(note)
    if scores:
        table = Table(*map(escape, scores.head()))
        for row in scores.rows():
            table.add_row(*row)
        out_console.print(table)
        _line(scores.measured_on())


@app.command("bench")
def bench_command(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, as the dense one.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="COUNTS", help="Prompts at once.")] = "1,4",
    prompt_lens: Annotated[
        str, typer.Option(metavar="COUNTS", help="Tokens of a prompt.")
    ] = "128,512",
    tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 32,
    repetitions: Annotated[int, typer.Option(help="Of each shape, beside one to warm up.")] = 5,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; a .gguf file has its own.")
    ] = PruneConfig.dtype,
    compile: Annotated[
        bool, typer.Option("--compile", help="Decode through torch.compile, with a static cache.")
    ] = False,
    device: Device = "auto",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a plot of tokens/s.")
    ] = None,
    record: Record = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Speed and size: prefill, decode, KV cache, weights. A .gguf file runs in llama.cpp."""
    from grasp.planning.check import check_reading

    for name in [model] if against is None else [model, against]:  # before torch is imported
        check_reading(name, device=device)
    from grasp.evaluate.bench import bench

    shapes = {"batch_sizes": parse_counts(batch_sizes), "prompt_lens": parse_counts(prompt_lens)}
    with _progress() as show:
        result = bench(
            model,
            against=against,
            **shapes,
            tokens=tokens,
            repetitions=repetitions,
            dtype=dtype,
            compile=compile,
            device=device,
            plot=plot,
            record=record,
            trust_remote_code=trust_remote_code,
            progress=lambda n, of: show({"stage": "bench", "step": n, "steps": of}),
        )
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    table = Table(*map(escape, result.head()))
    for row in result.rows():
        table.add_row(*row)
    out_console.print(table)
    _line(result.measured_on())


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint made by grasp.")],
    as_json: Json = False,
) -> None:
    """Is this checkpoint what it says it is? Exit code 1 if not."""
    from dataclasses import asdict

    from grasp.checkpoint.verify import verify

    report = verify(folder)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        for check in report.checks:
            mark = Text("ok  ", "green") if check.passed else Text("FAIL", "red")
            _line(mark.append(f" {check.name}: {check.detail}", "default"))
    if not report.passed:
        raise typer.Exit(1)


@app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint made by grasp.")],
    as_json: Json = False,
) -> None:
    """What was kept, layer by layer."""
    from grasp.checkpoint.record import Record
    from grasp.report.summary import layer_rows, measured_on, size_rows

    record = Record.read(folder)
    if as_json:
        print(json.dumps(record.to_json(), indent=2))
        return
    table = Table("layer", "FFN channels", "", "KV groups", title=Text(str(folder)))
    for index, ffn, ffn_of, kv, kv_of in layer_rows(record):
        bar = "█" * round(20 * ffn / ffn_of)
        table.add_row(str(index), f"{ffn} / {ffn_of}", bar, "●" * kv + "○" * (kv_of - kv))
    out_console.print(table)
    for what, dense, pruned, ratio in size_rows(record):
        _line(f"{what}: {dense} -> {pruned} ({ratio})")
    _line(measured_on(record))


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
        str | None, typer.Option(help="Of GGUF matrices: f32, f16, bf16 or q8_0 (default: f16).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in the format of another runtime."""
    from dataclasses import asdict

    from grasp.checkpoint.export import export

    with _progress() as show:
        result = export(
            model,
            out,
            to=to,
            type=type,
            progress=lambda n, of: show({"stage": "export", "step": n, "steps": of}),
        )
    if as_json:
        print(json.dumps(asdict(result), indent=2, default=str))
    else:
        _line(str(result))


def _check(kind: Any, options: dict[str, Any], each: list[dict[str, Any]] | None = None) -> None:
    """What the Python twin will check first, before it is imported and torch with it: seconds."""
    from grasp.run.ready import check_run

    names = inspect.signature(kind.of).parameters.keys() | kind.__dataclass_fields__.keys()
    asked = {name: value for name, value in options.items() if name in names}
    for more in each or [{}]:
        check_run(kind.of(**asked | more), options["out"])


def _check_tasks(tasks: str | None, data: str | None, limit: int | None) -> None:
    if not tasks and (limit is not None or data is not None):
        raise typer.BadParameter("--limit and --tasks-data are for --tasks, which is not given")


def _eval_json(models: list[str], texts: list[Any], scores: Any) -> dict[str, Any]:
    """The perplexity alone where nothing else was asked for, or all results by their names."""
    if len(texts) == 1 and not scores:
        return texts[0].to_json()
    perplexities = [
        {"model": name, **result.to_json()} for name, result in zip(models, texts, strict=False)
    ]
    report = {"perplexity": perplexities} if texts else {}
    return report | ({"zero_shot": scores.to_json()} if scores else {})


def _line(text: str | Text) -> None:
    """A line as it is: not wrapped, and brackets in paths are no markup."""
    out_console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Any]:
    """One line that follows log records: stage, bar, loss, kept, tokens/s, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description:16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=err_console,
        transient=True,
        disable=not err_console.is_terminal,
    ) as bars:
        task = bars.add_task("loading", total=None, note="")

        def show(record: dict[str, Any]) -> None:
            if "stage" in record:
                bars.update(
                    task,
                    description=record["stage"],
                    completed=record["step"],
                    total=record["steps"],
                    note=_note(record),
                )
                if record["step"] == record["steps"]:
                    bars.console.print(
                        f"{record['stage']}: {_note(record)}", highlight=False, soft_wrap=True
                    )
            elif record["event"] in ("resumed", "note"):
                bars.console.print(record.get("text", "resumed"), highlight=False, soft_wrap=True)

        yield show


def _note(record: dict[str, Any]) -> str:
    """What a log record says beside its step: loss, kept cost, speed, time left."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
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


if __name__ == "__main__":
    main()
