"""Compile every shipped kernel for each chip, without a GPU, and print the resources it needs.

    python -m benchmarks.compile_gate [--out benchmarks/results/compile.md] [--only NAME]

Exits with 1 if a kernel needs more shared memory than the chip has (the compiler does not refuse
this) or keeps much on the stack; a few bytes there may still be fastest. The kernels are compiled
as they run: the ops' own launchers are called on meta tensors at real shapes, through Triton's own
launcher, which is only told that a GPU of that chip is present.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from grasp_kernels._triton import (
    attention,
    cross_entropy,
    launch,
    projection,
    scale,
    sdpa,
    swiglu,
)

# Bytes that a block may use.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
STACK_LIMIT = 256  # bytes a thread


_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Usage(NamedTuple):
    chip: int
    case: str
    kernel: str
    config: launch.Config
    registers: int
    stack: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.stack <= STACK_LIMIT and self.shared <= SHARED_LIMIT[self.chip]


def cases() -> Iterator[tuple[str, Any]]:
    """Name and call of everything that launches a kernel configuration of its own."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        shapes = [(4096, 11008)] + [(511, 1531)] * (dtype == torch.bfloat16)
        for tokens, width in shapes:
            name = f"{_NAMES[dtype]} {tokens}x{width}"
            yield f"swiglu {name}", lambda d=dtype, t=tokens, f=width: _swiglu(d, t, f)
        for tokens, width in ((4096, 4096), (511, 8192)) + ((511, 577),) * (
            dtype == torch.bfloat16
        ):
            name = f"{_NAMES[dtype]} {tokens}x{width}"
            yield f"scale {name}", lambda d=dtype, t=tokens, c=width: _scale(d, t, c)
    for dtype in (torch.bfloat16, torch.float32):
        for size in (64, 96, 128):
            # Of odd lengths less is known to divide by 16: they compile to kernels of their own.
            for causal, masked, length in ((1, 0, 2048), (1, 1, 2047), (0, 1, 2047)):
                name = f"{_NAMES[dtype]} D={size} {length}" + " causal" * causal
                yield (
                    f"attention {name}{' key mask' * masked}",
                    lambda d=dtype, s=size, c=causal, m=masked, n=length: _attention(
                        d, s, bool(c), bool(m), n
                    ),
                )
    yield "attention fp16 D=128 2048 causal", lambda: _attention(torch.float16, 128, True, False)
    for size, length in ((64, 2048), (96, 2047), (128, 2048), (256, 2048)):
        yield f"sdpa bf16 D={size} {length}", lambda d=size, s=length: _sdpa(d, s)
    for dtype, vocabulary in (
        (torch.bfloat16, 32_000),
        (torch.bfloat16, 50_257),
        (torch.float32, 32_000),
    ):
        name = f"{_NAMES[dtype]} {vocabulary}"
        yield f"cross-entropy {name}", lambda d=dtype, v=vocabulary: _cross_entropy(d, v)
        yield f"distillation {name}", lambda d=dtype, v=vocabulary: _distillation(d, v)
    for dtype, costs in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        name = f"{_NAMES[dtype]}, costs {_NAMES[costs]}"
        yield f"projection {name}", lambda d=dtype, c=costs: _projection(d, c)


def compiled(chip: int, only: str = "") -> list[Usage]:
    """The distinct kernels that the cases launch on a chip."""
    found: dict[str, Usage] = {}
    for case, call in cases():
        if only in case:
            for digest, usage in compiling(chip, launch.of_chip(chip), call, case).items():
                found.setdefault(digest, usage)
    return list(found.values())


