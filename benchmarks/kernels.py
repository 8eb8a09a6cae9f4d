"""Time every op of grasp_kernels against its usual alternatives.

    python -m benchmarks.kernels --out benchmarks/results/<device>.jsonl [--op swiglu] [--small]

Adds a line of JSON for each figure as soon as it is known, with the device and the versions, and
plots all of them. Each op runs in its own process, since a fault leaves a process without its GPU.
A figure says whether its op's correctness tests passed in the same run, on the same device: do not
quote figures marked "red". Contenders take turns, so that clocks and heat are shared; a time is the
median over all turns, with the 20 % and 80 % quantiles. Small shapes, which a GPU computes faster
than it launches them, run as CUDA graphs. Achieved TFLOP/s count the work that the mask requires,
and GB/s the bytes that must move, the same for every contender; `fraction` is the share of the
device's roof, measured in the same process.

--small runs one small shape on the CPU in fp32.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.evidence import add, numbers, passed, tiles, words
from grasp.errors import reason
from grasp_kernels import (
    budget_topk,
    channel_scale,
    gated_attention,
    gated_swiglu,
    gated_swiglu_ffn,
    linear_cross_entropy,
    linear_distillation,
    rms_norm_scale,
)

ROOT = Path(__file__).parents[1]
QUANTILES = (0.5, 0.2, 0.8)
GRAPH_TOKENS = 4096  # up to here launches may take the host longer than the GPU


class Model(NamedTuple):
    size: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int


MODELS = {
    "Llama-2-7B": Model(4096, 11008, 32, 32, 128, 32, 32_000),
    "Llama-3.1-8B": Model(4096, 14336, 32, 8, 128, 32, 128_256),
}
SMALL = {"SmolLM2-135M": Model(576, 1536, 9, 3, 64, 30, 49_152)}


class Setup(NamedTuple):
    """One row of shapes. Work is in FLOP or bytes per pass; without it only times are given."""

    op: str
    label: dict[str, Any]
    contenders: dict[str, Callable[..., Any]]
    inputs: tuple[Tensor, ...]
    work: dict[str, float]
    unit: str


# ---- setups: what is timed ------------------------------------------------------------------


def swiglu(models, tokens, keeps, device, dtype) -> Iterator[Setup]:
    def eager(gate_pre, up, z):
        return F.silu(gate_pre) * up * z.to(up.dtype)

    contenders = {"grasp": gated_swiglu, "eager": eager, **_compiled(eager, device)}
    if find_spec("liger_kernel") and device == "cuda":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        contenders["liger x gate"] = lambda a, u, z: (
            LigerSiLUMulFunction.apply(a, u) * z.to(u.dtype)
        )
    for (name, model), count, keep in _grid(models, tokens, keeps):
        shape = (count, model.width)
        inputs = (*_leaves(device, dtype, shape, shape), _gate(model.width, keep, device))
        moved = count * model.width * dtype.itemsize
        work = {"forward": 3.0 * moved, "backward": 5.0 * moved, "both": 8.0 * moved}
        label = {"model": name, "tokens": count, "keep": keep}
        yield Setup("swiglu", label, contenders, inputs, work, "GB/s")


def ffn(models, tokens, keeps, device, dtype) -> Iterator[Setup]:
    for (name, model), count, keep in _grid(models, tokens, keeps):
        up_shape = (model.width, model.size)
        w_gate, w_up, w_down = (
            (torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype)
            for shape in (up_shape, up_shape, up_shape[::-1])
        )
        z = _gate(model.width, keep, device)
        max_kept = int(z.count_nonzero())

        def eager(x, z, w_gate=w_gate, w_up=w_up, w_down=w_down):
            hidden = F.silu(x @ w_gate.T) * (x @ w_up.T)
            return (hidden * z.to(x.dtype)) @ w_down.T

        def ours(x, z, weights=(w_gate, w_up, w_down), max_kept=max_kept):
            return gated_swiglu_ffn(x, *weights, z, max_kept=max_kept)

        (x,) = _leaves(device, dtype, (count, model.size))
        matmul = 2.0 * count * model.size * model.width
        work = {"forward": (2 + keep) * matmul, "backward": (1 + 2 * keep) * matmul}
        work["both"] = work["forward"] + work["backward"]
        contenders = {"grasp": ours, "eager": eager, **_compiled(eager, device)}
        label = {"model": name, "tokens": count, "keep": keep}
        yield Setup("ffn", label, contenders, (x, z), work, "TFLOP/s")


def attention(models, lengths, keeps, device, dtype) -> Iterator[Setup]:
    batch = 8 if device == "cuda" else 1

    def sdpa(q, k, v, z):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        gate = z.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1])
        return out * gate[:, None, None]

    def with_backend(backend, *inputs):
        with sdpa_kernel(backend):
            return sdpa(*inputs)

    for (name, model), length, keep in _grid(models, lengths, keeps):
        z = _gate(model.kv_heads, keep, device)
        ours = functools.partial(gated_attention, max_kept=int(z.count_nonzero()))
        contenders: dict[str, Callable[..., Any]]
        if device == "cuda":
            contenders = {
                "grasp triton": functools.partial(ours, backend="triton"),
                "grasp sdpa": functools.partial(ours, backend="sdpa"),
                "grasp cudnn": functools.partial(ours, backend="cudnn"),
                "flash x gate": functools.partial(with_backend, SDPBackend.FLASH_ATTENTION),
                "cudnn x gate": functools.partial(with_backend, SDPBackend.CUDNN_ATTENTION),
                "flex x gate": _flex(length),
            }
        else:
            contenders = {"grasp sdpa": ours, "sdpa x gate": sdpa}
        q_shape = (batch, model.heads, length, model.head_size)
        kv_shape = (batch, model.kv_heads, length, model.head_size)
        inputs = (*_leaves(device, dtype, q_shape, kv_shape, kv_shape), z)
        forward = 2.0 * batch * model.heads * length**2 * model.head_size  # causal half of 4 S S D
        work = {"forward": forward, "backward": 2.5 * forward * keep}
        work["both"] = work["forward"] + work["backward"]
        label = {"model": name, "batch": batch, "length": length, "keep": keep}
        yield Setup("attention", label, contenders, inputs, work, "TFLOP/s")


def projection(models, _, keeps, device, dtype) -> Iterator[Setup]:
    def prefix(scores, costs, budget, floor, rank):
        """Sort, scan, scatter: cuts at the first unit that does not fit and leaves the rest."""
        order = torch.argsort(scores, descending=True, stable=True)
        fits = costs[order].cumsum(0) <= budget
        return torch.zeros_like(floor).scatter(0, order, fits)

    def ours(scores, costs, budget, floor, rank):
        return budget_topk(scores, costs, budget, floor=floor, tie_rank=rank).mask

    for (name, model), keep in ((m, k) for m in models.items() for k in keeps):
        channels, groups = model.layers * model.width, model.layers * model.kv_heads
        units = channels + groups
        costs = torch.full((units,), 3, device=device)
        costs[channels:] = (2 * model.heads // model.kv_heads + 2) * model.head_size
        floor = torch.zeros(units, dtype=torch.bool, device=device)
        floor[: channels : model.width] = True
        budget = (costs.sum() * keep).long()
        inputs = (
            *(torch.randn(units, device=device), costs, budget, floor),
            torch.randperm(units, device=device),
        )
        contenders = {"grasp": ours, "sort + cumsum": prefix}
        label = {"model": name, "units": units, "keep": keep}
        yield Setup("projection", label, contenders, inputs, {}, "")


def scale(models, tokens, _, device, dtype) -> Iterator[Setup]:
    def eager(x, factor):
        return (x * factor).to(x.dtype)

    def narrow(x, factor):
        return x * factor.to(x.dtype)

    contenders = {"grasp": channel_scale, "eager": eager, "eager, rounded scale": narrow}
    contenders |= _compiled(eager, device)
    for (name, model), count in product(models.items(), tokens):
        inputs = (*_leaves(device, dtype, (count, model.size)), _factor(model.size, device))
        moved = count * model.size * dtype.itemsize
        work = {"forward": 2.0 * moved, "backward": 3.0 * moved, "both": 5.0 * moved}
        label = {"model": name, "tokens": count, "keep": 1.0}
        yield Setup("scale", label, contenders, inputs, work, "GB/s")


def norm(models, tokens, _, device, dtype) -> Iterator[Setup]:
    """A norm and the scale behind it, as the projections that read it share them."""
    for (name, model), count in product(models.items(), tokens):
        weight = torch.ones(model.size, device=device, dtype=dtype)

        def ours(x, factor, weight=weight):
            return rms_norm_scale(x, weight, factor, 1e-5)

        def eager(x, factor, weight=weight):
            return (F.rms_norm(x, weight.shape, weight, 1e-5) * factor).to(x.dtype)

        contenders = {"grasp": ours, "eager": eager, **_compiled(eager, device)}
        inputs = (*_leaves(device, dtype, (count, model.size)), _factor(model.size, device))
        moved = count * model.size * dtype.itemsize
        work = {"forward": 2.0 * moved, "backward": 3.0 * moved, "both": 5.0 * moved}
        label = {"model": name, "tokens": count, "keep": 1.0}
        yield Setup("norm", label, contenders, inputs, work, "GB/s")


def cross_entropy(models, tokens, _, device, dtype) -> Iterator[Setup]:
    """A frozen head and the next-token loss."""
    for label, head, x, targets in _heads(models, tokens, device, dtype):

        def ours(x, head=head, targets=targets):
            return linear_cross_entropy(x, head, targets)

        def eager(x, head=head, targets=targets):
            return F.cross_entropy((x @ head.T).float(), targets)

        contenders = {"grasp": ours, "eager": eager, **_compiled(eager, device)}
        work = {"both": 4.0 * len(x) * head.numel()}
        yield Setup("cross_entropy", label, contenders, (x,), work, "TFLOP/s")


def distillation(models, tokens, _, device, dtype) -> Iterator[Setup]:
    """A frozen head and the KL divergence from what it makes of a teacher's hidden states."""
    for label, head, x, targets in _heads(models, tokens, device, dtype):
        teacher = torch.randn_like(x)

        def ours(x, head=head, teacher=teacher, targets=targets):
            return linear_distillation(x, head, teacher, targets, 0.0)

        def eager(x, head=head, teacher=teacher):
            own, known = ((h @ head.T).float().log_softmax(1) for h in (x, teacher))
            return F.kl_div(own, known, log_target=True, reduction="batchmean")

        contenders = {"grasp": ours, "eager": eager, **_compiled(eager, device)}
        work = {"both": 6.0 * len(x) * head.numel()}
        yield Setup("distillation", label, contenders, (x,), work, "TFLOP/s")


