"""Plan a run over several GPUs: what each rank holds, and what the ranks send each other.

The frozen weights lie on each rank, or in parts over those of a machine or over all, as
`grasp.model.sharding` lays them. Bytes are estimates, like those of a plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from grasp.config import PlannedMemory, PruneConfig, window
from grasp.errors import GraspError
from grasp.model.header import Header
from grasp.model.load import ShardMode
from grasp.model.units import SHARED
from grasp.planning.check import check_shard
from grasp.planning.memory import (
    MODES,
    USABLE,
    Memory,
    choosing_memory,
    compensation_memory,
    evaluation_memory,
    learning_memory,
)

GATHERED = 2  # layers that are whole at once: the one that runs, and the one that arrives
GATHERS = 2  # of a layer in a step: for the forward and for the backward pass
ENDS = 2  # the embedding and the head, which may be one weight: each is gathered once in a step
MOST_GPUS = 4096


@dataclass(frozen=True)
class Gpus:
    """`each` GPUs of `memory` bytes on every one of `nodes` machines. Raises GraspError."""

    each: int
    nodes: int
    memory: int

    def __post_init__(self) -> None:
        for name, value in (("gpus", self.each), ("nodes", self.nodes)):
            if value < 1:
                raise GraspError(f"`{name}` must be at least 1, got {value}")
        if self.memory <= 0:
            raise GraspError(f"`gpu_memory` must be above 0 GB, got {self.memory / 1e9:g}")

    @property
    def all(self) -> int:
        return self.each * self.nodes


@dataclass(frozen=True)
class Way:
    """A way to lay the weights over ranks: peak bytes of a rank, and bytes sent in a step.

    `learning` is by part, with the fastest memory mode that fits; its weights are the rank's rows
    of the matrices and all that is not split. `gathered` is what is whole at once while it runs:
    two layers, or the embedding, or the head. `received` is what a rank gets from others in a step,
    `network` the part of it that comes from other machines, over rings of ranks.
    """

    shard: ShardMode
    memory: PlannedMemory
    learning: Memory
    gathered: int
    choosing: int | None
    compensation: int | None
    evaluation: int
    received: int
    network: int
    fits: bool

    @property
    def peak(self) -> int:
        learning = self.learning.total + self.gathered
        return max(learning, self.choosing or 0, self.compensation or 0, self.evaluation)

    def __str__(self) -> str:
        own = self.learning
        parts = {"weights": own.weights, "gathered": self.gathered}
        parts |= {"activations": own.activations, "workspace": own.workspace, "gates": own.gates}
        said = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items() if size)
        stages = {"choosing": self.choosing, "learning": own.total + self.gathered}
        stages |= {"compensation": self.compensation, "evaluation": self.evaluation}
        peaks = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in stages.items() if size)
        network = f", {self.network / 1e9:,.2f} over the network" if self.network else ""
        return (
            f"{'fits' if self.fits else 'too much'}: {self.peak / 1e9:,.1f} GB a rank ({peaks}); "
            f"learning is {said} in `memory={self.memory!r}`; a step receives "
            f"{self.received / 1e9:,.2f} GB{network}"
        )


@dataclass(frozen=True)
class Spread:
    """A run over GPUs: every way to lay the weights, and the command of the best one that fits.

    `refused` says why only whole weights are possible. Without a way that fits, `command` is None,
    and `needed` the GPUs with which `shard="full"` would, as powers of two times those given.
    """

    gpus: Gpus
    ways: tuple[Way, ...]
    refused: str | None
    command: str | None
    needed: int | None

    def lines(self) -> list[tuple[str, str]]:
        """The name and the text of each fact, for people."""
        gpus, usable = self.gpus, USABLE * self.gpus.memory / 1e9
        count = f"{gpus.nodes} times " * (gpus.nodes > 1) + str(gpus.each)
        facts = [("GPUs", f"{count} of {gpus.memory / 1e9:g} GB, {usable:g} of them for a rank")]
        facts += [(f"shard {way.shard}", str(way)) for way in self.ways]
        facts += [("shard", f"none only: {self.refused}")] if self.refused else []
        more = f"{self.needed} such GPUs would do" if self.needed else "more GPUs do not help"
        if self.command is None:
            return [*facts, ("command", f"none fits: {more}")]
        return [*facts, ("command", self.command), ("", "and the other options of this plan")]


def spread(header: Header, config: PruneConfig, width: int, gpus: Gpus) -> Spread:
    """Plan a run on `gpus`, in a dtype of `width` bytes."""
    refused = None
    try:
        check_shard(replace(config, shard="full"), header)
    except GraspError as error:
        refused = str(error)
    shards: list[ShardMode] = ["none"]
    if refused is None and gpus.all > 1:
        shards += ["node", "full"] if gpus.nodes > 1 else ["full"]
    ways = tuple(_way(shard, header, config, width, gpus) for shard in shards)
    best = next((way for way in ways if way.fits), None)
    needed = None
    if best is None and refused is None:
        needed = _needed(header, config, width, gpus)
    command = _command(best, config, gpus) if best else None
    return Spread(gpus, ways, refused, command, needed)


def over_layers(
    header: Header,
    config: PruneConfig,
    width: int,
    gpus: Sequence[str],
    free: Callable[[str], int],
) -> tuple[tuple[str, ...], str] | None:
    """Where a model lies that the first of `gpus` cannot hold, in one process, and a note on it.

    The first GPU gets all but the decoder layers, and each GPU as many adjacent layers as its
    `free` bytes allow in proportion: `grasp.model.places`. None if the model fits on the first.
    Raises GraspError if its weights do not fit on all together.
    """
    alone = _way("none", header, config, width, Gpus(1, 1, free(gpus[0])))
    tied = any(SHARED in why for why in header.whole)  # a layer reads tensors of another
    if alone.fits or len(gpus) == 1 or tied:
        return None
    room = [free(gpu) for gpu in gpus]
    weights = header.stored_bytes * header.space.total_params
    if weights > USABLE * sum(room):
        raise GraspError(
            f"the weights of {config.model} are {weights / 1e9:,.1f} GB, and {len(gpus)} GPUs have "
            f"{sum(room) / 1e9:,.1f} GB free: use more of them"
        )
    total, layers = header.space.total_params, len(header.space.layers)
    ends, each = _ends(header), (total - _ends(header)) / layers
    upto = [part * total / sum(room) for part in accumulate(room)]
    own = [gpus[bisect_left(upto, ends + (n + 0.5) * each)] for n in range(layers)]
    note = (
        f"the model is too large for {gpus[0]} (it takes {alone.peak / 1e9:,.1f} GB, "
        f"{room[0] / 1e9:,.1f} are free): its layers lie on {len({*own})} GPUs, which work in turns"
    )
    faster = spread(header, config, width, Gpus(len(gpus), 1, min(room))).command
    return (gpus[0], *own), note + (
        f"; faster, all at once, with your other options: {faster}" if faster else ""
    )


def _ends(header: Header) -> int:
    """Parameters of the embedding and of a head of its own."""
    table = header.vocab_size * header.space.hidden_size
    return table * min(ENDS, header.space.fixed_params // table)


def _way(shard: ShardMode, header: Header, config: PruneConfig, width: int, gpus: Gpus) -> Way:
    """The way with the fastest memory mode that fits, or else with the least memory."""
    tried = [_in_mode(mode, shard, header, config, width, gpus) for mode in MODES]
    return next((way for way in tried if way.fits), tried[-1])


def _in_mode(
    mode: PlannedMemory,
    shard: ShardMode,
    header: Header,
    config: PruneConfig,
    width: int,
    gpus: Gpus,
) -> Way:
    space, of = header.space, {"none": 1, "node": gpus.each, "full": gpus.all}[shard]
    table, layers = header.vocab_size * space.hidden_size, space.prunable_params
    split = layers + _ends(header)
    held = space.total_params - split + math.ceil(split / of)
    layer = space.hidden_size * max(layer.cost for layer in space.layers) if of > 1 else 0
    gathered = max(GATHERED * layer, table) if of > 1 else 0
    apart = space.total_params - held
    blocks = config.batch_size * _accumulate(config, gpus)
    at_once = min(config.batch_size, math.ceil(blocks / gpus.all))
    turns = math.ceil(blocks / at_once / gpus.all)
    tokens = at_once * config.seq_len
    memory = learning_memory(header, tokens, config.seq_len, width, mode, config.scales)
    gradients = memory.gates // 10  # fp32, of 40 bytes that a gate or scale takes
    exchanged = gradients * (gpus.all - 1) * turns
    moved = turns * width * (GATHERS * layers + ENDS * table) * (of - 1) // of
    learning = replace(
        memory,
        weights=width * held,
        gates=memory.gates + gradients * gpus.all * (gpus.all > 1),
    )
    choosing = choosing_memory(header, config, width)
    if choosing is not None:
        choosing -= width * (apart - gathered)
    compensation = compensation_memory(header, config, width, ranks=gpus.all)
    if compensation is not None:
        compensation -= width * (apart - GATHERED * layer)
    way = Way(
        shard,
        mode,
        learning,
        width * gathered,
        choosing,
        compensation,
        evaluation_memory(header, window(config, header.longest))
        - header.stored_bytes * (apart - gathered),
        received=moved + exchanged,
        network=(moved * (shard == "full") + exchanged) * (gpus.nodes > 1),
        fits=True,
    )
    return replace(way, fits=way.peak <= USABLE * gpus.memory)


def _accumulate(config: PruneConfig, gpus: Gpus) -> int:
    """`accumulate`, or as much as gives each rank a block."""
    return max(config.accumulate, math.ceil(gpus.all / config.batch_size))


def _needed(header: Header, config: PruneConfig, width: int, gpus: Gpus) -> int | None:
    """The GPUs with which the weights fit in parts over all; None if no number does."""
    more = gpus
    while more.all < MOST_GPUS:
        more = replace(more, each=2 * more.each)
        if _way("full", header, config, width, more).fits:
            return more.all
    return None


def _command(way: Way, config: PruneConfig, gpus: Gpus) -> str:
    words = ["grasp prune", config.model, "--out OUT"]
    if gpus.all > 1:
        words[0] = f"torchrun --nproc-per-node {gpus.each} -m grasp prune"
        if gpus.nodes > 1:
            hosts = f"--nnodes {gpus.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
            words[0] = words[0].replace("torchrun", f"torchrun {hosts}")
    if way.shard != "none":
        words.append(f"--shard {way.shard}")
    if (steps := _accumulate(config, gpus)) != 1:
        words.append(f"--accumulate {steps}")
    return " ".join(words)
