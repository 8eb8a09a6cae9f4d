"""Ranks: the processes that torchrun starts for one run, and what they say to each other.

Without torchrun there is one rank, and each function here returns at once what it was given. What
several ranks compute is added up in the order of the items, whichever rank computed which, so the
number of ranks changes no bit. The first rank alone writes files, logs and shows progress.

The process group is PyTorch's: gloo between CPUs, NCCL between GPUs. Torch is imported inside
functions, because this module is loaded before the first checks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from grasp.errors import GraspError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # while the first rank writes, say; torchrun ends the ranks it loses
BACKENDS = ("gloo", "Gloo", "NCCL")
ROLL_CALL = 3.0  # seconds; torchrun gives a rank 30 after SIGTERM


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def join() -> None:
    """Form the process group, if torchrun has started this process, and choose the rank's GPU."""
    if not launched():
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    gpus, own = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if own < gpus:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)


def local_rank() -> int:
    """The number of this rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if ranks() > 1 else 0


def local_ranks() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks() > 1 else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return _group().get_rank() if _group() else 0


def ranks() -> int:
    """The number of ranks."""
    return _group().get_world_size() if _group() else 1


def is_first() -> bool:
    """Whether this rank writes files, logs and shows progress."""
    return rank() == 0


def _group() -> Any:
    """torch.distributed, if a process group has been formed."""
    dist: Any = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def in_order(compute: Callable[[Any], Tensor], items: Sequence[Any] | Tensor) -> Iterator[Tensor]:
    """Yield compute(item) for each item in order, on every rank; ranks compute in turns.

    Results have one shape and dtype. A rank without an item of its own computes the last one
    again, since all ranks must take part if layers are sharded.
    """
    of = ranks()
    if of == 1:
        yield from map(compute, items)
        return
    import torch

    for first in range(0, len(items), of):
        mine = compute(items[min(first + rank(), len(items) - 1)])
        found = [torch.empty_like(mine) for _ in range(of)]
        _group().all_gather(found, mine.detach().contiguous())
        yield from found[: len(items) - first]


def share(items: Tensor) -> tuple[Tensor, int]:
    """Every N-th of `items`, for this rank to work on, and how many of them count in a sum.

    All ranks get equally many, since all must take part if layers are sharded: where the items do
    not suffice, a rank gets the last one once more, which does not count.
    """
    last, each = len(items) - 1, -(-len(items) // ranks())
    own = [rank() + turn * ranks() for turn in range(each)]
    return items[[min(index, last) for index in own]], sum(index <= last for index in own)


def summed(value: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place; the same bits on each of them."""
    if ranks() > 1:
        _group().all_reduce(value)
    return value


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` returns on the first rank, which alone calls it, once all have come here."""
    if ranks() == 1:
        return compute()
    everywhere(None)  # what the others still read may be moved by `compute`
    box = [compute() if is_first() else None]
    _group().broadcast_object_list(box, src=0)
    value: Any = box[0]
    return value


def after_first() -> None:
    """Wait until the first rank has come here too."""
    from_first(lambda: None)


def tensor_from_first(value: Tensor) -> Tensor:
    """Replace a tensor by the first rank's, in place; shape and dtype are the same on all."""
    if ranks() > 1:
        _group().broadcast(value, src=0)
    return value


def everywhere(value: T) -> list[T]:
    """The values of all ranks, by rank."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    _group().all_gather_object(values, value)
    return values


def check_same(what: str, value: Any) -> None:
    """Raise GraspError, on every rank, if the ranks do not hold the same `value`."""
    values = everywhere(value)
    if other := next((i for i, v in enumerate(values) if v != values[0]), 0):
        raise GraspError(
            f"ranks 0 and {other} differ in {what} ({values[0]!r}, {values[other]!r}): give all "
            "ranks the same files, software and kind of processor"
        )


def leave() -> None:
    """Dissolve the process group, once the work is done."""
    if _group():
        _group().destroy_process_group()


def is_cut_off(error: Exception) -> bool:
    """Whether an error says that another rank has gone, in the words of the collectives."""
    dist = _group()
    if dist is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in BACKENDS)


def first_to_fail() -> bool:
    """Whether no other rank has failed before: it alone reports."""
    return once("failed")


def once(what: str) -> bool:
    """Whether this rank is the first to call this for `what`."""
    return _group() is None or bool(_store().add(what, 1) == 1)


def missing() -> list[int] | None:
    """Ranks that do not answer, within seconds, the roll call of those that were stopped.

    Each rank that was stopped calls this once. None if a rank has failed, which has told why.
    """
    if _group() is None:
        return []
    store = _store()
    store.set(f"here/{rank()}", "")
    absent, until = [*range(ranks())], time.monotonic() + ROLL_CALL
    while absent and time.monotonic() < until and not store.check(["failed"]):
        absent = [other for other in absent if not store.check([f"here/{other}"])]
        time.sleep(0.05)
    return None if store.check(["failed"]) else absent


def _store() -> Any:
    """The key-value store of the process group, which torchrun keeps."""
    return _group().distributed_c10d._get_default_store()