def _heads(models, tokens, device, dtype) -> Iterator[tuple]:
    """A label, a head [V, d], hidden states [T, d] and targets [T] for each shape."""
    for (name, model), count in product(models.items(), tokens):
        head = torch.randn(model.vocabulary, model.size, device=device) * model.size**-0.5
        (x,) = _leaves(device, dtype, (count, model.size))
        targets = torch.randint(model.vocabulary, (count,), device=device)
        yield {"model": name, "tokens": count, "keep": 1.0}, head.to(dtype), x, targets


def _factor(size: int, device: str) -> Tensor:
    return (1 + 0.3 * torch.randn(size, device=device)).requires_grad_()


SETUPS = {
    "swiglu": swiglu,
    "ffn": ffn,
    "attention": attention,
    "projection": projection,
    "scale": scale,
    "norm": norm,
    "cross_entropy": cross_entropy,
    "distillation": distillation,
}
# where an op's correctness is tested, if not under its own name
TESTS = {op: op for op in SETUPS} | {
    "ffn": "swiglu",
    "norm": "scale",
    "distillation": "cross_entropy",
}


def setups(
    op: str, small: bool, models: Sequence[str] = (), keeps: Sequence[float] = ()
) -> Iterator[Setup]:
    """All shapes of an op, or those of some models and kept shares."""
    if small:
        yield from SETUPS[op](SMALL, (256,), keeps or (1.0, 0.5), "cpu", torch.float32)
    else:
        chosen = {name: MODELS[name] for name in models or MODELS}
        sizes = (512, 2048) if op == "attention" else (512, 4096, 16384)
        yield from SETUPS[op](chosen, sizes, keeps or (1.0, 0.8, 0.5), "cuda", torch.bfloat16)


