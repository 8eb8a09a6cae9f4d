"""Launch configurations, read from files, and the function that launches every kernel.

`configs/all.json` applies to every chip. The newest `sm_*.json` that is not newer than the device
adds the tiles of a chip. A file with measurements from a device of the same name overrides them
(an H100 and an H200 share a chip but differ in speed). `python -m benchmarks.tune` writes such
files.
"""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

CONFIGS = Path(__file__).parent / "configs"
_INTERPRETED = 90  # Triton's interpreter uses the tiles of this chip


class Config(NamedTuple):
    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1


# A kernel, or (kernel, bits of the dtype, largest size of a head or a row). In a file: "kernel" or
# "kernel 16 128".
Key = str | tuple[str, int, int]
Table = dict[Key, Config]


def config(key: Key, device: torch.device) -> Config:
    return table(device)[key]


@cache
def table(device: torch.device) -> Table:
    """Return all configurations of a device; a CPU gets those of the interpreter's chip."""
    if device.type != "cuda":
        return of_chip(_INTERPRETED)
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"{name} has compute capability {major}.{minor}, expected 8.0 or newer: "
            "move the tensors to the CPU for the reference path"
        )
    if measured(name).exists():
        return {**of_chip(10 * major + minor), **read(measured(name))}
    logging.getLogger(__name__).debug(
        "nothing was measured on %s: kernels take the launch configurations of sm_%d, until "
        "`python -m benchmarks.tune` finds better ones",
        *(name, _nearest(10 * major + minor)),
    )
    return of_chip(10 * major + minor)


def of_chip(chip: int) -> Table:
    """Return the configurations for a compute capability times ten, at least 80."""
    return {**read(CONFIGS / "all.json"), **read(CONFIGS / f"sm_{_nearest(chip)}.json")}


def _nearest(chip: int) -> int:
    return max(known for known in chips() if known <= chip)


def chips() -> list[int]:
    return sorted(int(file.stem.removeprefix("sm_")) for file in CONFIGS.glob("sm_*.json"))


def measured(device_name: str) -> Path:
    """Return the file of a GPU's own configurations, which need not exist."""
    return CONFIGS / f"{slug(device_name)}.json"


def slug(device_name: str) -> str:
    """Return a device's name in the form used in file names."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def read(file: Path) -> Table:
    found: Table = {}
    for spelled, values in json.loads(file.read_text()).items():
        name, *numbers = spelled.split()
        key = (name, *map(int, numbers)) if numbers else name
        found[key] = Config(
            {k: v for k, v in values.items() if k.isupper()},
            values["num_warps"],
            values["num_stages"],
        )
    return found


def write(found: Table, file: Path) -> None:
    lines = []
    for key, (blocks, warps, stages) in found.items():
        spelled = key if isinstance(key, str) else " ".join(map(str, key))
        values = {**blocks, "num_warps": warps, "num_stages": stages}
        lines.append(f"  {json.dumps(spelled)}: {json.dumps(values)}")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def launch(kernel, grid: tuple[int, ...], config: Config, *args, **constants) -> None:
    """Run kernel[grid](*args, constants, blocks); do nothing if the grid is empty."""
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, **config.blocks, **options)
