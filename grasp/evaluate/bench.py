"""Measure speed and size of one model, or of two in turns: prefill, decode, KV cache, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from grasp import __version__
from grasp.config import Dtype, Runtime
from grasp.errors import GraspError
from grasp.evaluate.runtimes import (
    Benched,
    LlamaCpp,
    Run,
    Runner,
    Transformers,
    is_for_llama_cpp,
)
from grasp.evaluate.serving import Room, Vllm, check_vllm, room_for
from grasp.journal import Progress
from grasp.machine import disk_errors, memory_errors
from grasp.model.load import pick_device, processor
from grasp.report.results import add_measured, check_record

SEED = 0  # of the prompts
QUANTILES = (0.5, 0.1, 0.9)


@dataclass(frozen=True)
class Spread:
    """Median, 10 % and 90 % quantile over repetitions."""

    median: float
    q10: float
    q90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        sample = torch.tensor(values, dtype=torch.float64)
        return cls(*(sample.quantile(q).item() for q in QUANTILES))

    def __str__(self) -> str:
        return f"{self.median:.2f} x ({self.q10:.2f}-{self.q90:.2f})"


@dataclass(frozen=True)
class Phase:
    """Times of prefill or decode for one shape.

    A prefill step reads a batch of prompts; a decode step adds one token to each. `seconds`,
    `tokens_per_second` and `repetitions` (seconds per step of each) have one entry per model.
    """

    seconds: tuple[Spread, ...]
    tokens_per_second: tuple[float, ...]  # from the median
    repetitions: tuple[tuple[float, ...], ...]
    speedup: Spread | None  # ratio of seconds, `against` / model, pair by pair


@dataclass(frozen=True)
class Case:
    """One shape: `batch_size` prompts of `prompt_len` tokens."""

    batch_size: int
    prompt_len: int
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class Bench:
    """Speed and size of one model, or of two measured in turns."""

    models: tuple[Benched, ...]
    cases: tuple[Case, ...]
    settings: dict[str, Any]
    versions: dict[str, str]

    def head(self) -> tuple[str, ...]:
        return ("", *(model.model for model in self.models), *[""] * (len(self.models) > 1))

    def rows(self) -> list[tuple[str, ...]]:
        """Return table rows: (name, one value per model, ratio if there are two)."""
        sizes: list[tuple[str, Sequence[float]]] = [
            ("weights on disk", [m.disk_bytes for m in self.models]),
            ("weights in memory", [m.memory_bytes for m in self.models]),
            ("KV cache per token", [m.kv_bytes_per_token for m in self.models]),
            ("by its config", [m.kv_bytes_per_token_planned for m in self.models]),
        ]
        rows = []
        for what, values in sizes:
            if not all(values):  # by the config of a latent cache, nobody knows
                continue
            rows.append((what, *(f"{value:,.0f} B" for value in values), *_ratio(values)))
        room = [model.cache_tokens for model in self.models if model.cache_tokens]
        if room:
            what = f"KV cache, with weights {self.settings['memory_bytes']:,} B"
            rows.append((what, *(f"{tokens:,} tokens" for tokens in room), *_ratio(room)))
        for name in ("prefill", "decode"):
            for case in self.cases:
                phase: Phase = getattr(case, name)
                cells = [
                    f"{_milliseconds(seconds.median)}, {speed:,.0f} tok/s"
                    for seconds, speed in zip(phase.seconds, phase.tokens_per_second, strict=True)
                ]
                speedup = [str(phase.speedup)] if phase.speedup else []
                rows.append((f"{name} {_shape(case)}", *cells, *speedup))
        return rows

    def measured_on(self) -> str:
        """Describe in one line how it was measured."""
        how = self.settings
        runs = dict.fromkeys(f"{m.runtime}, {m.dtype}" for m in self.models)
        pairs = ", both models in turns, speed-up pair by pair (10 % to 90 %)"
        threads = f"{how['threads']} thread" + "s" * (how["threads"] > 1)
        kinds = "/".join(dict.fromkeys(m.kv_dtype for m in self.models))
        decode = "compiled, from the static" if how["compile"] else "from the"
        return (
            f"Speed: batch x prompt, medians of {how['repetitions']} repetitions"
            f"{pairs if len(self.models) > 1 else ''}; decode: a step of {how['tokens']}, greedy, "
            f"{decode} {kinds} cache; {'; '.join(runs)}; {how['machine']}, {threads}."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    model: str,
    *,
    against: str | None = None,
    batch_sizes: Sequence[int] = (1, 4),
    prompt_lens: Sequence[int] = (128, 512),
    tokens: int = 32,
    repetitions: int = 5,
    dtype: Dtype = "auto",
    compile: bool = False,
    runtime: Runtime = "auto",
    device: str = "auto",
    plot: str | Path | None = None,
    trust_remote_code: bool = False,
    record: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Time `model`, and `against` if given, at every batch size with every prompt length.

    A repetition is one prefill, with the head on the last token only, and `tokens` decode steps
    through the model's own forward and cache. After one warm-up each, the models take turns in
    alternating order. Both are in memory at the same time. `dtype` applies to models in
    transformers (auto: bf16 on a GPU, fp32 on a CPU); a GGUF file has its own, with a cache in f16.
    With `runtime="vllm"` each model has a vLLM server, `batch_sizes` are requests that arrive at
    once, and both servers have as much memory for weights and KV cache together as the larger
    model needs for the largest batch: the result tells how many tokens each cache holds.
    `compile` decodes through torch.compile with a static cache, compiled during the warm-up;
    prefill is not compiled. `plot` names a PNG file for tokens per second. `record` adds the result
    to the files of `model`, which must be a grasp checkpoint.

    Raises GraspError if a model does not load or does not support the numbers, its KV cache changes
    its outputs, llama.cpp or vLLM is missing or refuses the model, torch cannot compile it on this
    machine, or memory runs out.
    """
    _check_counts(
        batch_sizes=batch_sizes,
        prompt_lens=prompt_lens,
        tokens=[tokens],
        repetitions=[repetitions],
    )
    plot = _plot_path(plot)
    if record:
        check_record(Path(model))
    names = [model] if against is None else [model, against]
    for name in names:
        if runtime == "vllm":
            check_vllm(name)
        elif compile and is_for_llama_cpp(name):
            raise GraspError(f"`compile` is for torch, and {name} runs in llama.cpp: leave it out")
    device = pick_device(device)
    largest, longest = max(batch_sizes), max(prompt_lens)
    fix = "lower `batch_sizes`, `prompt_lens` or `tokens`, or use `dtype='bf16'`"
    with memory_errors(f"device {device}", fix):
        runners, room = _runners(
            names, runtime, dtype, device, trust_remote_code, compile, (largest, longest + tokens)
        )
        _check_lengths(runners, longest, tokens)
        shapes = [(b, p) for b in dict.fromkeys(batch_sizes) for p in dict.fromkeys(prompt_lens)]
        cases, cache = [], [0.0 for _ in runners]
        report = _reporter(progress, len(shapes) * repetitions)
        for batch, prompt in shapes:
            if compile:
                torch.compiler.reset()  # torch.compile limits the number of shapes
            runs = _in_turns(runners, batch, prompt, tokens, repetitions, report)
            cases.append(_case(batch, prompt, runs))
            if (batch, prompt) == (largest, longest):
                cache = [runner.cache_bytes_per_token() for runner in runners]
    settings = {
        "batch_sizes": list(batch_sizes),
        "prompt_lens": list(prompt_lens),
        "tokens": tokens,
        "repetitions": repetitions,
        "compile": compile,
        "seed": SEED,
        "device": device,
        "machine": processor(torch.device(device)),
        "threads": torch.get_num_threads(),
        "memory_bytes": room.memory if room else None,
    }
    result = Bench(
        models=tuple(runner.describe(kv) for runner, kv in zip(runners, cache, strict=True)),
        cases=tuple(cases),
        settings=settings,
        versions={"grasp": __version__} | {p: version(p) for r in runners for p in r.packages},
    )
    if plot:
        with disk_errors(plot):
            _plot(result, plot)
    if record:
        add_measured(Path(model), "speed", result)
    return result