def compiling(
    chip: int, table: launch.Table, call: Callable[[], Any], case: str = ""
) -> dict[str, Usage]:
    """What is launched by a call on meta tensors, with these configurations, by Triton's hash.

    No kernel runs in this process from then on.
    """
    found: dict[str, Usage] = {}
    run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        binary = run(function, *args, grid=grid, warmup=True, **kwargs)
        blocks = {k: v for k, v in kwargs.items() if re.match("BLOCK|ROWS", k)}
        config = launch.Config(blocks, kwargs["num_warps"], kwargs["num_stages"])
        used = (*_resources(binary.asm["cubin"]), binary.metadata.shared)
        found[binary.hash] = Usage(chip, case, function.__name__, config, *used)

    driver.set_active(_Driver(chip))
    with (
        _replaced(JITFunction, "run", compile_only),
        _replaced(launch, "table", lambda device: table),
    ):
        call()
    return found


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, chip: int):
        self._chip = chip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._chip, 32)

    def get_current_device(self) -> int:
        return self._chip  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def table(usages: list[Usage]) -> str:
    limits = ", ".join(f"{bytes:,} (sm_{chip})" for chip, bytes in SHARED_LIMIT.items())
    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__.split('+')[0]}. Shared memory in "
        f"bytes; limits {limits}.",
        "",
        "| chip | case | kernel | blocks | warps | stages | registers | stack | shared | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for usage in usages:
        blocks, warps, stages = usage.config
        sizes = " ".join(f"{name}={value}" for name, value in blocks.items())
        lines.append(
            f"| sm_{usage.chip} | {usage.case} | {usage.kernel} | {sizes} | {warps} | {stages} "
            f"| {usage.registers} | {usage.stack} | {usage.shared:,} "
            f"| {'yes' if usage.fits else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def _swiglu(dtype: torch.dtype, tokens: int, width: int) -> None:
    a, u, g = (_meta(tokens, width, dtype=dtype) for _ in range(3))
    z, order = _meta(width), _meta(width, dtype=torch.int64)
    swiglu.gated_swiglu(a, u, z)
    swiglu.swiglu_backward(g, a, u, z)
    _, gate_pre, up, dropped = swiglu.swiglu_pack(a, u, z, order, width // 2)
    swiglu.swiglu_pack_backward(g, gate_pre, up, dropped, z, order)


def _scale(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, grad = (_meta(tokens, width, dtype=dtype) for _ in range(2))
    weight, factor = _meta(width, dtype=dtype), _meta(width)
    scale.channel_scale(x, factor)
    scale.channel_scale_backward(grad, x, factor)
    _, inverse = scale.rms_norm_scale_forward(x, weight, factor, 1e-5)
    scale.rms_norm_scale_backward(grad, x, inverse, weight, factor)


def _attention(
    dtype: torch.dtype, size: int, causal: bool, masked: bool, length: int = 2048
) -> None:
    batch, heads, kv_heads = 4, 32, 8
    q, grad = (_meta(batch, length, heads, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (_meta(batch, length, kv_heads, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    z = _meta(kv_heads)
    mask = _meta(batch, length, dtype=torch.bool) if masked else None
    _, raw, lse = attention.forward(q, k, v, z, causal, size**-0.5, mask)
    attention.backward(grad, q, k, v, z, raw, lse, causal, size**-0.5, mask)


def _sdpa(size: int, length: int) -> None:
    batch, heads, kv_heads = 4, 32, 8
    q, k = (
        _meta(batch, length, n, size, dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, kv_heads)
    )
    z, lse = _meta(kv_heads), _meta(batch, heads, length)
    sdpa.gate_heads(q, z)
    for kept in (kv_heads // 2, kv_heads):
        _, dq, dk, dv, *_ = sdpa.pack_heads(q, q, k, k, z, q, lse, kept)
        sdpa.unpack_heads(dq, dk, dv, z, heads)


def _cross_entropy(dtype: torch.dtype, vocabulary: int) -> None:
    for gradient in (True, False):
        logits, targets = _meta(1024, vocabulary, dtype=dtype), _meta(1024, dtype=torch.int64)
        cross_entropy.softmax_loss(logits, targets, gradient)


def _distillation(dtype: torch.dtype, vocabulary: int) -> None:
    for gradient in (True, False):
        logits, taught = (_meta(512, vocabulary, dtype=dtype) for _ in range(2))
        targets = _meta(512, dtype=torch.int64)
        cross_entropy.distillation_loss(logits, taught, targets, 0.25, gradient)


def _projection(dtype: torch.dtype, costs: torch.dtype) -> None:
    units = 353_280  # Llama-2-7B
    integers = _meta(units, dtype=costs)
    budget, floor = _meta(dtype=torch.int64), _meta(units, dtype=torch.bool)
    rank = _meta(units, dtype=torch.int64)
    projection.budget_topk(_meta(units, dtype=dtype), integers, budget, floor, rank)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, read with the cuobjdump of the Triton wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage, but:\n{text}")
    return int(found[1]), int(found[2])


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--chip", type=int, choices=sorted(SHARED_LIMIT), help="one chip only")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    chips = [options.chip] if options.chip else sorted(SHARED_LIMIT)
    usages = [usage for chip in chips for usage in compiled(chip, options.only)]
    text = table(usages)
    print(text)
    if options.out:
        options.out.write_text(text)
    bad = sum(not usage.fits for usage in usages)
    spilled = sum(usage.stack > 0 for usage in usages)
    print(f"{len(usages)} kernels, {spilled} spill, {bad} do not fit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
