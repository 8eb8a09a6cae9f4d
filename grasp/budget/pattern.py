"""Sparsity patterns: M - N zeros in every M inputs of an output row, or a fraction of each row."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from grasp.errors import GraspError

if TYPE_CHECKING:  # a pattern is parsed before torch is loaded
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """The fraction `zeros` of every `group` inputs is zero; `group` None is a whole row.

    The number of zeros per row is rounded down, as in Wanda (arXiv 2306.11695).
    """

    text: str
    zeros: Fraction
    group: int | None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse 2:4 (keeps 2 of every 4) or 0.5 (zeroes half of every row). Raises GraspError."""
        kept, colon, of = text.partition(":")
        try:
            group = int(of) if colon else None
            zeros = 1 - Fraction(int(kept), int(of)) if colon else Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise GraspError(
                f"`pattern` must be N:M, as 2:4, or a part of each row, as 0.5, got {text!r}"
            ) from None
        if not 0 < zeros < 1 or (group or 1) < 1:
            expected = "N:M with 0 < N < M" if colon else "N:M or a part between 0 and 1"
            raise GraspError(f"`pattern` must be {expected}, got {text}")
        return cls(text, zeros, group)

    def check(self, name: str, inputs: int) -> None:
        """Raise GraspError if the rows of a matrix cannot be cut into groups."""
        if inputs % (self.group or 1):
            raise GraspError(
                f"`pattern` {self.text} does not fit {name}, whose {inputs} inputs are not a "
                f"multiple of {self.group}: choose another, or a part of each row, as 0.5"
            )

    def keep(self, scores: Tensor, start: int = 0) -> Tensor:
        """The mask that drops the lowest scores of each group; of equal scores, the first ones.

        scores: [out, columns], a matrix or its columns from `start`; returns bool of that shape.
        """
        groups = scores.unflatten(1, (-1, self.group or scores.shape[1]))
        end = start + groups.shape[-1]
        dropped = int(self.zeros * end) - int(self.zeros * start)
        lowest = groups.argsort(dim=-1, stable=True)[..., :dropped]
        kept: Tensor = groups.new_ones(groups.shape).bool().scatter(-1, lowest, False)
        return kept.flatten(1)

    def holds(self, weight: Tensor) -> bool:
        """Whether every group of weight [out, in] has at least the required number of zeros."""
        groups = weight.unflatten(1, (-1, self.group or weight.shape[1]))
        return bool(((groups == 0).sum(-1) >= int(self.zeros * groups.shape[-1])).all())
