"""What a stage of a run reports, and the state that it can resume from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]  # (done, of how many)


class Journal:
    """Where a stage reports and keeps its resumable state. This one keeps nothing."""

    def load(self) -> dict[str, Tensor] | None:
        """The last saved state of this stage, if any."""
        return None

    def save(self, state: Callable[[], dict[str, Tensor]], *, final: bool = False) -> None:
        """Called after every read of the loss; keeps the state when it is time to, or `final`."""

    def note(self, text: str) -> None:
        """Something that a reader of the log should know."""

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        """`step` of `total` done, with the mean loss and the tokens seen since the last call."""


def read_log(file: Path, part: str | None = None) -> list[dict[str, Any]]:
    """The records of a log, of a part without what belongs to others. No file is no record, and a
    last line cut off by a crash is left out."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in records if part is None or r.get("part") in (None, part)]
