"""Compare gate training with the published eager form: tokens/s, FLOP/s and memory on one device.

    python -m benchmarks.gate_training [--device cuda] [--out JSON]     three shapes of 7B and 8B
    python -m benchmarks.gate_training --small                          under a minute on a CPU
    python -m benchmarks.gate_training --models demo:smollm2-135m --cases 256x1 --keep 0.5

Weights are random unless a model is named: times do not depend on them. Our form is
`grasp.select.learn_scores` from random scores at the full budget. It runs with gates only, as the
published form does, and again with the channel scales that `grasp prune` trains with the gates.
While the budget shrinks, a step costs between the row of its keep and the row of keep 1. The first
steps, which compile kernels, are left out. All forms run on one model and the same tokens, in
alternating order. Ours runs in a memory mode; the planned peak is shown next to the measured one.

A row counts only if `figure` is true: both forms compute the same logits and gradients, and nothing
fell back ("not as a CUDA graph", "not compiled"). `--log` adds a line of JSON after each run;
`--profile` adds a table of the 20 longest kernels of ten steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import published
from benchmarks.evidence import add, passed, tiles
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.config import GateSite, MemoryMode, PruneConfig, ScaleKind
from grasp.errors import GraspError, reason
from grasp.gates import training
from grasp.gates.compiled import compiled
from grasp.gates.gating import gated
from grasp.gates.memory import memory_mode
from grasp.gates.objective import next_token_loss
from grasp.gates.training import READ_EVERY, TrainSettings
from grasp.journal import Journal
from grasp.model.header import from_config
from grasp.model.load import cast, load_model, pick_device, processor
from grasp.model.units import UnitSpace
from grasp.planning.memory import learning_memory
from grasp.select.learned import TAU, LearnSettings, learn_scores

WHOLE_RUN = 512 * 512 * 4  # tokens of the published run
SLACK = 1e-3  # of relative error, for the other order of fp32 sums
TESTS = (
    "test_gating",
    "test_training",
    *(
        f"on_device.test_{op}"
        for op in ("swiglu", "attention", "projection", "cross_entropy", "scale")
    ),
)
QUANTILES = {"median": 0.5, "q10": 0.1, "q90": 0.9}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"model_type": "llama", "vocab_size": 32000, "num_key_value_heads": 32},
    "llama-3.1-8b": {
        "model_type": "llama",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
    },
}
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
}


@dataclass(frozen=True)
class Case:
    seq_len: int
    batch: int
    keep: float

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch


class Clock(Journal):
    """(wall, process CPU) seconds of every step but the first `skip`, from reads of the loss."""

    def __init__(self, skip: int):
        self.seconds: list[tuple[float, float]] = []
        self.notes: list[str] = []  # what fell back
        self._skip, self._last = skip, (0, 0.0, 0.0)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        before, now = self._last, (step, time.perf_counter(), time.process_time())
        if before[0] >= self._skip:
            steps = step - before[0]
            self.seconds.append(((now[1] - before[1]) / steps, (now[2] - before[2]) / steps))
        self._last = now


class Profiled(Journal):
    """The kernels of the steps after the first `skip`, by PyTorch's profiler."""

    def __init__(self, skip: int):
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        self.profile = profile(activities=activities[: 1 + torch.cuda.is_available()])
        self.steps = 0  # between two reads of the loss
        self._skip, self._from = skip, 0

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        if not self._from and step >= self._skip:
            self.profile.start()
            self._from = step
        elif self._from and not self.steps:
            self.profile.stop()
            self.steps = step - self._from

    def table(self) -> str:
        if not torch.cuda.is_available():
            rows = self.profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
            return f"{self.steps} steps\n{rows}"
        # without the ops, which count the time of their kernels once more
        kernels = [e for e in self.profile.key_averages() if e.device_type == DeviceType.CUDA]
        kernels.sort(key=lambda e: e.self_device_time_total, reverse=True)
        if not kernels:
            return f"{self.steps} steps, and the profiler has recorded no kernel\n"
        lines = [f"{self.steps} steps", "  ms in all   calls  kernel"]
        lines += [
            f"{e.self_device_time_total / 1e3:11.3f} {e.count:7d}  {e.key}" for e in kernels[:20]
        ]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Forms:
    """The forms of gate learning at one case: each call learns for some steps."""

    model: PreTrainedModel
    case: Case
    projection: Projection
    start: Tensor
    blocks: Tensor
    memory: MemoryMode

    @classmethod
    def at(cls, model: PreTrainedModel, case: Case, steps: int, memory: MemoryMode) -> Forms:
        space, device = UnitSpace.of(model), model.device
        projection = Projection(space, Budget("keep", case.keep, ffn_multiple=1), device=device)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(space.size, generator=generator).to(device)
        shape = (case.batch * steps, case.seq_len)
        blocks = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
        return cls(model, case, projection, start, blocks, memory)

    def ours(self, scales: ScaleKind, journal: Journal) -> dict[str, Any]:
        """Learns over all blocks; the memory mode, and the peak that is planned for it."""
        train = TrainSettings(epochs=1, batch_size=self.case.batch)
        settings = LearnSettings(train, anneal=0.0, scales=scales)
        config = PruneConfig(
            model="",
            budget=self.projection.budget,
            seq_len=self.case.seq_len,
            batch_size=self.case.batch,
            scales=scales,
            memory=self.memory,
            device=str(self.model.device),
        )
        with memory_mode(self.model, config) as mode:
            learn_scores(self.model, self.projection, self.start, self.blocks, settings, journal)
        header = replace(from_config(self.model.config.to_dict()), space=self.projection.space)
        size = self.case.tokens, self.case.seq_len, self.model.dtype.itemsize
        plan = learning_memory(header, *size, mode, scales)
        return {"memory": mode, "planned_bytes": plan.total}

    def theirs(self, journal: Journal) -> dict[str, Any]:
        steps = self.blocks.split(self.case.batch)
        with published.training(self.model, self.case.keep) as trainer:
            trainer.scores.data.copy_(self.start)
            for step, ids in enumerate(steps, 1):
                journal.progress(step, len(steps), trainer.step(ids), self.case.tokens)
        return {}


