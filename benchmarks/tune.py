"""Find the fastest launch configuration of every kernel on this GPU, and write it to a file.

    python -m benchmarks.tune [--out FILE] [--only NAME,...] [--seconds N]
    python -m benchmarks.tune --install FILE            use what such a sweep found on this GPU
    python -m benchmarks.tune --small --out FILE        the whole way on a CPU, in the interpreter

All candidates are compiled first, in parallel, without using the GPU; candidates that do not
compile or do not fit the chip are dropped. The others run on a small shape, where their result is
compared with fp64, and are timed on that shape and on a large one, as CUDA graphs, in turns. The
fastest correct candidate is kept: FILE (by default, the device's own among the kernels'
configurations) is written after every kernel. FILE.rows gets a row of JSON per candidate: times
with quantiles, registers, bytes of stack. A fault leaves a process without its GPU, so a new
process continues and only the faulty kernel is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._backend import kernels
from grasp_kernels._triton import launch
from grasp_kernels._triton.launch import Config, Key

Tensors = tuple[Tensor, ...]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the norm; a wrong tile is far off
ROUNDS = 10
EPS = 1e-5  # of a norm
# tokens, channels, warps of what passes once over its inputs
PLAIN = ((8, 512, 8), (4, 512, 4), (4, 1024, 8), (8, 256, 4), (2, 1024, 4), (16, 256, 8))


@dataclass(frozen=True)
class Sweep:
    """One kernel: what to try, on what, and how its result is known.

    `inputs(shape, device, dtype)` are the arguments of `run`, which launches the kernel, and of
    `exact`, which gives the same outputs in plain PyTorch at whatever precision they have.
    """

    key: Key
    candidates: tuple[Config, ...]
    shapes: tuple[tuple[int, ...], ...]  # the first is the one that is checked
    inputs: Callable[..., Tensors]
    run: Callable[..., Tensors]
    exact: Callable[..., Tensors]
    dtype: torch.dtype


# ---- what is swept --------------------------------------------------------------------------


def sweeps(chip: int, small: bool) -> list[Sweep]:
    """Those of the dtype that models run in come first; what ships leads each one's candidates."""
    dtype = torch.float32 if small else torch.bfloat16  # in the interpreter, bf16 is wrong
    found = [*_attention(16 if small else 128, dtype, small), *_swiglu(dtype, small)]
    found += [*_scales(dtype, small), *_heads(dtype, small), *_loss(dtype, small)]
    found += [*_projection(small), *_norms(40 if small else 4096, dtype, small)]
    if not small:
        found += _attention(64, dtype, small)
        found += _norms(8192, dtype, small)
        for size, width in ((128, 4096), (64, 8192)):
            found += _attention(size, torch.float32, small)
            found += _norms(width, torch.float32, small)
    shipped = launch.of_chip(chip)
    candidates = [
        (shipped[sweep.key], *(c for c in sweep.candidates if c != shipped[sweep.key]))
        for sweep in found
    ]
    return [
        replace(sweep, candidates=tried[: 2 if small else None])
        for sweep, tried in zip(found, candidates, strict=True)
    ]


def _tiles(names: str, *choices: tuple[int, ...]) -> tuple[Config, ...]:
    """Configurations of these block sizes, then warps, then stages if not 1."""
    blocks = names.split()
    return tuple(
        Config(dict(zip(blocks, choice, strict=False)), *choice[len(blocks) :])
        for choice in choices
    )


def _twins(
    module: str, call: Callable[..., Tensors]
) -> tuple[Callable[..., Tensors], Callable[..., Tensors]]:
    """`call(module, *inputs)` of the kernels and of the definitions, which have the same names."""
    return partial(call, kernels(module)), partial(call, reference)


def _sequences(
    size: int, small: bool
) -> tuple[tuple[tuple[int, ...], ...], Callable[..., Tensors]]:
    """Shapes [B, H, K, S], and the tensors of attention: grad, q, k, v, z, plain output, lse."""

    def inputs(shape, device, dtype) -> Tensors:
        batch, heads, kv_heads, length = shape
        q, grad, k, v = (
            _normal((batch, length, n, size), device, dtype).transpose(1, 2)
            for n in (heads, heads, kv_heads, kv_heads)
        )
        z = _gate(kv_heads, device)
        if device == "meta":
            return grad, q, k, v, z, torch.empty_like(q), z.new_empty(q.shape[:3])
        _, raw, lse = kernels("attention").forward(q, k, v, z, True, size**-0.5, None)
        return grad, q, k, v, z, raw, lse

    if small:
        return ((1, 4, 2, 40), (1, 2, 2, 24)), inputs
    return ((1, 32, 32, 512), (4, 32, 32, 2048)), inputs


