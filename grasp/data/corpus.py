"""Join the rows of a source into one text, and tokenise it.

Rows are joined by two newlines, as GPTQ, SparseGPT and later papers do for WikiText-2. A plain text
file is one row. WikiText's own files have one row per line, as in the hub's copy, so that a local
`wiki.test.raw` and the data set `wikitext:wikitext-2-raw-v1:test` give the same string. Only a chat
template adds a BOS here; evaluation adds one to each window on request.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grasp.data.chat import render_chat, template_name
from grasp.data.reading import SOURCES, Empty, Source, find_source, read_rows
from grasp.errors import GraspError

ROW_SEPARATOR = "\n\n"


@dataclass(frozen=True, eq=False)
class Corpus:
    """One text as token ids, with the facts that a recipe records about its origin.

    `ids` is int64 [tokens] on the CPU. `sha256` is the hash of the UTF-8 text (of the int64 ids if
    there is no text). `notes` tell the user which records were left out or rendered.
    """

    name: str
    ids: Tensor = field(repr=False)
    sha256: str
    split: str | None = None  # of a data set
    notes: tuple[str, ...] = ()

    @classmethod
    def of_ids(cls, name: str, ids: Tensor) -> Corpus:
        """A corpus that has no text of its own, only token ids."""
        return cls(name, ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest())

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def __str__(self) -> str:
        split = f", split {self.split}" if self.split else ""
        return f"{self.name}{split}, {self.tokens:,} tokens, sha256 {self.sha256[:12]}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": self.split,
            "tokens": self.tokens,
            "sha256": self.sha256,
        }


def read_corpus(
    spec: str, tokenizer: Any, *, text_field: str = "text", split: str = "train"
) -> Corpus:
    """Read `spec` (see `find_source`) and tokenise all of it, without special tokens.

    `text_field` is the field or column that holds texts or conversations. `split` is used for a
    data set whose spec names none. Raises GraspError.
    """
    source = find_source(spec, split)
    text, notes = read_text(source, tokenizer, text_field)
    # verbose=False: the text is meant to be longer than the model's context
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return Corpus(
        name=source.label,
        ids=torch.tensor(ids["input_ids"], dtype=torch.int64),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        split=source.split,
        notes=notes,
    )


def read_text(source: Source, tokenizer: Any, text_field: str) -> tuple[str, tuple[str, ...]]:
    """The joined rows of a source, with conversations rendered, and notes for the user.

    Records without text are left out, with a note. Raises GraspError: no text, more records without
    text than with it, lone surrogates.
    """
    named = source.file or source.label
    rows: list[str] = []
    chats, empty = 0, []
    for where, row in read_rows(source, text_field):
        if isinstance(row, list):
            row = render_chat(tokenizer, row, f"{named}, {where}")
            chats += isinstance(row, str)
        if isinstance(row, Empty):
            empty.append(f"{where}: {row.why}")
        else:
            rows.append(row)
    if len(empty) > len(rows):
        raise GraspError(
            f"{named} has no text in {len(empty):,} of {len(empty) + len(rows):,} records "
            f"({empty[0]}): name the right field as `text_field`"
        )
    text = ROW_SEPARATOR.join(rows)
    if not text.strip():
        raise GraspError(f"{named} holds no text: expected {SOURCES}")
    if re.search("[\ud800-\udfff]", text):  # valid in JSON, but no tokenizer accepts them
        raise GraspError(f"{named} holds lone surrogates, which are not text: remove them")
    notes = []
    if empty:
        notes.append(
            f"{source.label}: {len(empty):,} of {len(empty) + len(rows):,} records have no text "
            f"and are left out ({empty[0]})"
        )
    if chats:
        notes.append(
            f"{source.label}: {chats:,} conversations are rendered by {template_name(tokenizer)}"
        )
    return text, tuple(notes)
