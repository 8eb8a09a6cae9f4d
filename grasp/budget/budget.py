"""Budget: how much is kept, in exact integers, and which widths are allowed.

This module imports no torch, so that `grasp plan` can answer from a `config.json` at once.
`grasp.budget.projection` selects units by score within a budget.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, NamedTuple

from grasp.errors import GraspError
from grasp.model.units import FFN_COST, LayerUnits, UnitSpace
from grasp.options import Option, check_choices, check_least, option, options_of

Kind = Literal["keep", "params", "kv_cache"]
Layout = Literal["auto", "per-layer", "uniform"]
UnitKind = Literal["ffn", "kv", "experts"]
Units = Literal["auto", "both", "ffn", "kv"]
NAMES: dict[UnitKind, str] = {"ffn": "FFN channels", "kv": "KV groups", "experts": "experts"}
KINDS: dict[str, Option] = {
    "keep": Option(
        "Part of the prunable parameters to keep (default: 0.5).",
        metavar="RATIO",
        type=float | None,
    ),
    "params": Option("Parameters of the result, e.g. 3.5B.", metavar="COUNT", type=float | None),
    "kv_cache": Option("Part of the KV cache to keep.", metavar="RATIO", type=float | None),
}


class Segment(NamedTuple):
    """One kind of unit in one layer, where the layer has it."""

    kind: UnitKind
    units: slice  # into the flat unit vector
    multiple: int
    unit_cost: int  # in the budget's measure
    least: int  # units that stay: a block, of experts as many as a token is routed to, or all

    @property
    def size(self) -> int:
        return int(self.units.stop - self.units.start)


@dataclass(frozen=True)
class Budget:
    """How much to keep, as `asked` of a `kind`, and the widths that are allowed.

    `keep` is the fraction of the prunable parameters to keep, `params` the number of parameters of
    the whole model, `kv_cache` the fraction of the KV cache to keep (with every FFN channel).
    Widths are multiples of `ffn_multiple` channels and `kv_multiple` KV groups. Layout "uniform"
    gives all layers the same widths; "auto" is "uniform" for mixtures of experts, which runtimes
    load with one number of experts only, and "per-layer" for all other models. The first
    `protect_first` layers, the last `protect_last` and those listed in `protect`, counted from 0,
    keep all their units; these are inside the budget.
    """

    kind: Kind
    asked: float
    ffn_multiple: int = option(32, "FFN widths are multiples of this.")
    kv_multiple: int = option(1, "KV head counts are multiples of this.")
    layout: Layout = option(
        "auto",
        "per-layer (each layer has its widths), uniform (all have the same), or auto (uniform for "
        "mixtures of experts).",
        metavar="LAYOUT",
    )

    protect_first: int = option(0, "So many of the first layers keep all their units.")
    protect_last: int = option(0, "So many of the last layers keep all their units.")
    protect: tuple[int, ...] = option(
        (), "Layers that keep all their units, as 3,7; the first is 0.", metavar="LAYERS"
    )
    units: Units = option(
        "auto", "What may go: FFN channels, KV groups, both, or auto: what the structure allows."
    )

    def __post_init__(self) -> None:
        check_least(self, protect_first=0, protect_last=0)
        check_choices(self)
        if self.kind == "kv_cache" and self.units in ("ffn", "both"):
            raise GraspError(
                f"`kv_cache` is a budget of KV groups alone, got `units={self.units!r}`: leave out "
                "`units`, or use `keep`"
            )
        if not isinstance(self.asked, Real):
            raise GraspError(f"`{self.kind}` must be one number, got {self.asked!r}")
        if not math.isfinite(self.asked):
            raise GraspError(f"`{self.kind}` must be a finite number, got {self.asked}")
        if self.kind != "params" and not 0 < self.asked <= 1:
            raise GraspError(f"`{self.kind}` must be above 0 and at most 1, got {self.asked}")

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What `of` accepts, by name."""
        return {**KINDS, **options_of(cls)}

    @classmethod
    def of(
        cls,
        *,
        keep: float | None = None,
        params: float | None = None,
        kv_cache: float | None = None,
        **widths: Any,
    ) -> Budget:
        """A budget of exactly one kind, keep=0.5 if none is given. Raises GraspError."""
        kinds: dict[Kind, float | None] = {"keep": keep, "params": params, "kv_cache": kv_cache}
        given = [(kind, asked) for kind, asked in kinds.items() if asked is not None]
        if len(given) > 1:
            names = " and ".join(f"`{kind}`" for kind, _ in given)
            raise GraspError(f"{names} are two budgets: give one of them")
        if "protect" in widths:
            widths["protect"] = _listed(widths["protect"])
        return cls(*(given[0] if given else ("keep", 0.5)), **widths)

    def unit_costs(self, layer: LayerUnits) -> tuple[int, int, int]:
        """(FFN channel, KV group, expert): cost of each in the measure that this budget limits."""
        if self.kind == "kv_cache":
            return 0, layer.head_dim, 0
        ffn, kv = self.units != "kv", self.units != "ffn"
        return FFN_COST * ffn, layer.kv_cost * kv, layer.expert_cost * ffn

    def segments(self, space: UnitSpace) -> Iterator[Segment]:
        """The kinds of units that each layer has, in the order of a unit vector.

        Units that cost nothing in the measure of this budget stay.
        """
        costs = [self.unit_costs(layer) for layer in space.layers]
        whole = self.protected(len(space.layers))
        for index, ffn, kv in space.segments():
            layer, (ffn_cost, kv_cost, _) = space.layers[index], costs[index]
            if layer.ffn:
                least = layer.ffn if index in whole else self.ffn_multiple
                yield Segment("ffn", ffn, self.ffn_multiple, ffn_cost, least)
            if layer.kv_groups:
                least = layer.kv_groups if index in whole else self.kv_multiple
                yield Segment("kv", kv, self.kv_multiple, kv_cost, least)
        for index, experts in space.expert_segments():
            if (layer := space.layers[index]).experts:
                least = layer.experts if index in whole else layer.experts_per_token
                yield Segment("experts", experts, 1, costs[index][2], least)

    def protected(self, layers: int) -> set[int]:
        """Which of so many layers keep all their units."""
        return {*range(self.protect_first), *range(layers - self.protect_last, layers)} | {
            *self.protect
        }

    def prunes(self, space: UnitSpace) -> tuple[UnitKind, ...]:
        """The kinds of units of a model that may go under this budget. Raises GraspError."""
        have: dict[UnitKind, bool] = {}
        for segment in self.segments(space):
            have[segment.kind] = have.get(segment.kind, False) or segment.unit_cost > 0
        found = tuple(kind for kind, may_go in have.items() if may_go)
        lacks_one = "kv" not in found or len(found) < 2
        if not found or (self.units == "both" and lacks_one):
            asked = "`kv_cache`" if self.kind == "kv_cache" else f"`units={self.units!r}`"
            fix = "`keep`" if self.kind == "kv_cache" else "`units='auto'`"
            may_go = " and ".join(NAMES[kind] for kind in have)
            raise GraspError(f"{asked} is not possible: only {may_go} can go here: use {fix}")
        return found

    def for_space(self, space: UnitSpace) -> Budget:
        """This budget with layout "auto" resolved."""
        if self.layout != "auto":
            return self
        return replace(self, layout="uniform" if space.experts else "per-layer")

    def together(self, space: UnitSpace) -> list[list[Segment]]:
        """The segments whose widths are equal: those of a kind if uniform, else each alone."""
        segments = list(self.segments(space))
        uniform = self.for_space(space).layout == "uniform"
        alone = [[s] for s in segments if not (uniform and s.unit_cost)]  # what stays may differ
        shared: dict[UnitKind, list[Segment]] = {}
        for s in segments:
            if uniform and s.unit_cost:
                shared.setdefault(s.kind, []).append(s)
        return [*shared.values(), *alone]

    def cost(self, space: UnitSpace) -> int:
        """Cost of a whole (or already pruned) space in this budget's measure."""
        return sum(s.unit_cost * s.size for s in self.segments(space))

    def floor(self, space: UnitSpace) -> int:
        """The lowest possible cost: a block of each kind in every layer, all of protected ones."""
        return sum(s.unit_cost * s.least for s in self.segments(space))

    def step(self, space: UnitSpace) -> int:
        """Below this the unspent amount stays: a block (uniform: a block in every layer).

        What the budget leaves out is at least the cost of all units less the limit, and each block
        that is left out costs more than what is unspent. So the dearest blocks that alone can make
        up for so much bound it.
        """
        over, droppable, step = self.cost(space) - self.limit(space), 0, 1
        blocks = [
            (
                sum(s.unit_cost * s.multiple for s in group),
                sum(s.unit_cost * (s.size - s.least) for s in group),
            )
            for group in self.together(space)
        ]
        for block, most in sorted(blocks, reverse=True):
            if droppable >= over:
                break
            droppable, step = droppable + most, block
        return step

    def limit(self, space: UnitSpace) -> int:
        """The budget as an integer that the kept cost never exceeds. Raises GraspError."""
        self.prunes(space)
        self.check_multiples(space)
        self.check_protected(space)
        budgeted = [[s.size for s in group if s.unit_cost] for group in self.together(space)]
        if any(len({*sizes}) > 1 for sizes in budgeted):
            raise GraspError(
                "`layout='uniform'` needs layers of equal widths, and this model's differ: "
                "use `layout='per-layer'`"
            )
        total, floor = self.cost(space), self.floor(space)
        # str first: 0.7 means seven tenths, not the nearest binary fraction
        asked = Fraction(str(self.asked))
        whole = len(self.protected(len(space.layers)))
        if self.kind == "params":
            untouchable = space.total_params - total * space.hidden_size
            least = untouchable + floor * space.hidden_size
            if not least <= asked <= space.total_params:
                raise GraspError(
                    f"`params` must be between {least:,} and {space.total_params:,} for this "
                    f"model{f' with {whole} protected layers' if whole else ''}, got "
                    f"{self.asked:,.0f}"
                )
            return int((asked - untouchable) // space.hidden_size)
        limit = int(asked * total)
        if limit < floor:
            share = math.ceil(1e4 * floor / total) / 1e4
            takes, fix = "one block of every kind in every layer requires", "use smaller multiples"
            if whole:
                takes = (
                    f"{whole} protected layers and one block of every kind in the others require"
                )
                fix = "protect fewer layers"
            raise GraspError(
                f"`{self.kind}` must be at least {share}, which {takes}, got {self.asked}: keep "
                f"more, or {fix}"
            )
        return limit

    def check_protected(self, space: UnitSpace) -> None:
        """Raise GraspError if the model has no such layers, or they cannot stay whole alone."""
        count = len(space.layers)
        for name in ("protect_first", "protect_last"):
            if getattr(self, name) > count:
                raise GraspError(
                    f"`{name}` must be at most {count}, the layers of this model, got "
                    f"{getattr(self, name)}"
                )
        wrong = [index for index in self.protect if not 0 <= index < count]
        if wrong:
            raise GraspError(
                f"`protect` must list layers between 0 and {count - 1} for this model, got "
                f"{wrong[0]}"
            )
        if self.protected(count) and self.for_space(space).layout == "uniform":
            raise GraspError(
                "`layout='uniform'` gives all layers the same widths, so none can be protected: "
                "use `layout='per-layer'`, or leave out `protect`, `protect_first` and "
                "`protect_last`"
            )

    def check_multiples(self, space: UnitSpace) -> None:
        """Raise GraspError if a multiple does not divide a width."""
        for name, multiple, widths in (
            ("ffn_multiple", self.ffn_multiple, {layer.ffn for layer in space.layers}),
            ("kv_multiple", self.kv_multiple, {layer.kv_groups for layer in space.layers}),
        ):
            uneven = [w for w in sorted(widths) if multiple < 1 or w % multiple]
            if uneven:
                raise GraspError(
                    f"`{name}` must divide the widths of this model, {uneven[0]} among them, got "
                    f"{multiple}: 1 always does"
                )


def _listed(layers: Any) -> tuple[int, ...]:
    """Layers as a tuple of whole numbers. Raises GraspError."""
    try:
        return tuple(map(operator.index, layers))
    except TypeError:
        raise GraspError(f"`protect` must be a list of layers, as [3, 7], got {layers!r}") from None