def _runners(
    names: Sequence[str],
    runtime: Runtime,
    dtype: Dtype,
    device: str,
    trust_remote_code: bool,
    compile: bool,
    largest: tuple[int, int],
) -> tuple[list[Runner], Room | None]:
    """Return what runs each model; the largest case has (sequences, tokens of each)."""
    if runtime == "vllm":
        room = room_for(names, dtype, device, largest)
        return [Vllm(n, dtype, device, trust_remote_code, compile, room) for n in names], room
    return [
        LlamaCpp(name, device, *largest)
        if is_for_llama_cpp(name)
        else Transformers(name, dtype, device, trust_remote_code, compile)
        for name in names
    ], None


def _check_counts(**counts: Sequence[int]) -> None:
    for name, given in counts.items():
        if not given or min(given) < 1:
            said = ",".join(map(str, given)) or "none"
            raise GraspError(f"`{name}` must be at least 1, got {said}")


def _check_lengths(runners: Sequence[Runner], prompt_len: int, tokens: int) -> None:
    for runner in runners:
        if prompt_len + tokens > runner.limit:
            raise GraspError(
                f"`prompt_lens` and `tokens` must be at most {runner.limit} together for "
                f"{runner.name}, got {prompt_len} and {tokens}"
            )


def _reporter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return what a repetition calls at its end."""
    done = count(1)
    return lambda: progress(next(done), total) if progress else None


def _in_turns(
    runners: Sequence[Runner],
    batch: int,
    prompt: int,
    tokens: int,
    repetitions: int,
    report: Callable[[], None],
) -> list[list[Run]]:
    """Return the runs of each model, without the warm-up, which checks and may compile."""
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = min(runner.vocabulary for runner in runners)
    ids = torch.randint(vocabulary, (batch, prompt), generator=generator)
    for runner in runners:
        runner.warm_up(ids, tokens)
    runs: list[list[Run]] = [[] for _ in runners]
    for repetition in range(repetitions):
        turns = list(zip(runners, runs, strict=True))
        for runner, found in reversed(turns) if repetition % 2 else turns:
            found.append(runner.run(ids, tokens))
        report()
    return runs


def _case(batch: int, prompt: int, runs: list[list[Run]]) -> Case:
    prefill, decode = ([[run[i] for run in found] for found in runs] for i in (0, 1))
    return Case(batch, prompt, _phase(prefill, batch * prompt), _phase(decode, batch))


def _phase(seconds: list[list[float]], tokens: int) -> Phase:
    """Summarise `seconds` [models][repetitions] of a step that yields `tokens` tokens."""
    spreads = tuple(map(Spread.of, seconds))
    ratios = [theirs / ours for ours, *others in zip(*seconds, strict=True) for theirs in others]
    return Phase(
        seconds=spreads,
        tokens_per_second=tuple(tokens / spread.median for spread in spreads),
        repetitions=tuple(map(tuple, seconds)),
        speedup=Spread.of(ratios) if ratios else None,
    )


def _ratio(values: Sequence[float]) -> list[str]:
    return [f"{values[0] / values[1]:.2%}"] if len(values) > 1 else []


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"


def _shape(case: Case) -> str:
    return f"{case.batch_size} x {case.prompt_len}"


def _plot_path(plot: str | Path | None) -> Path | None:
    """Raise GraspError, before anything is timed, if no PNG can be written."""
    path = Path(plot) if plot is not None else None
    if path and path.suffix != ".png":
        raise GraspError(f"`plot` must name a file that ends in .png, got {path}")
    if path and not path.parent.is_dir():
        raise GraspError(f"`plot` {path} must be in a folder that exists: make {path.parent} first")
    return path


def _plot(result: Bench, path: Path) -> None:
    """Plot tokens per second by shape, prefill next to decode, with the speed-up above the bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    colors = ("#2f6f9f", "#c3c9d2")
    width = 0.8 / len(result.models)
    for axes, name in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        phases: list[Phase] = [getattr(case, name) for case in result.cases]
        for index, model in enumerate(result.models):
            places = [i + (index + 0.5) * width - 0.4 for i in range(len(phases))]
            speeds = [phase.tokens_per_second[index] for phase in phases]
            bars = axes.bar(places, speeds, width, color=colors[index], label=model.model)
            if index == 0:
                labels = [f"{p.speedup.median:.2f} x" if p.speedup else "" for p in phases]
                axes.bar_label(bars, labels, padding=2, fontsize=8)
        axes.set_title(name)
        axes.set_xticks(range(len(phases)), [_shape(case) for case in result.cases])
        axes.set_xlabel("batch x prompt")
        axes.set_ylabel("tokens/s")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