def measure(
    model: PreTrainedModel,
    case: Case,
    steps: int,
    repetitions: int,
    *,
    memory: MemoryMode = "auto",
    known: Callable[[dict[str, Any]], None] = lambda row: None,
    profiled: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What a step of each form takes at one case, and what ours does in it.

    `known` gets a row for each run of a form as soon as it is over, `profiled` a table of kernels.
    """
    device = model.device
    skip = 1 if device.type == "cpu" else READ_EVERY  # steps, until the first read at least
    forms = Forms.at(model, case, steps + skip, memory)
    sides: dict[str, tuple[int, Callable[[Journal], dict[str, Any]]]] = {
        "ours": (skip, partial(forms.ours, "unit")),
        "with scales": (skip, partial(forms.ours, "channel")),
        "theirs": (1, forms.theirs),
    }
    if case.keep == 1:
        del sides["theirs"]
    runs: dict[str, list[Any]] = {side: [] for side in sides}
    result: dict[str, Any] = {**asdict(case), "peak_bytes": {}, "plans": {}, "notes": []}
    for repetition in range(repetitions):
        for side in list(sides)[:: -1 if repetition % 2 else 1]:
            first, learn = sides[side]
            clock, row = Clock(first), {**asdict(case), "side": side}
            with freed(device):
                try:
                    plan = learn(clock)
                except (torch.OutOfMemoryError, GraspError) as error:
                    runs[side], plan = [], {"error": reason(error)}
                else:
                    runs[side].append(clock.seconds)
                    result["plans"] |= {side: plan} if plan else {}
                row |= {"seconds": clock.seconds, "notes": clock.notes, **plan}
                if device.type == "cuda":
                    row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
                    result["peak_bytes"][side] = row["peak_bytes"]
            result["notes"] += [n for n in clock.notes if n not in result["notes"]]
            known(row)
    if profiled and runs["ours"]:
        journal = Profiled(skip)
        forms.ours("channel", journal)
        profiled(journal.table())
    return result | _summary(forms, runs)


def _summary(forms: Forms, runs: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians and quantiles of all steps, and what follows from them."""
    result: dict[str, Any] = {}
    for index, clock in enumerate(("wall_seconds", "process_cpu_seconds")):
        times = {s: [[step[index] for step in run] for run in found] for s, found in runs.items()}
        result[clock] = {s: spread([*chain(*found)]) for s, found in times.items() if found}
        if all(times.get(side) for side in ("theirs", "ours")):
            pairs = zip(times["theirs"], times["ours"], strict=True)
            result[clock]["theirs/ours"] = spread([median(a) / median(b) for a, b in pairs])
    if "ours" in result["wall_seconds"]:
        model, case, mask = forms.model, forms.case, forms.projection.mask(forms.start)
        seconds = result["wall_seconds"]["ours"]["median"]
        counts = flops(model, mask, case.seq_len)
        result["tokens_per_second"] = case.tokens / seconds
        result["whole_run_minutes"] = WHOLE_RUN / case.tokens * seconds / 60
        result["tflops"] = {k: n * case.tokens / seconds / 1e12 for k, n in counts.items()}
        result["flop_per_token"] = counts
        first = forms.blocks[: case.batch]
        result["stages_ms"] = stages(model, forms.projection, forms.start, first)
    return result


def flops(model: PreTrainedModel, mask: Mask, seq_len: int) -> dict[str, float]:
    """FLOP a token of forward and backward pass with frozen weights, head included.

    `dense` computes everything; `masked` what the gates need: of dropped units all that leads to
    their own output and gradient, and nothing behind it.
    """
    d = mask.space.hidden_size
    head = 4.0 * d * len(model.get_output_embeddings().weight)
    dense = masked = head
    for whole, kept in zip(mask.space.layers, mask.pruned_space().layers, strict=True):
        size, groups = whole.head_dim * (whole.group_size + 1), whole.kv_groups
        for units, left, rows in ((whole.ffn, kept.ffn, 1), (groups, kept.kv_groups, size)):
            into, out = 2 * rows, rows  # gate and up, then down
            if rows > 1:
                into, out = size + whole.head_dim, whole.head_dim * whole.group_size
            dense += 4 * d * units * (into + out)
            masked += 2 * d * (into * (units + left) + out * (left + units))
        scores = 2 * seq_len * whole.head_dim * whole.group_size  # of a group, causal
        dense += 3.5 * scores * groups
        masked += scores * (groups + 2.5 * kept.kv_groups)
    return {"dense": dense, "masked": masked}


def stages(
    model: PreTrainedModel, projection: Projection, scores: Tensor, ids: Tensor
) -> dict[str, float]:
    """Milliseconds of the parts of one step, each waited for, so not launched as one graph."""
    theta = scores.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=1e-2)
    found: dict[str, Any] = {}
    on_gpu = model.device.type == "cuda"
    counted = on_gpu and ids.numel() > training.GRAPH_TOKENS

    def project() -> None:
        p = torch.sigmoid(theta / TAU)
        found["z"] = projection(theta) + (p - p.detach())

    def forward() -> None:
        found["leaf"] = found["z"].detach().requires_grad_()
        gates.set(found["leaf"], gates.count(found["leaf"]) if counted else None)
        found["loss"] = next_token_loss(model, ids)

    def backward() -> None:
        (gradient,) = torch.autograd.grad(found["loss"], found["leaf"])
        (theta.grad,) = torch.autograd.grad(found["z"], theta, gradient)

    parts = {"project": project, "forward": forward, "backward": backward}
    parts["optimiser"] = optimizer.step
    times: dict[str, list[float]] = {name: [] for name in parts}
    with (
        compiled(model, print) if on_gpu else nullcontext(),
        gated(model, projection.space) as gates,
    ):
        for _ in range(4):
            for name, part in parts.items():
                times[name].append(1e3 * timed(part, model.device))
    return {name: median(values[1:]) for name, values in times.items()}


