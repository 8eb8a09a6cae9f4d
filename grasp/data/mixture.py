"""The calibration text of a run: one source, or several mixed by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from grasp.data.blocks import HELD_OUT_BLOCKS, held_out_text, token_blocks
from grasp.data.corpus import Corpus, read_corpus
from grasp.data.parts import Part, find_parts, shares
from grasp.errors import GraspError


@dataclass(frozen=True, eq=False)
class Mixture:
    """A corpus for each part. `Part.blocks` says how many blocks are drawn from it."""

    corpora: tuple[Corpus, ...]
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        if len(self.corpora) == 1:
            return self.corpora[0].name
        return ", ".join(
            f"{float(part.weight):.3g} {corpus.name}"
            for corpus, part in zip(self.corpora, self.parts, strict=True)
        )

    @property
    def tokens(self) -> int:
        return sum(corpus.tokens for corpus in self.corpora)

    @property
    def sha256(self) -> str:
        """Of the text; of the joined hashes if there are several."""
        hashes = [corpus.sha256 for corpus in self.corpora]
        return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for corpus in self.corpora for note in corpus.notes)

    def blocks(self, *, seq_len: int, seed: int) -> Tensor:
        """All blocks, int64 [samples, seq_len]: each part's drawn by seed, see `token_blocks`.

        The order mixes the parts evenly, so that the first blocks alone are in proportion too.
        Raises GraspError if a part has too little text.
        """
        if len(self.parts) > 1:
            self._check_enough(seq_len)
        return _interleaved(
            [
                token_blocks(corpus, seq_len=seq_len, samples=part.blocks, seed=seed)
                for corpus, part in zip(self.corpora, self.parts, strict=True)
            ]
        )

    def held_out(self, *, seq_len: int) -> Corpus | None:
        """Up to 64 blocks in all that `blocks` never draws, in proportion; the same for every seed.

        A part that its blocks use up is not in it. None if all are used up.
        """
        most = shares([part.weight for part in self.parts], HELD_OUT_BLOCKS)
        found = [
            held_out_text(corpus, seq_len=seq_len, samples=part.blocks)
            for corpus, part in zip(self.corpora, self.parts, strict=True)
        ]
        blocks = [
            rest.ids.view(-1, seq_len)[:own]
            for rest, own in zip(found, most, strict=True)
            if rest is not None and own
        ]
        if not blocks:
            return None
        return Corpus.of_ids(f"{self.name}, held-out blocks", _interleaved(blocks).flatten())

    def to_json(self) -> dict[str, Any]:
        """What a recipe records; `parts` only if there are several."""
        if len(self.corpora) == 1:
            return self.corpora[0].to_json()
        parts = [
            {**corpus.to_json(), "weight": float(part.weight), "blocks": part.blocks}
            for corpus, part in zip(self.corpora, self.parts, strict=True)
        ]
        about = {"name": self.name, "split": None, "tokens": self.tokens, "sha256": self.sha256}
        return {**about, "parts": parts}

    def _check_enough(self, seq_len: int) -> None:
        for corpus, part in zip(self.corpora, self.parts, strict=True):
            available = corpus.tokens // seq_len
            if part.blocks > available:
                weight = float(part.weight)
                raise GraspError(
                    f"too little text: {corpus.name} has {corpus.tokens:,} tokens, {available:,} "
                    f"blocks of {seq_len}; its weight {weight:.3g} takes {part.blocks}: "
                    "lower its weight, `samples` or `seq_len`, or use more text"
                )


def read_mixture(
    spec: str,
    tokenizer: Any,
    *,
    samples: int,
    text_field: str = "text",
    sample: Callable[[int], Corpus] | None = None,
) -> Mixture:
    """Read and tokenise each part that `spec` names (see `find_parts`).

    `sample` makes the part `self`, of the given number of blocks. Raises GraspError.
    """
    parts = find_parts(spec, samples)
    corpora = tuple(
        sample(part.blocks)
        if part.spec == "self" and sample
        else read_corpus(part.spec, tokenizer, text_field=text_field)
        for part in parts
    )
    return Mixture(corpora, parts)


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, evenly mixed: each is spread over the whole, in its own order."""
    place = [(torch.arange(len(rows)).double() + 0.5) / len(rows) for rows in parts]
    return torch.cat([*parts])[torch.cat(place).argsort(stable=True)]
