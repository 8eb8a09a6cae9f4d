"""The journal of a stage: its progress, and the state that it can resume from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]  # (done, total)


class Journal:
    """Receives a stage's progress and resumable state. This base class keeps nothing."""

    def load(self) -> dict[str, Tensor] | None:
        """The last saved state of this stage, if any: on all ranks."""
        return self.load_own()

    def load_own(self) -> dict[str, Tensor] | None:
        """The same for the caller alone, which must be the first rank."""
        return None

    def save(self, state: Callable[[], dict[str, Tensor]], *, final: bool = False) -> None:
        """Called after every read of the loss; saves the state if it is due, or `final`."""

    def note(self, text: str) -> None:
        """Add a remark to the log."""

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        """Report `step` of `total`, with the mean loss and the tokens since the last call."""


def read_log(file: Path, part: str | None = None) -> list[dict[str, Any]]:
    """The records of a log; with `part`, without those of other parts.

    A missing file gives no records. A last line cut off by a crash is left out.
    """
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in records if part is None or r.get("part") in (None, part)]