def matmul_roof(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of PyTorch's matmul: 8192 cubed on a GPU, 512 cubed on a CPU."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(13)]
    return 2 * n**3 / median(seconds[3:])


def agreement(model: PreTrainedModel, ids: Tensor, keep: float) -> dict[str, dict[str, float]]:
    """Relative errors of both forms under one random mask, against the published form in fp32.

    Of the logits, ours with gates where grasp has them, and of the gates' gradient, ours with gates
    on K and V. They agree where ours is off by no more than twice the rounding of theirs.
    """
    space, dtype = UnitSpace.of(model), model.dtype
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(0))
    mask = Projection(space, Budget("keep", keep, ffn_multiple=1))(scores)
    z = mask.float().to(model.device).requires_grad_()

    def outcome() -> dict[str, Tensor]:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        (gradient,) = torch.autograd.grad(out.loss, z)
        return {"logits": out.logits.detach().float(), "gradient": gradient}

    def theirs() -> dict[str, Tensor]:
        with published.training(model, keep):
            published.set_gates(model, space, z)
            return outcome()

    def ours(site: GateSite) -> dict[str, Tensor]:
        with gated(model, space, site) as gates:
            gates.set(z)
            return outcome()

    cast(model, torch.float32)
    exact = theirs()
    cast(model, dtype)
    at_output, at_kv = ours("output"), ours("kv")
    forms = {
        "theirs": theirs(),
        "ours": {"logits": at_output["logits"], "gradient": at_kv["gradient"]},
    }
    return {
        what: {
            form: ((found[what] - exact[what]).norm() / exact[what].norm()).item()
            for form, found in forms.items()
        }
        for what in exact
    }


