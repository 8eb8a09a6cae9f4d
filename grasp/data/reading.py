"""What `--calibration` and `--eval-text` name, and the rows that are there. Nothing here needs torch.

A row is a text, or a conversation as a list of messages. Files are read as they stream in, gzip and
zstd included; data sets are those of the hub or of a folder, read by `datasets`.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from grasp.errors import GraspError, reason

FORMATS = {
    **dict.fromkeys((".txt", ".raw", ".md", ".rst", ".tex", ".html", ".log", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
UNREAD = (".arrow", ".bz2", ".docx", ".pdf", ".tar", ".tgz", ".xlsx", ".xz", ".zip")
DATA = (".txt", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", *COMPRESSIONS, *UNREAD)
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "parquet": b"PAR1"}
HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}")
HEAD = 1 << 16  # bytes that are looked at before the long work
SOURCES = "a text, .jsonl, .json, .csv or .parquet file, or a hub data set as name[:config[:split]]"


@dataclass(frozen=True)
class Source:
    """Where a text is: `builtin`, a file, or a data set of the hub or of a folder."""

    name: str
    file: Path | None = None
    config: str | None = None
    split: str | None = None  # of a data set; slices such as train[:1%] are allowed

    @property
    def label(self) -> str:
        if self.file:
            return self.file.name
        return f"{self.name}:{self.config}" if self.config else self.name


def find_source(spec: str, split: str = "train") -> Source:
    """The source that `spec` names, checked as far as the file system can tell, in milliseconds.

    `spec` is `builtin`, a file, or `name[:config[:split]]` for a data set of the hub or a folder;
    `split` is used where it names none. What exists on disk is never looked for on the hub, nor is
    what looks like a file. Raises GraspError: nothing named, no such file, a file that cannot be
    read or is of an unknown kind, a folder without data.
    """
    if spec == "builtin":
        return Source(spec)
    if not spec.strip():
        raise GraspError(f"{spec!r} names no text: expected {SOURCES}, or builtin")
    if spec == "self":
        raise GraspError(
            "'self' is text that the model writes to calibrate on, not one to evaluate on: expected "
            f"{SOURCES}"
        )
    if os.path.exists(spec) and not os.path.isdir(spec):
        _check_file(Path(spec))
        return Source(spec, file=Path(spec))
    name, config, part = (*spec.split(":", 2), "", "")[:3]
    if os.path.isfile(name):
        raise GraspError(f"{name} is a file, which has no splits: leave out what follows it")
    if os.path.isdir(name):
        if not _has_data(name):
            raise GraspError(f"{name} is a folder without data files: expected {SOURCES}")
    elif "://" in spec or any(_kind(name)) or not HUB_NAME.fullmatch(name):
        raise GraspError(f"{shorten(spec, 200)} does not exist: expected {SOURCES}")
    return Source(name, config=config or None, split=part or split)


def _kind(name: str) -> tuple[str, str]:
    """Format and compression by suffix: ("json", "gzip") of a.jsonl.gz, "" where none is known."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    return ("unread" if suffix in UNREAD else FORMATS.get(suffix, "")), compression


def _check_file(path: Path) -> None:
    """Refuse a file of a kind that is not read, or whose first bytes are not of its kind."""
    kind, compression = _kind(path.name)
    if kind == "unread" or (kind == "parquet" and compression):
        raise GraspError(f"{path} is of a kind that is not read: unpack it, and give {SOURCES}")
    if not path.is_file():  # a pipe, which can be read once
        return
    with readable(path), open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise GraspError(f"{path} is empty: expected {SOURCES}")
    outer = compression or ("parquet" if kind == "parquet" else "")
    if outer:
        if not head.startswith(MAGIC[outer]):
            raise GraspError(f"{path} is not a {outer} file, as its name says: expected {SOURCES}")
        return
    with readable(path):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    _check_characters(path, text)


def _has_data(folder: str) -> bool:
    return any(name.lower().endswith(DATA) for _, _, names in os.walk(folder) for name in names)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever the file system, a decompressor or a decoder says, as one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise GraspError(f"{path} is not UTF-8 text: convert it, or give {SOURCES}") from None
    except OSError as error:
        raise GraspError(f"cannot read {path} ({error.strerror or reason(error)})") from None


def _check_characters(path: Path, text: str) -> None:
    if "\0" in text:
        raise GraspError(f"{path} is not text (it holds zero bytes): expected {SOURCES}")
