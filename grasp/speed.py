"""How fast and how large one model is, or two in one run: prefill, decode, KV cache, weights.

A model named by a .gguf file runs in llama.cpp, any other in transformers. Both take the same
random prompts, go through one prefill, and then decode greedily from a KV cache, token by token.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from grasp.config import Dtype
from grasp.data import Progress
from grasp.errors import GraspError
from grasp.header import read_header
from grasp.models import TORCH_NAMES, best_dtype, load_model, pick_device, resolve
from grasp.run import disk_errors, memory_errors

SEED = 0  # of the prompts
QUANTILES = (0.5, 0.1, 0.9)


@dataclass(frozen=True)
class Spread:
    """Of what the repetitions gave."""

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
    """Prefill (a step is a batch of prompts) or decode (a token for each) of one shape.

    `seconds`, `tokens_per_second` and `repetitions`, the seconds a step of each, go by model.
    """

    seconds: tuple[Spread, ...]
    tokens_per_second: tuple[float, ...]  # of the median
    repetitions: tuple[tuple[float, ...], ...]
    speedup: Spread | None  # seconds of `against` over those of the model, pair by pair


@dataclass(frozen=True)
class Case:
    """One shape: `batch_size` prompts of `prompt_len` tokens."""

    batch_size: int
    prompt_len: int
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class Benched:
    """One model: what ran it, and its bytes."""

    model: str
    runtime: str
    dtype: str  # of the weights
    disk_bytes: int  # of the files that hold the weights
    memory_bytes: int  # of the weights as they are computed with
    kv_dtype: str
    kv_bytes_per_token: float  # of the cache itself, after the largest case
    kv_bytes_per_token_planned: int  # by config.json or the GGUF header


@dataclass(frozen=True)
class Bench:
    """Speed and size of one model, or of two in the same minutes."""

    models: tuple[Benched, ...]
    cases: tuple[Case, ...]
    settings: dict[str, Any]
    versions: dict[str, str]

    def rows(self) -> list[tuple[str, ...]]:
        """(what, each model's, ratio if there are two) for a table."""
        sizes: list[tuple[str, Sequence[float]]] = [
            ("weights on disk", [m.disk_bytes for m in self.models]),
            ("weights in memory", [m.memory_bytes for m in self.models]),
            ("KV cache per token", [m.kv_bytes_per_token for m in self.models]),
            ("by its config", [m.kv_bytes_per_token_planned for m in self.models]),
        ]
        rows = []
        for what, values in sizes:
            ratio = [f"{values[0] / values[1]:.2%}"] if len(values) > 1 else []
            rows.append((what, *(f"{value:,.0f} B" for value in values), *ratio))
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
        """How it was measured, in one line."""
        many = self.settings
        runs = dict.fromkeys(f"{m.runtime}, {m.dtype}" for m in self.models)
        pairs = ", both models in turns, speed-up pair by pair (10 % to 90 %)"
        threads = f"{many['threads']} thread" + "s" * (many["threads"] > 1)
        return (
            f"Speed: batch x prompt, medians of {many['repetitions']} repetitions"
            f"{pairs if len(self.models) > 1 else ''}; decode: a step of {many['tokens']}, greedy, "
            f"from the {'/'.join(dict.fromkeys(m.kv_dtype for m in self.models))} cache; "
            f"{'; '.join(runs)}; {many['machine']}, {threads}."
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
    device: str = "auto",
    plot: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Time `model`, and `against` if given, in every batch size with every prompt length.

    A repetition is one prefill, with the head on the last token alone, and `tokens` decode steps
    through the model's own forward and cache; the models take turns, in alternating order, after a
    warm-up each. Both are in memory at the same time. `dtype` is that of models in transformers
    (auto: bf16 on a GPU, fp32 on a CPU); a GGUF file has its own, and a cache in f16. `plot` names
    a PNG of tokens per second.

    Raises GraspError: a model that does not load, numbers it cannot take, a cache with which it
    computes something else, no llama.cpp for a .gguf file, memory that runs out.
    """
    numbers: dict[str, Sequence[int]] = {
        "--batch-sizes": batch_sizes,
        "--prompt-lens": prompt_lens,
        "--tokens": [tokens],
        "--repetitions": [repetitions],
    }
    for option, counts in numbers.items():
        if not counts or min(counts) < 1:
            given = ",".join(map(str, counts)) or "is empty"
            raise GraspError(f"{option} {given}: choose whole numbers from 1")
    plot = _plot_path(plot)
    names = [model] if against is None else [model, against]
    device = pick_device(device)
    longest = max(prompt_lens) + tokens
    fix = "lower --batch-sizes, --prompt-lens or --tokens, or use --dtype bf16"
    with memory_errors(f"device {device}", fix):
        runners: list[_Transformers | _LlamaCpp] = []
        for name in names:
            if _is_file(name):
                runners.append(_LlamaCpp(name, device, max(batch_sizes), longest))
            else:
                runners.append(_Transformers(name, dtype, device, trust_remote_code))
        for runner in runners:
            if longest > runner.limit:
                raise GraspError(
                    f"--prompt-lens {max(prompt_lens)} and --tokens {tokens} are more than "
                    f"{runner.name} takes: at most {runner.limit} together"
                )
            runner.check()
        shapes = [(b, p) for b in dict.fromkeys(batch_sizes) for p in dict.fromkeys(prompt_lens)]
        cases, cache = [], [0.0 for _ in runners]
        for index, (batch, prompt) in enumerate(shapes):

            def report(done: int, before: int = index * repetitions) -> None:
                if progress:
                    progress(before + done, len(shapes) * repetitions)

            runs = _in_turns(runners, batch, prompt, tokens, repetitions, report)
            cases.append(_case(batch, prompt, runs))
            if batch * prompt == max(batch_sizes) * max(prompt_lens):
                cache = [runner.cache_bytes_per_token() for runner in runners]
    result = Bench(
        models=tuple(runner.describe(kv) for runner, kv in zip(runners, cache, strict=True)),
        cases=tuple(cases),
        settings={
            "batch_sizes": list(batch_sizes),
            "prompt_lens": list(prompt_lens),
            "tokens": tokens,
            "repetitions": repetitions,
            "seed": SEED,
            "device": device,
            "machine": _machine(device),
            "threads": torch.get_num_threads(),
        },
        versions={
            package: version(package)
            for package in ("grasp", *dict.fromkeys(p for r in runners for p in r.packages))
        },
    )
    if plot:
        with disk_errors(plot):
            _plot(result, plot)
    return result


class _Run(NamedTuple):
    prefill: float  # seconds until every sequence of the batch has its first token
    decode: float  # seconds a token of each


def _in_turns(
    runners: Sequence[_Transformers | _LlamaCpp],
    batch: int,
    prompt: int,
    tokens: int,
    repetitions: int,
    report: Any,
) -> list[list[_Run]]:
    """Runs of each model; the first, when allocators warm up, is not among them."""
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = min(runner.vocabulary for runner in runners)
    ids = torch.randint(vocabulary, (batch, prompt), generator=generator)
    for runner in runners:
        runner.run(ids, tokens)
    runs: list[list[_Run]] = [[] for _ in runners]
    for repetition in range(repetitions):
        turns = list(zip(runners, runs, strict=True))
        for runner, found in reversed(turns) if repetition % 2 else turns:
            found.append(runner.run(ids, tokens))
        report(repetition + 1)
    return runs


def _case(batch: int, prompt: int, runs: list[list[_Run]]) -> Case:
    prefill, decode = ([[run[i] for run in found] for found in runs] for i in (0, 1))
    return Case(batch, prompt, _phase(prefill, batch * prompt), _phase(decode, batch))


def _phase(seconds: list[list[float]], tokens: int) -> Phase:
    """`seconds` [models][repetitions] of a step that gives so many tokens."""
    spreads = tuple(map(Spread.of, seconds))
    ratios = [theirs / ours for ours, *others in zip(*seconds, strict=True) for theirs in others]
    return Phase(
        seconds=spreads,
        tokens_per_second=tuple(tokens / spread.median for spread in spreads),
        repetitions=tuple(map(tuple, seconds)),
        speedup=Spread.of(ratios) if ratios else None,
    )


class _Transformers:
    """A model in transformers, on a CPU or a GPU."""

    packages = ("torch", "transformers")

    def __init__(self, name: str, dtype: Dtype, device: str, trust_remote_code: bool):
        kind = best_dtype(device) if dtype == "auto" else dtype
        self.name, self.source = name, resolve(name)
        self.header = read_header(name)
        self.model: Any = load_model(
            name,
            dtype=getattr(torch, TORCH_NAMES[kind]),
            device=device,
            trust_remote_code=trust_remote_code,
        )[0]
        self.vocabulary = self.header.vocab_size
        self.limit = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        self._cache_bytes_per_token = 0.0

    @torch.inference_mode()
    def check(self) -> None:
        """Raises GraspError unless decoding from the cache gives the logits of one full pass."""
        ids = torch.arange(24, device=self.model.device).view(2, 12) % self.vocabulary
        out = self.model(ids[:, :8], use_cache=True)
        for column in ids[:, 8:].split(1, dim=1):
            out = self.model(column, past_key_values=out.past_key_values, use_cache=True)
        whole = self.model(ids, use_cache=False).logits[:, -1].float()
        error = ((out.logits[:, -1].float() - whole).norm() / whole.norm()).item()
        if not error <= torch.finfo(self.model.dtype).eps ** 0.5:  # a NaN is no agreement either
            raise GraspError(
                f"{self.name} computes something else from its KV cache: relative error {error:.1e}"
                " of the logits; nothing was timed (`grasp verify` tells whether it is damaged)"
            )

    @torch.inference_mode()
    def run(self, ids: Tensor, tokens: int) -> _Run:
        """One prefill of `ids` int64 [batch, prompt], and `tokens` decode steps."""
        ids = ids.to(self.model.device)
        start = self._now()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits.argmax(-1)
        middle = self._now()
        cache = out.past_key_values
        held = sum(
            tensor.numel() * tensor.element_size()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
        )
        self._cache_bytes_per_token = held / ids.numel()
        resumed = self._now()
        for _ in range(tokens):
            out = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits.argmax(-1)
        return _Run(middle - start, (self._now() - resumed) / tokens)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def cache_bytes_per_token(self) -> float:
        """Of the last run, after its prefill."""
        return self._cache_bytes_per_token

    def describe(self, kv_bytes: float) -> Benched:
        kind = str(self.model.dtype).removeprefix("torch.")
        tensors = [*self.model.parameters(), *self.model.buffers()]  # tied ones once
        return Benched(
            model=self.name,
            runtime=f"torch {version('torch')} and transformers {version('transformers')}",
            dtype=kind,
            disk_bytes=sum(file.stat().st_size for file in self._files()),
            memory_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            kv_dtype=kind,
            kv_bytes_per_token=kv_bytes,
            kv_bytes_per_token_planned=self.header.space.kv_cache_bytes_per_token(
                self.model.dtype.itemsize
            ),
        )

    def _files(self) -> list[Path]:
        location = self.source.location
        if self.source.kind == "gguf":
            return [Path(location)]
        if self.source.kind == "hub":
            from huggingface_hub import snapshot_download

            location = snapshot_download(
                location, allow_patterns="*.safetensors", local_files_only=True
            )
        return list(Path(location).glob("*.safetensors"))


class _LlamaCpp:
    """A .gguf file in llama.cpp: its own server, which times prefill and decode itself."""

    packages = ("xllamacpp",)

    def __init__(self, name: str, device: str, batch: int, longest: int):
        self.name, self.path = name, Path(name).expanduser()
        self.header = read_header(name)
        try:
            import xllamacpp
        except ImportError:
            raise GraspError(
                f"{name} runs in llama.cpp, which is not installed: pip install 'grasp[llama-cpp]'"
            ) from None
        kinds = xllamacpp.ggml_backend_dev_type
        gpus = [
            found
            for found in xllamacpp.get_device_info()
            if found["type"] != kinds.GGML_BACKEND_DEVICE_TYPE_CPU
        ]
        if device != "cpu" and not gpus:
            raise GraspError(
                f"--device {device}: the installed xllamacpp sees no GPU; install its build for "
                "yours, or use --device cpu"
            )
        self._folder = tempfile.TemporaryDirectory()  # for the caches that are measured
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_parallel, params.n_ctx = batch, batch * (longest + 8)
        params.n_batch = batch * longest  # so that all prompts of a batch end in one decode call
        params.n_gpu_layers = 0 if device == "cpu" else 999
        if device != "cpu":  # one of them, as in torch
            params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = torch.device(device).index or 0
        threads = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = params.ui = False
        params.cache_ram_mib, params.verbosity = 0, -1
        params.slot_save_path = f"{self._folder.name}/"
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # with a reason of its own
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise GraspError(f"llama.cpp cannot load {name}: {reason}") from error
        self._open = build_opener(ProxyHandler({})).open  # no proxy between us and ourselves
        self._meta = self._ask("/v1/models")["data"][0]["meta"]
        self._slots: list[int] = []
        self.vocabulary, self.limit = self._meta["n_vocab"], self._meta["n_ctx_train"]

    def check(self) -> None:
        """Every run is checked: see there."""

    def run(self, ids: Tensor, tokens: int) -> _Run:
        """One prefill of `ids` int64 [batch, prompt], and `tokens` decode steps.

        Raises GraspError if llama.cpp took part of a prompt from a cache, or stopped early.
        """
        answers = self._ask(
            "/completion",
            prompt=ids.tolist(),
            n_predict=tokens + 1,  # the first is the prefill's
            temperature=0,
            ignore_eos=True,
            cache_prompt=False,
        )
        answers = answers if isinstance(answers, list) else [answers]
        timings = [answer["timings"] for answer in answers]
        for timed in timings:
            if (timed["prompt_n"], timed["predicted_n"]) != (ids.shape[1], tokens + 1):
                raise GraspError(
                    f"llama.cpp computed {timed['prompt_n']} prompt and {timed['predicted_n']} "
                    f"other tokens of {self.name} where {ids.shape[1]} and {tokens + 1} were asked "
                    "for: nothing was timed"
                )
        self._slots = [answer["id_slot"] for answer in answers]
        prefill, decode = (
            max(timed[key] for timed in timings) / 1e3 for key in ("prompt_ms", "predicted_ms")
        )
        return _Run(prefill, decode / tokens)

    def cache_bytes_per_token(self) -> float:
        """Of the last run, as llama.cpp saves it: with some bytes that say whose each cell is."""
        saved = [self._ask(f"/slots/{s}?action=save", filename="slot") for s in self._slots]
        return sum(slot["n_written"] for slot in saved) / sum(slot["n_saved"] for slot in saved)

    def describe(self, kv_bytes: float) -> Benched:
        return Benched(
            model=self.name,
            runtime=f"llama.cpp (xllamacpp {version('xllamacpp')})",
            dtype=str(self._meta["ftype"]),
            disk_bytes=self.path.stat().st_size,
            memory_bytes=self._meta["size"],
            kv_dtype="float16",
            kv_bytes_per_token=kv_bytes,
            kv_bytes_per_token_planned=self.header.space.kv_cache_bytes_per_token(2),
        )

    def _ask(self, path: str, **body: Any) -> Any:
        head = {"Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        try:
            with self._open(Request(self._server.listening_address + path, data, head)) as answer:
                return json.load(answer)
        except HTTPError as error:
            reason = error.read().decode()
            with suppress(ValueError, KeyError, TypeError):
                reason = json.loads(reason)["error"]["message"]
            raise GraspError(f"llama.cpp refused to run {self.name}: {reason}") from None


def _is_file(name: str) -> bool:
    """A .gguf file by name, as opposed to the demo model: what llama.cpp is to run."""
    return resolve(name).kind == "gguf" and not name.startswith("demo:")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"


def _shape(case: Case) -> str:
    return f"{case.batch_size} x {case.prompt_len}"


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.processor() or platform.machine()}"


def _plot_path(plot: str | Path | None) -> Path | None:
    """Raises GraspError where no PNG can be written, before anything is timed."""
    path = Path(plot) if plot is not None else None
    if path and path.suffix != ".png":
        raise GraspError(f"--plot {path} is no PNG: name a file that ends in .png")
    if path and not path.parent.is_dir():
        raise GraspError(f"--plot {path} is in no folder that exists: make {path.parent} first")
    return path


def _plot(result: Bench, path: Path) -> None:
    """Bars of tokens per second by shape, prefill beside decode, and the speed-up above."""
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