def _attention(size: int, dtype: torch.dtype, small: bool) -> Iterator[Sweep]:
    shapes, inputs = _sequences(size, small)
    scale = size**-0.5

    def forward(grad, q, k, v, z, raw, lse) -> Tensors:
        return kernels("attention").forward(q, k, v, z, True, scale, None)[:1]

    def exact_forward(grad, q, k, v, z, raw, lse) -> Tensors:
        return (reference.gated_attention(q, k, v, z, True, scale),)

    def backward(*tensors) -> Tensors:
        return kernels("attention").backward(*tensors, True, scale, None)

    def exact_backward(grad, q, k, v, z, raw, lse) -> Tensors:
        q, k, v, z = (x.detach().requires_grad_() for x in (q, k, v, z))
        out = reference.gated_attention(q, k, v, z, True, scale)
        return torch.autograd.grad(out, (q, k, v, z), grad)

    fp32 = ((64, 32, 8, 1), (32, 32, 4, 1), (32, 16, 8, 1), (32, 16, 4, 1), (16, 32, 8, 1))
    half = {
        "attention_forward": (
            *((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 4), (128, 128, 8, 3)),
            *((64, 64, 4, 3), (128, 32, 8, 3)),
        ),
        "attention_backward_kv": (
            *((32, 64, 8, 1), (32, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 1)),
            *((64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 1)),
        ),
        "attention_backward_q": (
            *((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 8, 2)),
            *((128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)),
        ),
    }
    for name, choices in half.items():
        tiles = _tiles("BLOCK_M BLOCK_N", *(choices if dtype == torch.bfloat16 else fp32))
        run, exact = backward, exact_backward
        if name == "attention_forward":
            run, exact = forward, exact_forward
        key = (name, 8 * dtype.itemsize, 64 if size <= 64 else 128)
        yield Sweep(key, tiles, shapes, inputs, run, exact, dtype)


