"""`grasp export`: write a checkpoint in the format of another runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grasp.errors import GraspError
from grasp.machine import disk_errors, new_beside
from grasp.model.load import load_model
from grasp.planning.check import check_export

TYPES = ("f32", "f16", "bf16", "q8_0")  # of GGUF


@dataclass(frozen=True)
class Exported:
    """The result of an export; `note` is what its user should know (None: nothing)."""

    path: Path
    architecture: str
    bytes: int
    note: str | None

    def __str__(self) -> str:
        line = f"{self.path}: {self.architecture}, {self.bytes:,} bytes"
        return f"{line}\n{self.note}" if self.note else line


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "gguf",
    type: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a checkpoint, or any model that `grasp.load` accepts, for another runtime.

    `to` "gguf": one file for llama.cpp, with matrices of `type` f32, f16 (None), bf16 or q8_0.
    `to` "hf-uniform": a folder with the stock class and config; every layer is padded with zeros to
    the widest one, which leaves the outputs unchanged. `out` is complete or absent. Raises
    GraspError if `out` exists or the other runtime cannot compute the same as the model.
    """
    out, type = Path(out), type and type.lower()
    if to not in ("gguf", "hf-uniform"):
        raise GraspError(f"`to` must be gguf or hf-uniform, got {to!r}")
    if to == "gguf":
        if out.suffix != ".gguf":
            raise GraspError(f"`out` must end in .gguf, by which tools know such a file, got {out}")
        _check_type(type or "f16", out)
    elif type is not None:
        raise GraspError(
            f"`type` is for `to='gguf'`, got {type!r}: leave it out, a folder keeps its type"
        )
    if os.path.lexists(out):
        raise GraspError(f"{out} exists already: choose another `out` or remove it first")
    if not out.parent.is_dir():
        raise GraspError(
            f"`out` must be in a folder that exists, got {out}: make {out.parent} first"
        )
    check_export(os.fspath(model))

    from grasp.checkpoint.gguf import write_gguf  # late: torch takes seconds
    from grasp.checkpoint.uniform import write_uniform

    live, tokenizer = load_model(model, dtype=None)
    with disk_errors(out), new_beside(out) as beside:
        if to == "gguf":
            architecture, note = write_gguf(
                live, tokenizer, beside, type=type or "f16", progress=progress
            )
        else:
            architecture, note = write_uniform(live, tokenizer, beside)
    files = out.rglob("*") if out.is_dir() else [out]
    return Exported(out, architecture, sum(file.stat().st_size for file in files), note)


def _check_type(type: str, out: Path) -> None:
    """Raise GraspError for a type that grasp does not write, and say how to get it."""
    if type in TYPES:
        return
    from gguf import LlamaFileType

    if f"MOSTLY_{type.upper()}" in LlamaFileType.__members__:
        f16 = out.with_name(f"{out.stem}-f16.gguf")
        raise GraspError(
            f"`type={type!r}` is packed by llama.cpp's own tool: export with `type='f16'` and "
            f"`out={str(f16)!r}`, then run `llama-quantize {f16} {out} {type.upper()}`"
        )
    raise GraspError(f"`type` must be one of {', '.join(TYPES)}, got {type!r}")
