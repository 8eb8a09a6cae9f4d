"""The parts of a calibration text, as `a.txt,b.jsonl:0.3,self` names them, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grasp.data.reading import find_source
from grasp.errors import GraspError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Part:
    """One source of a calibration text, its weight, and the number of blocks drawn from it."""

    spec: str  # as `find_source` reads it, or self
    weight: Fraction  # of all parts, they sum to 1
    blocks: int


def find_parts(spec: str, samples: int) -> tuple[Part, ...]:
    """The parts that `spec` names, checked on the file system only; their blocks sum to `samples`.

    `spec` is one source, or several with commas between them, each with or without `:WEIGHT`; parts
    without a weight share the rest equally. A file whose own name holds commas is one part. Raises
    GraspError: what `find_source` refuses, a part that is named twice, a weight outside of (0, 1],
    weights that do not sum to 1, a part without a block.
    """
    listed = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",")]
    weighed = [_weighed(part) for part in listed]
    names = [name for name, _ in weighed]
    for name in names:
        if name != "self":
            find_source(name)
        if names.count(name) > 1:
            raise GraspError(f"`calibration` names {name} twice: give it once, with a weight")
    weights = _weights(weighed)
    blocks = shares(weights, samples)
    for name, own in zip(names, blocks, strict=True):
        if not own:
            raise GraspError(
                f"`samples={samples}` leaves no block for {name}: use more `samples`, or give it a "
                "larger weight"
            )
    return tuple(map(Part, names, weights, blocks))


def shares(weights: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers in the ratio of `weights`, which sum to 1, by largest remainder; sum: total."""
    exact = [weight * total for weight in weights]
    whole = [int(part) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_rest[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _weighed(part: str) -> tuple[str, Fraction | None]:
    """The source and the weight of one part; a data set may have colons in its own name."""
    name, colon, last = part.rpartition(":")
    if not colon or os.path.exists(part):
        return part, None
    is_number = NUMBER.fullmatch(last) is not None
    if is_number and 0 < (weight := Fraction(last)) <= 1:
        return name, weight
    if is_number or name in ("self", "builtin") or os.path.isfile(name):
        raise GraspError(
            f"the weight of {name} must be a number above 0 and at most 1, got {last!r}"
        )
    return part, None


def _weights(weighed: Sequence[tuple[str, Fraction | None]]) -> list[Fraction]:
    """The weight of each part, with the rest shared among those without one."""
    given = sum((weight for _, weight in weighed if weight is not None), Fraction(0))
    others = [name for name, weight in weighed if weight is None]
    if given > 1 or (not others and given != 1):
        least = "at most 1" if others else "1"
        raise GraspError(
            f"the weights of `calibration` must sum to {least}, got {float(given):g}: give the "
            "last part no weight, and it takes the rest"
        )
    if others and given == 1:
        raise GraspError(
            f"the weights of `calibration` sum to 1, which leaves nothing for {others[0]}: give "
            "smaller weights, or leave it out"
        )
    rest = (1 - given) / max(len(others), 1)
    return [rest if weight is None else weight for _, weight in weighed]
