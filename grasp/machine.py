"""The machine's limits, as a user meets them: memory and disks that are full, in one line.

Torch is imported where it is needed: this is loaded before the first checks.
"""

from __future__ import annotations

import errno
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from grasp.errors import GraspError, reason


def peak_memory() -> int:
    """Bytes at the worst moment so far: of the fullest GPU in use, if any, else of the process."""
    import torch

    if torch.cuda.is_initialized():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew, on a GPU and on Linux; elsewhere it is the process's so far."""
    import torch

    if torch.cuda.is_initialized():
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        fix = "free some space" if full else "check the path and its permissions"
        raise GraspError(
            f"cannot write {path}: {reason}; {fix} and run the command again"
        ) from None


def check_room(path: Path, what: str, needed: int, fix: str = "choose another `out`") -> None:
    """Refuse to begin on `path`, as `what` of `needed` bytes, where the disk cannot hold it."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise GraspError(
            f"{path.parent} has {free:,} bytes free and the {what} {needed:,}: free some space or "
            f"{fix}"
        )


@contextmanager
def memory_errors(device: str, fix: str) -> Iterator[None]:
    """Turn a full memory into one line, in the words of the GPU's or the CPU's allocator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch

        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in reason(error):
            raise
        raise GraspError(f"out of memory on {device} ({reason(error)}): {fix}") from None
