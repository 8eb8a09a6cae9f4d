"""The limits of the machine, reported in one line: full memory and full disks.

Torch is imported inside functions, because this module is loaded before the first checks.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from grasp.errors import GraspError, reason


def peak_memory() -> int:
    """Peak memory so far in bytes: of the fullest GPU in use, if any, else of the process."""
    import torch

    if torch.cuda.is_initialized():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Reset `peak_memory`, on a GPU and on Linux; elsewhere it keeps the process's peak."""
    import torch

    if torch.cuda.is_initialized():
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_memory(gpu: str) -> int:
    """Bytes of a GPU that this process may allocate: what is free, and what PyTorch has cached."""
    import torch

    cached = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + cached


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or unwritable disk into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error)
        why = "the disk is full" if full else str(error)
        fix = "free some space" if full else "check the path and its permissions"
        raise GraspError(f"cannot write {path}: {why}; {fix} and run the command again") from None


@contextmanager
def new_beside(path: Path) -> Iterator[Path]:
    """A new path to write to, in the folder of `path`, which it becomes at the end of the context.

    After an error nothing is left.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        yield beside
        os.rename(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        beside.unlink(missing_ok=True)


def readable(folder: Path) -> None:
    """Let all who read the config in `folder` read its weights, which some releases prevent."""
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def check_room(path: Path, what: str, needed: int, fix: str = "choose another `out`") -> None:
    """Raise GraspError if the disk of `path` has no room for `what`, of `needed` bytes."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise GraspError(
            f"{path.parent} has {free:,} bytes free and the {what} {needed:,}: free some space or "
            f"{fix}"
        )


@contextmanager
def memory_errors(device: str, fix: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line, with the words of the allocator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch

        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in reason(error):
            raise
        raise GraspError(f"out of memory on {device} ({reason(error)}): {fix}") from None
