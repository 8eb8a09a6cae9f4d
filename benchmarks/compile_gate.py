"""Compile every kernel that ships for sm_80 and sm_90, without a GPU, and print what it takes.

    python -m benchmarks.compile_gate [--out benchmarks/results/compile.md] [--only NAME]

Exits with 1 if a kernel spills registers to the stack or asks for more shared memory than the chip
has; the compiler refuses neither. The kernels are compiled as they run: the ops' own launchers are
called on meta tensors at real shapes, and each launch is compiled with its argument types, the
divisibility of its arguments and its configuration.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from grasp_kernels._triton import (
    attention,
    cross_entropy,
    launch,
    projection,
    sdpa,
    swiglu,
)

# Bytes a block may use; for sm_80 those of sm_86, sm_89 and sm_120, which take its tiles too.
SHARED_LIMIT = {80: 101_376, 90: 232_448}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Kernel(NamedTuple):
    """One launch, as far as the compiler can tell launches apart."""

    case: str
    function: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # positions of arguments divisible by 16
    options: tuple[tuple[str, int], ...]


class Usage(NamedTuple):
    kernel: Kernel
    chip: int
    registers: int
    stack: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.stack == 0 and self.shared <= SHARED_LIMIT[self.chip]


def cases() -> Iterator[tuple[str, Any]]:
    """Name and call of everything that launches a kernel configuration of its own."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        shapes = [(4096, 11008)] + [(511, 1531)] * (dtype == torch.bfloat16)
        for tokens, width in shapes:
            name = f"{_TYPES[dtype]} {tokens}x{width}"
            yield f"swiglu {name}", lambda d=dtype, t=tokens, f=width: _swiglu(d, t, f)
    for dtype in (torch.bfloat16, torch.float32):
        for size in (64, 96, 128):
            # Of odd lengths less is known to divide by 16: they compile to kernels of their own.
            for causal, masked, length in ((1, 0, 2048), (1, 1, 2047), (0, 1, 2047)):
                name = f"{_TYPES[dtype]} D={size} {length}" + " causal" * causal
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
        name = f"{_TYPES[dtype]} {vocabulary}"
        yield f"cross-entropy {name}", lambda d=dtype, v=vocabulary: _cross_entropy(d, v)
    for dtype, costs in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        name = f"{_TYPES[dtype]}, costs {_TYPES[costs]}"
        yield f"projection {name}", lambda d=dtype, c=costs: _projection(d, c)


def record(chip: int, only: str = "") -> list[Kernel]:
    """The distinct kernels that the cases launch on a chip."""
    found: dict[tuple, Kernel] = {}
    case = ""

    def run(function, *args, grid, warmup, **kwargs):
        kernel = _describe(case, function, args, kwargs)
        found.setdefault(kernel[1:], kernel)

    with _replaced(JITFunction, "run", run), _replaced(launch, "_chip", lambda device: chip):
        for case, call in cases():
            if only in case:
                call()
    return list(found.values())


def compile_kernel(kernel: Kernel, chip: int) -> Usage:
    source = ASTSource(
        kernel.function,
        dict(kernel.signature),
        {(kernel.function.arg_names.index(n),): v for n, v in kernel.constants},
        {(i,): [["tt.divisibility", 16]] for i in kernel.aligned},
    )
    binary = triton.compile(
        source, target=GPUTarget("cuda", chip, 32), options=dict(kernel.options)
    )
    registers, stack = _resources(binary.asm["cubin"])
    return Usage(kernel, chip, registers, stack, binary.metadata.shared)


def table(usages: list[Usage]) -> str:
    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__.split('+')[0]}. Shared memory in "
        f"bytes; limits {SHARED_LIMIT[80]:,} (sm_80) and {SHARED_LIMIT[90]:,} (sm_90).",
        "",
        "| chip | case | kernel | blocks | warps | stages | registers | stack | shared | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, chip, registers, stack, shared in usages:
        sizes = " ".join(
            f"{name}={value}" for name, value in kernel.constants if re.match("BLOCK|ROWS", name)
        )
        options = dict(kernel.options)
        fits = "yes" if Usage(kernel, chip, registers, stack, shared).fits else "**no**"
        lines.append(
            f"| sm_{chip} | {kernel.case} | {kernel.function.__name__} | {sizes} "
            f"| {options['num_warps']} | {options['num_stages']} "
            f"| {registers} | {stack} | {shared:,} | {fits} |"
        )
    return "\n".join(lines) + "\n"


def _swiglu(dtype: torch.dtype, tokens: int, width: int) -> None:
    a, u, g = (_meta(tokens, width, dtype=dtype) for _ in range(3))
    z, order = _meta(width), _meta(width, dtype=torch.int64)
    swiglu.gated_swiglu(a, u, z)
    swiglu.swiglu_backward(g, a, u, z)
    _, gate_pre, up, dropped = swiglu.swiglu_pack(a, u, z, order, width // 2)
    swiglu.swiglu_pack_backward(g, gate_pre, up, dropped, z, order)


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


def _projection(dtype: torch.dtype, costs: torch.dtype) -> None:
    units = 353_280  # Llama-2-7B
    integers = _meta(units, dtype=costs)
    budget, floor = _meta(dtype=torch.int64), _meta(units, dtype=torch.bool)
    rank = _meta(units, dtype=torch.int64)
    projection.budget_topk(_meta(units, dtype=dtype), integers, budget, floor, rank)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _describe(case: str, function: Any, args: tuple, kwargs: dict[str, Any]) -> Kernel:
    """The argument types, constants and alignment that Triton's launcher would derive."""
    names = function.arg_names
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    signature, constants, aligned = [], [], []
    for position, (name, parameter) in enumerate(zip(names, function.params, strict=True)):
        value, specialized = values[name], not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature.append((name, "*" + _TYPES[value.dtype]))
            aligned.append(position)
        elif parameter.is_constexpr or (specialized and isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            if specialized and value % 16 == 0:
                aligned.append(position)
    options = tuple((name, value) for name, value in kwargs.items() if name not in names)
    return Kernel(case, function, tuple(signature), tuple(constants), tuple(aligned), options)


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
    usages = [
        compile_kernel(kernel, chip)
        for chip in ([options.chip] if options.chip else sorted(SHARED_LIMIT))
        for kernel in record(chip, options.only)
    ]
    text = table(usages)
    print(text)
    if options.out:
        options.out.write_text(text)
    bad = sum(not usage.fits for usage in usages)
    print(f"{len(usages)} kernels, {bad} spill or exceed shared memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