def _grid(models, sizes, keeps) -> Iterator[tuple]:
    return ((model, size, keep) for model in models.items() for size in sizes for keep in keeps)


def _leaves(device, dtype, *shapes) -> list[Tensor]:
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def _gate(size: int, keep: float, device: str) -> Tensor:
    z = torch.zeros(size, device=device)
    z[torch.randperm(size, device=device)[: round(keep * size)]] = 1
    return z.requires_grad_()


def _compiled(function, device) -> dict[str, Callable[..., Any]]:
    return {"torch.compile": torch.compile(function, dynamic=False)} if device == "cuda" else {}


def _flex(length: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length)
    flex = torch.compile(flex_attention, dynamic=False)

    def run(q, k, v, z):
        gate = z.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1])
        return flex(q, k, v, block_mask=causal, enable_gqa=True) * gate[:, None, None]

    return run


def _graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first call compiles, and autograd keeps to this stream
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()
    return graph.replay


# ---- timing ---------------------------------------------------------------------------------


def passes(setup: Setup, contender: str) -> dict[str, Callable[[], Any]]:
    """forward, backward and both, as calls without arguments; small shapes on a GPU as graphs."""
    run, inputs = setup.contenders[contender], setup.inputs
    on_gpu = inputs[0].is_cuda
    if setup.op == "projection":
        calls = {"forward": lambda: run(*inputs)}
        return calls | ({"forward, graph": _graphed(calls["forward"])} if on_gpu else {})
    functorch.donated_buffer = False  # compiled backward passes run more than once on one graph
    # Copies of its own: Liger's backward pass writes its gradients over its inputs.
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    grad = torch.randn_like(run(*inputs))

    def both():
        torch.autograd.grad(run(*inputs), inputs, grad)

    calls = {"forward": lambda: run(*inputs), "both": both}
    if setup.op in ("cross_entropy", "distillation"):  # their forward pass takes the gradient too
        calls = {"both": both}
    if on_gpu and _tokens(setup) <= GRAPH_TOKENS:
        return {f"{name}, graph": _graphed(call) for name, call in calls.items()}
    if "forward" not in calls:
        return calls
    out = run(*inputs)  # not where calls are captured: what it keeps is tied to this stream

    def backward():
        torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return {"forward": calls["forward"], "backward": backward, "both": both}