def _heads(dtype: torch.dtype, small: bool) -> Iterator[Sweep]:
    shapes, inputs = _sequences(16 if small else 128, small)

    def delta(grad, q, k, v, z, raw, lse) -> Tensors:
        return kernels("attention").delta(grad, raw, z)

    def exact_delta(grad, q, k, v, z, raw, lse) -> Tensors:
        return (grad * raw).sum(-1), reference.head_gradient(grad, raw, z)

    def around_sdpa(module, grad, q, k, v, z, raw, lse) -> Tensors:
        packed = module.pack_heads(grad, q, k, v, z, raw, lse, (len(z) + 1) // 2)
        full = module.unpack_heads(*packed[1:4], z, q.shape[1])
        return module.gate_heads(raw, z), *packed, *full

    rows = [(m, warps) for m in (64, 32, 128) for warps in (4, 8)]
    tiles = _tiles("BLOCK_M", *rows)
    yield Sweep("attention_delta", tiles, shapes, inputs, delta, exact_delta, dtype)
    yield Sweep("sdpa", tiles, shapes, inputs, *_twins("sdpa", around_sdpa), dtype)


def _swiglu(dtype: torch.dtype, small: bool) -> Iterator[Sweep]:
    shapes = ((9, 40), (5, 24)) if small else ((512, 11008), (16384, 11008))

    def inputs(shape, device, dtype) -> Tensors:
        gate_pre, up, grad = (_normal(shape, device, dtype) for _ in range(3))
        z, kept = _gate(shape[1], device), shape[1] // 2
        parts = gate_pre[:, :kept], up[:, :kept], gate_pre[:, kept:]  # any values will do
        order = (z == 0).to(torch.int8).argsort(stable=True)
        return grad, gate_pre, up, z, order, *(part.contiguous() for part in parts)

    def pack(module, grad, gate_pre, up, z, order, *parts) -> Tensors:
        return module.swiglu_pack(gate_pre, up, z, order, len(z) // 2)

    def pack_backward(module, grad, gate_pre, up, z, order, *parts) -> Tensors:
        return module.swiglu_pack_backward(grad, *parts, z, order)

    def forward(module, grad, gate_pre, up, z, *rest) -> Tensors:
        return (module.gated_swiglu(gate_pre, up, z),)

    def backward(module, grad, gate_pre, up, z, *rest) -> Tensors:
        return module.swiglu_backward(grad, gate_pre, up, z)

    sums = _tiles(
        "BLOCK_T BLOCK_F ROWS",
        *((16, 128, 128, 4), (8, 128, 128, 4), (8, 256, 128, 8), (16, 64, 128, 4)),
        *((16, 128, 64, 4), (8, 128, 64, 4), (16, 128, 256, 4), (32, 64, 128, 4)),
    )
    packed = ((8, 256, 8), (4, 512, 8), (8, 128, 4), (16, 128, 8), (4, 256, 4), (2, 512, 4))
    for name, call, tiles in (
        ("swiglu", forward, _tiles("BLOCK_T BLOCK_F", *PLAIN)),
        ("swiglu_pack", pack, _tiles("BLOCK_T BLOCK_F", *packed)),
        ("swiglu_backward", backward, sums),
        ("swiglu_pack_backward", pack_backward, sums),
    ):
        yield Sweep(name, tiles, shapes, inputs, *_twins("swiglu", call), dtype)


def _rows(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensors:
    """Tensors of a scale: grad, x, weight, scale, and the inverse root mean squares of x."""
    grad, x = (_normal(shape, device, dtype) for _ in range(2))
    weight, scale = (1 + 0.3 * _normal(shape[1:], device, torch.float32) for _ in range(2))
    inverse = torch.rsqrt(x.float().square().mean(1) + EPS)
    return grad, x, weight.to(dtype), scale, inverse


def _scales(dtype: torch.dtype, small: bool) -> Iterator[Sweep]:
    shapes = ((9, 40), (5, 24)) if small else ((512, 4096), (16384, 4096))

    def forward(module, grad, x, weight, scale, inverse) -> Tensors:
        return (module.channel_scale(x, scale),)

    def backward(module, grad, x, weight, scale, inverse) -> Tensors:
        return module.channel_scale_backward(grad, x, scale)

    tiles = _tiles("BLOCK_T BLOCK_F", *PLAIN)
    sums = _tiles(
        "BLOCK_T BLOCK_F ROWS",
        *((16, 128, 64, 4), (16, 128, 128, 4), (8, 256, 64, 8), (8, 128, 32, 4), (32, 64, 64, 4)),
    )
    yield Sweep("channel_scale", tiles, shapes, _rows, *_twins("scale", forward), dtype)
    yield Sweep("channel_scale_backward", sums, shapes, _rows, *_twins("scale", backward), dtype)


def _norms(width: int, dtype: torch.dtype, small: bool) -> Iterator[Sweep]:
    shapes = ((9, width), (5, width)) if small else ((512, width), (8192, width))

    def forward(module, grad, x, weight, scale, inverse) -> Tensors:
        return module.rms_norm_scale_forward(x, weight, scale, EPS)

    def backward(module, grad, x, weight, scale, inverse) -> Tensors:
        return module.rms_norm_scale_backward(grad, x, inverse, weight, scale)

    most = 8 * dtype.itemsize, 4096 if width <= 4096 else 16_384
    programs = [(n, warps) for n in (256, 512, 128, 1024) for warps in (8, 16)]
    for name, call, tiles in (
        ("rms_norm_scale", forward, _tiles("", (8,), (4,), (16,))),
        ("rms_norm_scale_backward", backward, _tiles("PROGRAMS", *programs)),
    ):
        yield Sweep((name, *most), tiles, shapes, _rows, *_twins("scale", call), dtype)


def _loss(dtype: torch.dtype, small: bool) -> Iterator[Sweep]:
    shapes = ((5, 70), (3, 40)) if small else ((256, 32_000), (1024, 32_000))

    def inputs(shape, device, dtype) -> Tensors:
        # so wide that the target's own entry does not hide what is wrong in the others
        return 3 * _normal(shape, device, dtype), torch.arange(shape[0], device=device)

    def call(module, logits, targets) -> Tensors:
        return module.softmax_loss(logits.clone(), targets, True)  # it may write over them

    sizes = [(n, warps) for n in (4096, 2048, 8192) for warps in (8, 4, 16)]
    tiles = _tiles("BLOCK_V", *sizes)
    yield Sweep("cross_entropy", tiles, shapes, inputs, *_twins("cross_entropy", call), dtype)


def _projection(small: bool) -> Iterator[Sweep]:
    shapes = ((96,), (64,)) if small else ((353_280,), (459_008,))  # Llama-2-7B, Llama-3.1-8B

    def inputs(shape, device, dtype) -> Tensors:
        (units,) = shape
        costs = torch.full((units,), 3, device=device)
        costs[-units // 345 :] = 512
        floor = torch.zeros(units, dtype=torch.bool, device=device)
        floor[::11008] = True
        order = _normal((units,), device, torch.float32).argsort()
        budget = torch.full((), 2 * units, device=device)
        return _normal((units,), device, torch.float32), costs, budget, floor, order

    def run(*tensors) -> Tensors:
        return kernels("projection").budget_topk(*tensors)[:1]

    def exact(scores, *rest) -> Tensors:
        return (reference.budget_topk(scores.float(), *rest),)

    blocks = [(n, warps) for n in (2048, 1024, 4096, 8192) for warps in (8, 4)]
    for name, tiles in {
        "projection": _tiles("BLOCK", *blocks),
        "projection_write": _tiles("BLOCKS", (256, 8), (128, 8), (512, 8)),
    }.items():
        yield Sweep(name, tiles, shapes, inputs, run, exact, torch.float32)


def _normal(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _gate(size: int, device: str) -> Tensor:
    """Half of the units, with scales."""
    z = torch.zeros(size, device=device)
    z[torch.arange(0, size, 2, device=device)] = 0.8
    return z


# ---- compiling: in processes that see no GPU ------------------------------------------------


def compile_candidate(chip: int, small: bool, number: int, which: int) -> dict[str, Any]:
    """Registers and stack a thread, shared bytes a block, of the launches that it decides."""
    from benchmarks.compile_gate import SHARED_LIMIT, compiling

    sweep = sweeps(chip, small)[number]
    table = {**launch.of_chip(chip), sweep.key: sweep.candidates[which]}
    usages: list[Any] = []
    for shape in sweep.shapes:
        tensors = sweep.inputs(shape, "meta", sweep.dtype)
        usages += compiling(chip, table, partial(sweep.run, *tensors)).values()
    found = {
        name: max(getattr(usage, name) for usage in usages)
        for name in ("registers", "stack", "shared")
    }
    limit = SHARED_LIMIT[max(known for known in SHARED_LIMIT if known <= chip)]
    if found["shared"] > limit:
        found["error"] = f"{found['shared']} bytes of shared memory, the chip has {limit}"
    return found


# ---- measuring: in a process that a fault may end -------------------------------------------


def measure(chip: int, small: bool, number: int, which: list[int]) -> list[dict[str, Any]]:
    """Of each of these candidates: the error of its result, or its times at both shapes."""
    sweep = sweeps(chip, small)[number]
    device, clock = ("cpu", host_clock) if small else ("cuda", graph_clock)
    torch.manual_seed(0)
    problems = [sweep.inputs(shape, device, sweep.dtype) for shape in sweep.shapes]
    wide = [x.double() if x.is_floating_point() else x for x in problems[0]]
    exact = sweep.exact(*wide)
    table = launch.table(problems[0][0].device)
    shipped = table[sweep.key]
    rows: dict[int, dict[str, Any]] = {}
    clocks: dict[int, list[Callable[[], float]]] = {}
    try:
        for candidate in which:
            table[sweep.key] = sweep.candidates[candidate]
            rows[candidate] = {"times_ms": [[] for _ in problems]}
            rows[candidate] |= _checked(sweep, problems[0], exact)
            if "error" not in rows[candidate]:
                clocks[candidate] = [clock(partial(sweep.run, *p)) for p in problems]
        for _ in range(1 if small else ROUNDS):
            for candidate, ones in clocks.items():
                table[sweep.key] = sweep.candidates[candidate]  # which a graph knows already
                for times, one in zip(rows[candidate]["times_ms"], ones, strict=True):
                    times.append(one())
    finally:
        table[sweep.key] = shipped
    return [rows[candidate] for candidate in which]


def _checked(sweep: Sweep, problem: Tensors, exact: Tensors) -> dict[str, Any]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        out = sweep.run(*problem)
    except (OutOfResources, CompilationError) as error:
        return {"error": str(error).strip().splitlines()[-1]}
    off = max(
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()
        for a, b in zip(out, exact, strict=True)
    )
    if not off <= TOLERANCE[sweep.dtype]:  # NaN neither
        return {"relative_error": off, "error": f"wrong: relative error {off:.1e}"}
    return {"relative_error": off}


def graph_clock(call: Callable[[], Any], seconds: float = 2e-3) -> Callable[[], float]:
    """Captures so many calls that they take some time; the clock gives milliseconds for one.

    What fits into L2 stays there from call to call, as in a step it comes from the kernel before.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        side.synchronize()
        began = time.perf_counter()
        call()
        side.synchronize()
        repeats = max(1, round(seconds / (time.perf_counter() - began)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(repeats):
            call()

    def clock() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    return clock


def host_clock(call: Callable[[], Any]) -> Callable[[], float]:
    def clock() -> float:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    return clock


# ---- the run --------------------------------------------------------------------------------


def fastest(rows: list[dict[str, Any]]) -> int | None:
    """Which right candidate's times, at the shapes, have the least product; None where none is."""
    products = {
        number: math.prod(statistics.median(times) for times in row["times_ms"])
        for number, row in enumerate(rows)
        if "error" not in row
    }
    return min(products, key=lambda number: products[number], default=None)


def run(options: argparse.Namespace, chip: int, device: str) -> int:
    chosen = {
        number: sweep
        for number, sweep in enumerate(sweeps(chip, options.small))
        if not options.only or any(name in str(sweep.key) for name in options.only.split(","))
    }
    began, spawn, failed = time.perf_counter(), get_context("spawn"), 0
    found = launch.read(options.out) if options.out.exists() else {}
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        compiled: dict[int, list[Future]] = {
            number: [
                pool.submit(compile_candidate, chip, options.small, number, which)
                for which in range(len(sweep.candidates))
            ]
            for number, sweep in chosen.items()
        }
        if options.small:
            os.environ["TRITON_INTERPRET"] = "1"  # of the processes that start from here on
        worker = ProcessPoolExecutor(1, mp_context=spawn)
        for number, sweep in chosen.items():
            if time.perf_counter() - began > options.seconds:
                print(f"{options.seconds} s are over before {sweep.key}")
                break
            rows = [outcome(future) for future in compiled[number]]
            fitting = [i for i, row in enumerate(rows) if "error" not in row]
            measured = outcome(worker.submit(measure, chip, options.small, number, fitting))
            if isinstance(measured, dict):  # a fault ends the process
                worker.shutdown(cancel_futures=True)
                worker = ProcessPoolExecutor(1, mp_context=spawn)
                measured = [measured] * len(fitting)
            for which, row in zip(fitting, measured, strict=True):
                rows[which] |= row
            best = fastest(rows)
            failed += best is None
            if best is not None:
                found[sweep.key] = sweep.candidates[best]
                launch.write(found, options.out)
            _record(options.out, device, sweep, rows, best)
        worker.shutdown()
        pool.shutdown(cancel_futures=True)
    return failed


def outcome(future: Future) -> Any:
    """What a process returned, or the error that it ended with, as a row."""
    try:
        return future.result()
    except Exception as error:  # the compiler's, the driver's, or a process that died
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[-1]}"}


def _record(
    out: Path, device: str, sweep: Sweep, rows: list[dict[str, Any]], best: int | None
) -> None:
    with out.with_suffix(".rows").open("a") as file:
        for number, (candidate, row) in enumerate(zip(sweep.candidates, rows, strict=True)):
            samples = row.pop("times_ms", [])
            for name, q in (("median_ms", 0.5), ("q20_ms", 0.2), ("q80_ms", 0.8)):
                row[name] = [torch.tensor(s).quantile(q).item() for s in samples if s]
            where = {"device": device, "kernel": sweep.key, "shapes": sweep.shapes}
            config = {**candidate.blocks, "warps": candidate.num_warps}
            config["stages"] = candidate.num_stages
            row = {**where, **config, **row, "chosen": number == best}
            file.write(json.dumps(row) + "\n")
            mark = "*" if number == best else " "
            says = row.get("error") or " ".join(f"{ms:.3f}" for ms in row["median_ms"])
            print(f"{mark} {sweep.key} {config} stack {row.get('stack')}: {says}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of configurations, added to where it exists")
    parser.add_argument("--only", default="", help="kernels whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=600, help="no kernel is begun after them")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--small", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--install", type=Path, help="take what such a file holds for this GPU")
    options = parser.parse_args()
    if options.install:
        own = launch.measured(torch.cuda.get_device_name())
        launch.write(launch.read(options.install), own)
        return 0
    if options.small and options.out is None:
        parser.error("--small measures nothing worth keeping: say where with --out")
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device: use --small to try the script on the CPU")
    if options.small:
        chip, device = 90, "interpreter"
    else:
        major, minor = torch.cuda.get_device_capability()
        chip, device = 10 * major + minor, torch.cuda.get_device_name()
    if options.out is None:
        options.out = launch.measured(device)
    return 1 if run(options, chip, device) else 0


if __name__ == "__main__":
    raise SystemExit(main())