def agree(errors: dict[str, dict[str, float]]) -> bool:
    return all(e["ours"] <= 2 * e["theirs"] + SLACK for e in errors.values())


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """A block that starts, on a GPU, with an empty cache and a new count of the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: Sequence[float]) -> float:
    return spread(values)["median"]


def spread(values: Sequence[float]) -> dict[str, float]:
    sample = torch.tensor(values, dtype=torch.float64)
    return {name: sample.quantile(q).item() for name, q in QUANTILES.items()}


def build(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A shape of `SHAPES` with random weights, or any other model by its name."""
    if name not in SHAPES:
        return load_model(name, dtype=dtype, device=str(device))[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | SHAPES[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def machine(device: str) -> dict[str, Any]:
    return {
        "device": processor(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(result: dict[str, Any]) -> str:
    where, dtype, roof = result["machine"], result["dtype"], result["matmul_tflops"]
    lines = [
        f"{where['device']}, {where['threads']} threads, {dtype}; matmul {roof:.2f} TFLOP/s",
        "",
        "| model | tokens | kept | ms a step | with scales | published | ratio | tokens/s "
        "| of the roof: dense, masked | peak GB | whole run, min | stages, ms |",
        "|" + "---|" * 12,
    ]
    for row in result["rows"]:
        if "tokens_per_second" not in row:
            lines.append(f"| {row['model']} | {row['seq_len']} x {row['batch']} | out of memory |")
            continue
        wall = row["wall_seconds"]
        along, theirs = (
            f"{1e3 * wall[side]['median']:.1f}" if side in wall else "–"
            for side in ("with scales", "theirs")
        )
        ratio = spell(wall) if "theirs/ours" in wall else "–"
        if "theirs" in wall and not row["peak_bytes"]:  # a CPU has other work
            ratio += f", of process time {spell(row['process_cpu_seconds'])}"
        peak = row["peak_bytes"].get("ours")
        lines.append(
            f"| {row['model']} | {row['seq_len']} x {row['batch']} | {row['keep']:.0%} "
            f"| {1e3 * wall['ours']['median']:.1f} | {along} | {theirs} | {ratio} "
            f"| {row['tokens_per_second']:,.0f} "
            f"| {', '.join(f'{n / roof:.0%}' for n in row['tflops'].values())} "
            f"| {f'{peak / 1e9:.1f}' if peak else '–'} | {row['whole_run_minutes']:.1f} |"
        )
        parts = (f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
        lines[-1] += f" {', '.join(parts)} |"
        if not row.get("figure", True):
            lines[-1] += f" no figure: {'; '.join(row['notes'])} |"
    return "\n".join(lines)


def spell(clock: dict[str, Any]) -> str:
    ratio = clock["theirs/ours"]
    return f"{ratio['median']:.2f} ({ratio['q10']:.2f} to {ratio['q90']:.2f})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of both forms, a group of bars for each row."""
    rows = [row for row in result["rows"] if "tokens_per_second" in row]
    figure = Figure(figsize=(max(4, 1.5 + 1.1 * len(rows)), 4), layout="constrained")
    axes = figure.add_subplot()
    for offset, side in ((-0.2, "theirs"), (0.2, "ours")):
        speeds = [
            row["seq_len"] * row["batch"] / row["wall_seconds"][side]["median"]
            if side in row["wall_seconds"]
            else 0
            for row in rows
        ]
        label = {"theirs": "published, eager", "ours": "grasp"}[side]
        axes.bar([i + offset for i in range(len(rows))], speeds, 0.4, label=label)
    labels = [f"{r['model']}\n{r['seq_len']} x {r['batch']}\n{r['keep']:.0%} kept" for r in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("tokens a second")
    axes.set_title(f"Gate training, {result['machine']['device']}, {result['dtype']}")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def _row(
    model: PreTrainedModel,
    name: str,
    case: Case,
    options: argparse.Namespace,
    errors: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """A measured case of a model, with what tells whether it is a figure."""
    said: dict[str, Any] = {"model": name, "graph_tokens": training.GRAPH_TOKENS, **tiles()}
    if options.tested:
        said["tests"] = "green" if passed(options.tested, *TESTS) else "red"

    def keep_table(table: str) -> None:
        with options.profile.open("a") as file:
            file.write(f"{name}, {case}, scales of channels: {table}\n")

    row = measure(
        model,
        case,
        options.steps,
        options.repetitions,
        memory=options.memory,
        known=lambda row: add(options.log, {**said, **machine(str(model.device)), **row}),
        profiled=keep_table if options.profile else None,
    )
    if not agree(errors):
        row["notes"].append(f"the two forms do not compute the same: {errors}")
    return {**said, **row, "figure": not row["notes"] and said.get("tests") != "red"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", default="llama-2-7b,llama-3.1-8b,qwen3-8b", help="shapes, or models by name"
    )
    parser.add_argument("--cases", default="512x1,512x8,2048x8", help="SEQ_LENxBATCH,...")
    parser.add_argument("--keep", default="1,0.8,0.5")
    parser.add_argument("--small", action="store_true", help="a tiny model at 64x1 and 64x2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20, help="in a repetition")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--memory", default="auto", choices=get_args(MemoryMode))
    parser.add_argument("--graph-tokens", type=int, help="a step of more is no CUDA graph")
    parser.add_argument("--tested", type=Path, help="JUnit report of the tests of the same run")
    parser.add_argument("--log", type=Path, help="add a line of JSON for each run here")
    parser.add_argument("--profile", type=Path, help="add the 20 longest kernels of a step here")
    parser.add_argument("--out", type=Path, help="JSON; the plot gets the same name")
    options = parser.parse_args(argv)
    if options.small:
        options.models, options.cases = "tiny", "64x1,64x2"

    device = torch.device(pick_device(options.device))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # as `grasp prune` chooses
    result: dict[str, Any] = {
        "machine": machine(str(device)),
        "dtype": str(dtype).removeprefix("torch."),
        "steps": options.steps,
        "repetitions": options.repetitions,
        "matmul_tflops": matmul_roof(device, dtype) / 1e12,
        "relative_error": {},
        "rows": [],
    }
    if options.graph_tokens is not None:
        training.GRAPH_TOKENS = options.graph_tokens
    for name in options.models.split(","):
        model = build(name, device, dtype)
        ids = torch.randint(model.config.vocab_size, (1, 64), device=device)
        errors = result["relative_error"][name] = agreement(model, ids, 0.5)
        for shape in options.cases.split(","):
            seq_len, batch = map(int, shape.split("x"))
            for keep in map(float, options.keep.split(",")):
                result["rows"].append(
                    _row(model, name, Case(seq_len, batch, keep), options, errors)
                )
                if options.out:  # after every row: a stop leaves what is done
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(result, indent=2) + "\n")
        del model
    print(report(result))
    if options.out:
        plot(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
