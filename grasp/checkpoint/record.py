"""grasp.json: how a checkpoint was made, what is in it, and what was measured on it.

This module does not import torch. `format` increases with each change that older releases cannot
read. Newer releases read every older format; the changelog lists the changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from grasp.errors import GraspError

FORMAT = 1
FILE = "grasp.json"


@dataclass(frozen=True)
class Record:
    """The content of a checkpoint's grasp.json."""

    grasp_version: str
    model: str  # as named by the user
    seed: int
    recipe: dict[str, Any]  # the options of the run; empty for a model that a program saved
    versions: dict[str, str]  # python, torch, transformers
    params: dict[str, int]  # prunable_before, prunable_after, total_before, total_after
    kv_cache_bytes_per_token: dict[str, int]  # before, after; 16 bit
    # before, after: [FFN channels, KV groups] of each layer, of a mixture also experts
    widths: dict[str, list[list[int]]]
    mask_sha256: str
    kept: list[dict[str, list[int]]]  # ffn, kv, experts: original indices of what each layer keeps
    calibration: dict[str, Any] | None = None  # name, split, tokens, sha256; parts of a mixture
    budget: dict[str, Any] | None = None  # kind, asked, limit, obtained, of, chosen_for
    sparsity: dict[str, Any] | None = None  # pattern, weights, zeros_before, zeros_after, errors
    recovery: list[dict[str, Any]] | None = None  # one per `grasp recover`: tokens, text, before
    results: dict[str, Any] = field(default_factory=dict)  # see `measured` and `perplexities`
    sha256: dict[str, str] = field(default_factory=dict)  # of the weight files, by file name
    format: int = FORMAT

    @property
    def kept_part(self) -> float:
        """Fraction of the prunable parameters that is kept."""
        return self.params["prunable_after"] / self.params["prunable_before"]

    @property
    def recovery_tokens(self) -> int:
        """Tokens that the weights learned from after pruning; 0 if they did not."""
        return sum(run["tokens"] for run in self.recovery or ())

    @property
    def perplexities(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(dense, pruned) on each evaluation text, as `Perplexity.to_json` gives them."""
        pairs = [self.results, *self.results.get("other_texts", ())]
        return [(p["dense"], p["pruned"]) for p in pairs if p.get("dense") and p.get("pruned")]

    def evaluated(
        self, dense: Sequence[dict[str, Any]], pruned: Sequence[dict[str, Any]]
    ) -> Record:
        """Return a copy with the perplexities of both models on each evaluation text."""
        pairs = [{"dense": a, "pruned": b} for a, b in zip(dense, pruned, strict=True)]
        if not pairs:
            return self.measured(dense=None, pruned=None)
        return self.measured(**pairs[0], **({"other_texts": pairs[1:]} if pairs[1:] else {}))

    def measured(self, **results: Any) -> Record:
        """Return a copy with more results."""
        return replace(self, results={**self.results, **results})

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Record:
        """Read grasp.json's content. Raises ValueError for missing fields or another format."""
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')}, and this release reads {FORMAT}")
        known = {f.name for f in fields(cls)}
        try:
            record = cls(**{name: value for name, value in content.items() if name in known})
            (record.kept_part, record.params["total_before"], record.params["total_after"])
            (record.kv_cache_bytes_per_token["before"], record.kv_cache_bytes_per_token["after"])
            (record.widths["before"], record.widths["after"])
            (record.perplexities, record.sha256.items())
            [(layer["ffn"], layer["kv"]) for layer in record.kept]
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(str(error)) from None
        return record

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read grasp.json in `folder`. Raises GraspError if `folder` is not a grasp checkpoint."""
        try:
            return cls.from_json(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise GraspError(f"{folder} is not a grasp checkpoint: it has no {FILE}") from None
        except NotADirectoryError:
            raise GraspError(f"{folder} is a file: name the folder of a checkpoint") from None
        except (OSError, ValueError, AttributeError) as error:
            raise GraspError(f"{folder} is not a grasp checkpoint: {FILE}: {error}") from None

    def write(self, folder: Path) -> None:
        """Write grasp.json, one line per field, because JSON's indent gives each index a line."""
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.to_json().items())
        beside = folder / f"{FILE}.new"
        beside.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        os.replace(beside, folder / FILE)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