def _tokens(setup: Setup) -> int:
    return setup.label.get("tokens") or setup.label["batch"] * setup.label["length"]


def times(call: Callable[[], Any], device: str) -> list[float]:
    """Milliseconds of some calls, with a cold L2 cache on a GPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=10, rep=50, return_mode="all")
    call()
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def measure(setup: Setup, roof: dict[str, float], rounds: int = 3) -> Iterator[dict[str, Any]]:
    """A row for each pass of each contender, or for what kept it from running."""
    device = setup.inputs[0].device.type
    where = {"op": setup.op, **setup.label}
    calls = {}
    for contender in setup.contenders:
        try:
            calls[contender] = passes(setup, contender)
        except failures() as error:
            yield where | _failed(contender, error)
    for name in dict.fromkeys(chain.from_iterable(calls.values())):
        turns = {contender: c[name] for contender, c in calls.items() if name in c}
        samples: dict[str, list[float]] = {contender: [] for contender in turns}
        for _ in range(rounds):
            for contender, call in list(turns.items()):
                try:
                    samples[contender] += times(call, device)
                except failures() as error:
                    yield where | _failed(contender, error)
                    del turns[contender]
        for contender, call in turns.items():
            row = {**where, "contender": contender, "pass": name}
            row |= _figures(samples[contender], setup, name, roof)
            if device == "cuda" and not name.endswith("graph"):
                row["peak_mib"] = _peak(call)
            yield row


def _figures(
    samples: list[float], setup: Setup, name: str, roof: dict[str, float]
) -> dict[str, float]:
    median, low, high = _quantiles(samples)
    row = {"median_ms": median, "q20_ms": low, "q80_ms": high, "runs": len(samples)}
    if setup.work:
        work = setup.work[name.removesuffix(", graph")]
        achieved = work / (median * 1e-3) / _SCALE[setup.unit]
        row |= {setup.unit: achieved, "fraction": achieved / roof[setup.unit]}
    return row


def _failed(contender: str, error: Exception) -> dict[str, str]:
    """A row for what a contender ended with; raises what ends this process's use of the GPU.

    A call that cannot be captured does not.
    """
    if "CUDA error" in str(error) and "captur" not in str(error):
        raise error
    return {"contender": contender, "error": f"{type(error).__name__}: {reason(error)}"}


def failures() -> tuple[type[Exception], ...]:
    """What a contender may raise that says something about it, and nothing about this script."""
    found: list[type[Exception]] = [RuntimeError, torch._dynamo.exc.TorchDynamoException]
    if find_spec("triton"):
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        found += [CompilationError, OutOfResources]
    return tuple(found)


_SCALE = {"GB/s": 1e9, "TFLOP/s": 1e12}


def measured_roof(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth, read plus write, and the speed of a large square matmul."""
    side, numbers = (8192, 2**29) if device == "cuda" else (256, 2**20)
    source = torch.randn(numbers, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy = statistics.median(times(lambda: target.copy_(source), device))
    matmul = statistics.median(times(lambda: a @ b, device))
    moved = 2 * source.numel() * source.element_size()
    return {"GB/s": moved / copy / 1e6, "TFLOP/s": 2 * side**3 / matmul / 1e9}


def _quantiles(samples: list[float]) -> list[float]:
    return torch.quantile(
        torch.tensor(samples, dtype=torch.float64), torch.tensor(QUANTILES).double()
    ).tolist()


def _peak(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---- the run --------------------------------------------------------------------------------


def correct(op: str, small: bool) -> bool:
    """Whether the op's correctness tests pass, on the device that is about to be timed."""
    path = (
        "tests/kernels/test_reference.py"
        if small
        else f"tests/kernels/on_device/test_{TESTS[op]}.py"
    )
    select = ["-k", op] if small else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, *select]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        print(f"{op}: no figure is to be quoted, its tests fail:\n{run.stdout[-2000:]}")
    return run.returncode == 0


def show(row: dict[str, Any]) -> str:
    where = f"{row['op']:10} {_shape(row)}  {row['contender']:22}"
    if "error" in row:
        return f"{where} {row['error']}"
    speed = "".join(f"  {row[u]:8.2f} {u} ({row['fraction']:.0%})" for u in _SCALE if u in row)
    spread = f"[{row['q20_ms']:.3f}, {row['q80_ms']:.3f}]"
    return f"{where} {row['pass']:8} {row['median_ms']:9.3f} ms {spread}{speed}"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = ("forward, graph", "both", "both, graph")
    rows = [r for r in rows if r.get("pass") in whole and r["op"] in SETUPS]
    rows = [r for r in rows if r["op"] == "projection" or r["pass"] != "forward, graph"]
    ops = list(dict.fromkeys(r["op"] for r in rows))
    figure, axes = pyplot.subplots(len(ops), 1, figsize=(11, 3.2 * len(ops)), squeeze=False)
    for axis, op in zip(axes[:, 0], ops, strict=True):
        chosen = [r for r in rows if r["op"] == op]
        shapes = list(dict.fromkeys(_shape(r) for r in chosen))
        contenders = list(dict.fromkeys(r["contender"] for r in chosen))
        for i, contender in enumerate(contenders):
            found = {_shape(r): r["median_ms"] for r in chosen if r["contender"] == contender}
            at = [x + i * 0.8 / len(contenders) for x, s in enumerate(shapes) if s in found]
            axis.bar(
                at, [found[s] for s in shapes if s in found], 0.8 / len(contenders), label=contender
            )
        axis.set_xticks([x + 0.4 for x in range(len(shapes))], shapes, fontsize=6, rotation=20)
        axis.set(yscale="log", ylabel="ms", title=op)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _shape(row: dict[str, Any]) -> str:
    size = row.get("tokens") or row.get("length") or row.get("units")
    return f"{row['model']} {size} keep {row['keep']}"


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def run(options: argparse.Namespace, op: str | None) -> bool:
    """Measure the roof, and one op after its tests; whether they pass."""
    device, dtype = ("cpu", torch.float32) if options.small else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    name = "CPU" if options.small else torch.cuda.get_device_name()
    roof = measured_roof(device, dtype)
    said = {"device": name, "dtype": str(dtype).removeprefix("torch."), **versions(), **tiles()}
    if op is None:
        add(options.out, {"op": "roof", **said, **roof})
        print(f"{name}: copy {roof['GB/s']:.0f} GB/s, matmul {roof['TFLOP/s']:.2f} TFLOP/s")
        return True
    if options.tested:
        module = "test_reference" if options.small else f"on_device.test_{TESTS[op]}"
        green = passed(options.tested, module)
    else:
        green = correct(op, options.small)
    for setup in setups(op, options.small, options.models, options.keep):
        for row in measure(setup, roof, rounds=1 if options.small else 3):
            add(options.out, {**row, **said, "roof": roof, "tests": "green" if green else "red"})
            print(show(row), flush=True)
    return green


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="lines of JSON to add to; the plot goes beside it")
    parser.add_argument("--op", choices=["roof", *sorted(SETUPS)], help="default: all")
    parser.add_argument("--models", type=words, default=[], help="by default all shapes")
    parser.add_argument("--keep", type=numbers, default=[], help="by default 1,0.8,0.5")
    parser.add_argument("--tested", type=Path, help="JUnit report of tests that ran already")
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device: use --small to try the script on the CPU")
    if options.op:
        return 0 if run(options, None if options.op == "roof" else options.op) else 1
    codes = [
        subprocess.call([sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:], "--op", op])
        for op in SETUPS
    ]
    if options.out:
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
        plot(rows, options.out.with_suffix(".png"), rows[-1]["device"])
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
