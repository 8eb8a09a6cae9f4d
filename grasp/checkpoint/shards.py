"""Write the weights of a checkpoint file by file, as they come, without ever holding them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from grasp.machine import disk_errors
from grasp.model.stored import INDEX

SHARD_BYTES = 5_000_000_000


class ShardWriter:
    """Writes `folder`/model-0000N-of-0000M.safetensors and their index; call `close` at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # names of the tensors in each
        self.bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, by their names in the checkpoint; write those that waited if many."""
        self._waiting |= {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        if sum(t.nbytes for t in self._waiting.values()) >= SHARD_BYTES:
            self._write()

    def close(self) -> None:
        """Write what waits, and the index."""
        self._write()
        total = len(self._files)
        names = [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
        with disk_errors(self._folder):
            for number, name in enumerate(names):
                self._path(number).rename(self._folder / name)
            weight_map = {t: names[n] for n, own in enumerate(self._files) for t in own}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write(self) -> None:
        if self._waiting:
            with disk_errors(self._folder):
                save_file(self._waiting, self._path(len(self._files)), metadata={"format": "pt"})
            self.bytes += sum(t.nbytes for t in self._waiting.values())
            self._files.append([*self._waiting])
            self._waiting = {}

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number}"
