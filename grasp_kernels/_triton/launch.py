"""Launch configurations, as data per chip, and the one place where kernels are launched."""

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1


# A kernel, or (kernel, bits of the dtype, head size up to).
Key = str | tuple[str, int, int]

# Element-wise tiles keep 16-byte accesses; BLOCK_F columns share one load of the gate.
_SHARED: dict[Key, Config] = {
    "swiglu": Config({"BLOCK_T": 8, "BLOCK_F": 512}, num_warps=8),
    "swiglu_backward": Config({"BLOCK_T": 16, "BLOCK_F": 128, "ROWS": 128}, num_warps=4),
    "swiglu_pack": Config({"BLOCK_T": 8, "BLOCK_F": 256}, num_warps=8),
    "swiglu_pack_backward": Config({"BLOCK_T": 8, "BLOCK_F": 128, "ROWS": 128}, num_warps=4),
    "attention_delta": Config({"BLOCK_M": 64}, num_warps=4),
    "sdpa": Config({"BLOCK_M": 32}, num_warps=4),
    "cross_entropy": Config({"BLOCK_V": 4096}, num_warps=8),
    "projection": Config({"BLOCK": 2048}, num_warps=8),
    "projection_write": Config({"BLOCKS": 256}, num_warps=8),
}

# By compute capability; a chip takes the newest entry that is not newer than itself. The attention
# tiles compile without spills (benchmarks/compile_gate); no GPU has timed them yet.
CONFIGS: dict[int, dict[Key, Config]] = {
    80: {
        **_SHARED,
        ("attention_forward", 16, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
        ("attention_forward", 16, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3),
        ("attention_forward", 32, 64): Config({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 1),
        ("attention_forward", 32, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16}, 4, 1),
        ("attention_backward_kv", 16, 64): Config({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 1),
        ("attention_backward_kv", 16, 128): Config({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2),
        ("attention_backward_kv", 32, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1),
        ("attention_backward_kv", 32, 128): Config({"BLOCK_M": 16, "BLOCK_N": 32}, 8, 1),
        ("attention_backward_q", 16, 64): Config({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 2),
        ("attention_backward_q", 16, 128): Config({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 2),
        ("attention_backward_q", 32, 64): Config({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1),
        ("attention_backward_q", 32, 128): Config({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1),
    },
    90: {
        **_SHARED,
        ("attention_forward", 16, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
        ("attention_forward", 16, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
        ("attention_forward", 32, 64): Config({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 1),
        ("attention_forward", 32, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16}, 8, 1),
        ("attention_backward_kv", 16, 64): Config({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2),
        ("attention_backward_kv", 16, 128): Config({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 1),
        ("attention_backward_kv", 32, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1),
        ("attention_backward_kv", 32, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16}, 8, 1),
        ("attention_backward_q", 16, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
        ("attention_backward_q", 16, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
        ("attention_backward_q", 32, 64): Config({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1),
        ("attention_backward_q", 32, 128): Config({"BLOCK_M": 32, "BLOCK_N": 16}, 8, 1),
    },
}
CONFIGS[120] = CONFIGS[80]  # 12.0 has the 99 KiB of shared memory of 8.6 and 8.9, not those of 9.0


def config(key: Key, device: torch.device) -> Config:
    return CONFIGS[_chip(device)][key]


@cache
def _chip(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter, and the compile gate
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    known = [chip for chip in CONFIGS if chip <= 10 * major + minor]
    if not known:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, "
            "expected 8.0 or newer: move the tensors to the CPU for the reference path"
        )
    return max(known)


def launch(kernel, grid: tuple[int, ...], config: Config, *args, **constants) -> None:
    """kernel[grid](*args, constants, blocks); nothing where the grid is empty."""
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, **config.blocks, **options)
