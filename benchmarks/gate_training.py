"""Gate training on one device: tokens a second, FLOP/s, memory, against the published eager form.

    python -m benchmarks.gate_training [--device cuda] [--out JSON]     three shapes of 7B and 8B
    python -m benchmarks.gate_training --small                          under a minute on a CPU
    python -m benchmarks.gate_training --models demo:smollm2-135m --cases 256x1 --keep 0.5

Weights are random unless a model is named: times do not depend on them. Ours is
`grasp.select.learn_scores` from random scores at the full budget, for what both forms learn, the
gates, and once more with the scales of channels that `grasp prune` has learn along: while the
budget still shrinks, a step costs something between the rows of a keep and of 1. The first steps,
in which kernels compile, are left out. All run on one model and the same tokens, in alternating
order, and nothing is timed unless both forms compute the same logits and gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import published
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.config import ScaleKind
from grasp.gates.gating import GateSite, gated
from grasp.gates.training import READ_EVERY, TrainSettings, next_token_loss
from grasp.journal import Journal
from grasp.model.load import cast, load_model, pick_device, processor
from grasp.model.units import UnitSpace
from grasp.select.learned import TAU, LearnSettings, learn_scores

WHOLE_RUN = 512 * 512 * 4  # tokens of the published run
SLACK = 1e-3  # of relative error, for the other order of fp32 sums
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
        self._skip, self._last = skip, (0, 0.0, 0.0)

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        before, now = self._last, (step, time.perf_counter(), time.process_time())
        if before[0] >= self._skip:
            steps = step - before[0]
            self.seconds.append(((now[1] - before[1]) / steps, (now[2] - before[2]) / steps))
        self._last = now


def measure(model: PreTrainedModel, case: Case, steps: int, repetitions: int) -> dict[str, Any]:
    """What a step of each form takes at one case, and what ours does in it."""
    device = model.device
    projection = Projection(
        UnitSpace.of(model), Budget("keep", case.keep, ffn_multiple=1), device=device
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(projection.space.size, generator=generator).to(device)
    skip = 1 if device.type == "cpu" else READ_EVERY  # steps, until the first read at least
    shape = (case.batch * (steps + skip), case.seq_len)
    blocks = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)

    def ours(scales: ScaleKind = "unit") -> list[tuple[float, float]]:
        clock = Clock(skip)
        train = TrainSettings(epochs=1, batch_size=case.batch)
        settings = LearnSettings(train, anneal=0.0, scales=scales)
        learn_scores(model, projection, start, blocks, settings, clock)
        return clock.seconds

    def theirs() -> list[tuple[float, float]]:
        clock = Clock(1)
        with published.training(model, case.keep) as trainer:
            trainer.scores.data.copy_(start)
            for step, ids in enumerate(blocks[: case.batch * (steps + 1)].split(case.batch), 1):
                clock.progress(step, steps, trainer.step(ids), case.tokens)
        return clock.seconds

    sides: dict[str, Callable[[], list[tuple[float, float]]]] = {
        "theirs": theirs,
        "ours": ours,
        "with scales": partial(ours, "channel"),
    }
    if case.keep == 1:
        del sides["theirs"]
    runs: dict[str, list[Any]] = {side: [] for side in sides}
    result: dict[str, Any] = {**asdict(case), "peak_bytes": {}}
    for repetition in range(repetitions):
        for side in list(sides)[:: -1 if repetition % 2 else 1]:
            with freed(device):
                try:
                    runs[side].append(sides[side]())
                except torch.OutOfMemoryError:
                    runs[side] = []
                if device.type == "cuda":
                    result["peak_bytes"][side] = torch.cuda.max_memory_allocated(device)
    mask = projection.mask(start)
    for index, clock in enumerate(("wall_seconds", "process_cpu_seconds")):
        times = {s: [[step[index] for step in run] for run in found] for s, found in runs.items()}
        result[clock] = {s: spread([*chain(*found)]) for s, found in times.items() if found}
        if all(times.get(side) for side in ("theirs", "ours")):
            pairs = zip(times["theirs"], times["ours"], strict=True)
            result[clock]["theirs/ours"] = spread([median(a) / median(b) for a, b in pairs])
    if "ours" in result["wall_seconds"]:
        seconds = result["wall_seconds"]["ours"]["median"]
        counts = flops(model, mask, case.seq_len)
        result["tokens_per_second"] = case.tokens / seconds
        result["whole_run_minutes"] = WHOLE_RUN / case.tokens * seconds / 60
        result["tflops"] = {k: n * case.tokens / seconds / 1e12 for k, n in counts.items()}
        result["flop_per_token"] = counts
        result["stages_ms"] = stages(model, projection, start, blocks[: case.batch])
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

    def project() -> None:
        p = torch.sigmoid(theta / TAU)
        found["z"] = projection(theta) + (p - p.detach())

    def forward() -> None:
        found["leaf"] = found["z"].detach().requires_grad_()
        gates.set(found["leaf"])
        found["loss"] = next_token_loss(model, ids)

    def backward() -> None:
        (gradient,) = torch.autograd.grad(found["loss"], found["leaf"])
        (theta.grad,) = torch.autograd.grad(found["z"], theta, gradient)

    parts = {"project": project, "forward": forward, "backward": backward}
    parts["optimiser"] = optimizer.step
    times: dict[str, list[float]] = {name: [] for name in parts}
    with gated(model, projection.space) as gates:
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
    on K and V. Raises ValueError where ours is off by more than twice the rounding of theirs.
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
    errors = {
        what: {
            form: ((found[what] - exact[what]).norm() / exact[what].norm()).item()
            for form, found in forms.items()
        }
        for what in exact
    }
    if not all(e["ours"] <= 2 * e["theirs"] + SLACK for e in errors.values()):
        raise ValueError(f"the two forms do not compute the same: relative errors {errors}")
    return errors


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
    for name in options.models.split(","):
        model = build(name, device, dtype)
        ids = torch.randint(model.config.vocab_size, (1, 64), device=device)
        result["relative_error"][name] = agreement(model, ids, 0.5)
        for shape in options.cases.split(","):
            seq_len, batch = map(int, shape.split("x"))
            for keep in map(float, options.keep.split(",")):
                row = measure(model, Case(seq_len, batch, keep), options.steps, options.repetitions)
                result["rows"].append({"model": name, **row})
                if options.out:  # after every row: a stop leaves what is done
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(result, indent=2) + "\n")
        del model
    print(report(result))
    if options.out:
        plot(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
