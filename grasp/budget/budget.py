"""Budget: how much is kept, in exact integers, and which widths are allowed.

This module imports no torch, so that `grasp plan` can answer from a `config.json` at once.
`grasp.budget.projection` selects units by score within a budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

from grasp.errors import GraspError
from grasp.model.units import FFN_COST, LayerUnits, UnitSpace
from grasp.options import Option, option, options_of

Kind = Literal["keep", "params", "kv_cache"]
Layout = Literal["per-layer", "uniform"]
Part = Literal["ffn", "kv"]
Units = Literal["auto", "both", "ffn", "kv"]
NAMES: dict[Part, str] = {"ffn": "FFN channels", "kv": "KV groups"}
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
    """The units of one kind in one layer, at least one."""

    kind: Part
    units: slice  # into the flat unit vector
    multiple: int
    unit_cost: int  # in the budget's measure


@dataclass(frozen=True)
class Budget:
    """How much to keep, as `asked` of a `kind`, and the widths that are allowed.

    `keep` is the fraction of the prunable parameters to keep, `params` the number of parameters of
    the whole model, `kv_cache` the fraction of the KV cache to keep (with every FFN channel).
    Widths are multiples of `ffn_multiple` channels and `kv_multiple` KV groups. Layout "uniform"
    gives all layers the same widths.
    """

    kind: Kind
    asked: float
    ffn_multiple: int = option(32, "FFN widths are multiples of this.")
    kv_multiple: int = option(1, "KV head counts are multiples of this.")
    layout: Layout = option("per-layer", "Widths of each layer, or the same in all.")
    units: Units = option(
        "auto", "What may go: FFN channels, KV groups, both, or auto: what the structure allows."
    )

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            choices = " or ".join(get_args(Layout))
            raise GraspError(f"`layout` must be {choices}, got {self.layout!r}")
        if self.units not in get_args(Units):
            raise GraspError(
                f"`units` must be one of {', '.join(get_args(Units))}, got {self.units!r}"
            )
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
        return cls(*(given[0] if given else ("keep", 0.5)), **widths)

    def unit_costs(self, layer: LayerUnits) -> tuple[int, int]:
        """(cost of an FFN channel, cost of a KV group) in the measure that this budget limits."""
        if self.kind == "kv_cache":
            return 0, layer.head_dim
        return FFN_COST * (self.units != "kv"), layer.kv_cost * (self.units != "ffn")

    def segments(self, space: UnitSpace) -> Iterator[Segment]:
        """The kinds of each layer. A kind that costs nothing is kept whole."""
        for index, ffn, kv in space.segments():
            ffn_cost, kv_cost = self.unit_costs(space.layers[index])
            if ffn.stop > ffn.start:
                yield Segment("ffn", ffn, self.ffn_multiple, ffn_cost)
            if kv.stop > kv.start:
                yield Segment("kv", kv, self.kv_multiple, kv_cost)

    def prunes(self, space: UnitSpace) -> tuple[Part, ...]:
        """The kinds of units of a model that may go under this budget. Raises GraspError."""
        segments = list(self.segments(space))
        have = tuple(part for part in NAMES if any(s.kind == part for s in segments))
        found = tuple(
            part for part in have if any(s.kind == part and s.unit_cost for s in segments)
        )
        if not found or (self.units == "both" and found != tuple(NAMES)):
            (left,) = have
            asked = "`kv_cache`" if self.kind == "kv_cache" else f"`units={self.units!r}`"
            fix = f"`units={left!r}`" if self.kind != "kv_cache" else "`keep`"
            raise GraspError(f"{asked} is not possible: only {NAMES[left]} can go here: use {fix}")
        return found

    def cost(self, space: UnitSpace) -> int:
        """Cost of a whole (or already pruned) space in this budget's measure."""
        return sum(s.unit_cost * (s.units.stop - s.units.start) for s in self.segments(space))

    def floor(self, space: UnitSpace) -> int:
        """The lowest possible cost: one block of each kind in every layer."""
        return sum(s.unit_cost * s.multiple for s in self.segments(space))

    def step(self, space: UnitSpace) -> int:
        """Largest amount that may stay unspent: one block (uniform: one block in every layer)."""
        smallest = self.prunes(space)[0]  # FFN channels fill what is left
        blocks = [s.unit_cost * s.multiple for s in self.segments(space) if s.kind == smallest]
        return sum(blocks) if self.layout == "uniform" else max(blocks)

    def limit(self, space: UnitSpace) -> int:
        """The budget as an integer that the kept cost never exceeds. Raises GraspError."""
        self.prunes(space)
        self.check_multiples(space)
        if self.layout == "uniform" and not space.is_uniform:
            raise GraspError(
                "`layout='uniform'` needs layers of equal widths, and this model's differ: "
                "use `layout='per-layer'`"
            )
        total, floor = self.cost(space), self.floor(space)
        # str first: 0.7 means seven tenths, not the nearest binary fraction
        asked = Fraction(str(self.asked))
        if self.kind == "params":
            untouchable = space.total_params - total * space.hidden_size
            least = untouchable + floor * space.hidden_size
            if not least <= asked <= space.total_params:
                raise GraspError(
                    f"`params` must be between {least:,} and {space.total_params:,} for this "
                    f"model, got {self.asked:,.0f}"
                )
            return int((asked - untouchable) // space.hidden_size)
        limit = int(asked * total)
        if limit < floor:
            share = math.ceil(1e4 * floor / total) / 1e4
            raise GraspError(
                f"`{self.kind}` must be at least {share}, which one block of every kind in every "
                f"layer takes, got {self.asked}: keep more, or use smaller multiples"
            )
        return limit

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
