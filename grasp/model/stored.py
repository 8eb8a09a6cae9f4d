"""List the tensors of a model folder from its safetensors headers, without loading them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.errors import GraspError, reason

CHUNK = 1 << 20  # bytes
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes are file[start : start + size]."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def equals(self, other: Stored) -> bool:
        """Compare bit for bit; most tensors that differ do so in the first chunk."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(a == b for a, b in zip(self._chunks(), other._chunks(), strict=True))

    def _chunks(self) -> Iterator[bytes]:
        with open(self.file, "rb") as file:
            file.seek(self.start)
            for done in range(0, self.size, CHUNK):
                yield file.read(min(CHUNK, self.size - done))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor, by name, in the files that transformers would load; empty if there are none.

    Raises GraspError if a file is damaged, cut off or missing.
    """
    if (folder / SINGLE).exists():
        return _tensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        return {}
    try:
        names = sorted({*json.loads((folder / INDEX).read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraspError(
            f"{folder / INDEX} is damaged ({reason(error)}): download it again"
        ) from None
    return {name: t for file in names for name, t in _tensors(folder / file).items()}


def _tensors(file: Path) -> dict[str, Stored]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            begin = 8 + struct.unpack("<Q", opened.read(8))[0]
            header: dict[str, Any] = json.loads(opened.read(begin - 8)) if begin < size else {}
        header.pop("__metadata__", None)
        tensors = {
            name: Stored(file, t["dtype"], tuple(t["shape"]), begin + start, end - start)
            for name, t in header.items()
            for start, end in [t["data_offsets"]]
        }
    except FileNotFoundError:
        raise GraspError(f"{file} is missing, which {INDEX} names: download it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise GraspError(f"{file} is damaged ({reason(error)}): download it again") from None
    if begin >= size or any(t.start + t.size > size for t in tensors.values()):
        raise GraspError(f"{file} is cut off after {size:,} bytes: download it again")
    return tensors


def has_own_head(folder: Path) -> bool:
    """Whether the weights have an lm_head that differs from the embeddings."""
    tensors = stored_tensors(folder)
    head = tensors.get("lm_head.weight")
    inputs = next((t for name, t in tensors.items() if name.endswith("embed_tokens.weight")), None)
    return head is not None and inputs is not None and not head.equals(inputs)
