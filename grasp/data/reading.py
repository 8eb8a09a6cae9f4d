"""Read the rows of the text that `calibration` or `eval_text` names, without torch.

A row is a text or a conversation. Files are streamed, gzip and zstd included. Data sets of the hub
or of a folder are read by `datasets`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from grasp.data.builtin import builtin_rows
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
HEAD = 1 << 16  # bytes that are checked before the long work
HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}")
CHAT_FIELDS = ("messages", "conversations")
CSV_CELL = 2**31 - 1  # characters; the default of `csv` is 131,072
SOURCES = "a text, .jsonl, .json, .csv or .parquet file, or a hub data set as name[:config[:split]]"


@dataclass(frozen=True)
class Source:
    """The place of a text: `builtin`, a file, or a data set of the hub or of a folder."""

    name: str
    file: Path | None = None
    config: str | None = None
    split: str | None = None  # of a data set; slices such as train[:1%] are allowed

    @property
    def label(self) -> str:
        if self.file:
            return self.file.name
        return f"{self.name}:{self.config}" if self.config else self.name


@dataclass(frozen=True)
class Empty:
    """Replaces the text of a record that has none."""

    why: str


Row = str | list[Any] | Empty  # a list is a conversation


def find_source(spec: str, split: str = "train") -> Source:
    """The source that `spec` names, checked on the file system only, within milliseconds.

    `spec` is `builtin`, a file, or `name[:config[:split]]` for a data set of the hub or a folder;
    `split` is used if the spec names none. A path that exists or looks like a file is never looked
    up on the hub. Raises GraspError: an empty spec, no such file, a file that cannot be read or has
    an unknown type, a folder without data.
    """
    if spec == "builtin":
        return Source(spec)
    if not spec.strip():
        raise GraspError(f"{spec!r} names no text: expected {SOURCES}, or builtin")
    if spec == "self":
        raise GraspError(
            f"only `calibration` may be self (the model's own text): expected {SOURCES}"
        )
    if os.path.exists(spec) and not os.path.isdir(spec):
        _check_file(Path(spec))
        return Source(spec, file=Path(spec))
    name, config, part = (*spec.split(":", 2), "", "")[:3]
    if os.path.isfile(name):
        raise GraspError(f"{name} is a file, which has no splits: leave out what follows it")
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, "config.json")):
            raise GraspError(f"{name} is a model's folder, not a text: expected {SOURCES}")
        if not _has_data(name):
            raise GraspError(f"{name} is a folder without data files: expected {SOURCES}")
    elif "://" in spec or any(_kind(name)) or not HUB_NAME.fullmatch(name):
        raise GraspError(f"{_clipped(spec)} does not exist: expected {SOURCES}")
    return Source(name, config=config or None, split=part or split)


def read_rows(source: Source, text_field: str = "text") -> Iterator[tuple[str, Row]]:
    """Yield the position ("line 3") and the row of each record of a source.

    A plain text file is one row; a WikiText file has one row per line. In other sources, the row is
    `text_field` or, if there is no field `text`, a conversation in one of CHAT_FIELDS.
    Raises GraspError; errors of a reader become one line with the path and the reason.
    """
    if source.file is None:
        if source.split is None:
            return (("", row) for row in builtin_rows())
        return _dataset_rows(source, text_field)
    kind, _ = _kind(source.file.name)
    readers: dict[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
        "json": _json_rows,
        "csv": _csv_rows,
        "parquet": _parquet_rows,
    }
    return readers.get(kind, _text_rows)(source.file, text_field)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the position ("line 3") and the value of each record of a JSON file.

    The file has one record per line, an array of records, or one object over several lines. Raises
    GraspError: no such file, not UTF-8, not JSON.
    """
    lines = enumerate(_lines(path), 1)
    number, first = next((pair for pair in lines if pair[1].strip()), (0, ""))
    if first.lstrip().startswith("["):
        array = _parse(path, number, first + "".join(line for _, line in lines))
        yield from ((f"record {n:,}", record) for n, record in enumerate(array, 1))
    elif first and not _is_json(first):
        whole = first + "".join(line for _, line in lines)
        yield "record 1", _parse(path, number, whole)
    elif first:
        for at, line in chain([(number, first)], lines):
            if line.strip():
                yield f"line {at:,}", _parse(path, at, line.rstrip())


def wikitext_rows(text: str) -> list[str]:
    """The rows of a WikiText file as in the hub's copy: its lines, blank ones as ""."""
    return [line if line.strip() else "" for line in io.StringIO(text)]


def _kind(name: str) -> tuple[str, str]:
    """Format and compression by suffix: ("json", "gzip") for a.jsonl.gz, "" if not known."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    return ("unread" if suffix in UNREAD else FORMATS.get(suffix, "")), compression


def _check_file(path: Path) -> None:
    """Raise GraspError for a file type that is not read, or first bytes that do not match it."""
    kind, compression = _kind(path.name)
    if kind == "unread" or (kind == "parquet" and compression):
        raise GraspError(f"{path} is of a kind that is not read: expected {SOURCES}")
    if not path.is_file():  # a pipe, which can be read only once
        return
    with _os_errors(path), open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise GraspError(f"{path} holds no text: expected {SOURCES}")
    outer = compression or kind
    if outer not in MAGIC:
        _decode(str(path), head, final=len(head) < HEAD)
    elif not head.startswith(MAGIC[outer]):
        raise GraspError(f"{path} is not a {outer} file, as its name says: expected {SOURCES}")


def _has_data(folder: str) -> bool:
    return any(name.lower().endswith(DATA) for _, _, names in os.walk(folder) for name in names)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system or a decompressor into one line."""
    try:
        yield
    except FileNotFoundError:
        raise GraspError(f"{path} does not exist: expected {SOURCES}") from None
    except OSError as error:
        raise GraspError(f"cannot read {path} ({error.strerror or reason(error)})") from None


def _decode(where: str, data: bytes, *, final: bool = True) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final)
    except UnicodeDecodeError as error:
        raise GraspError(
            f"{where} is not UTF-8 text (byte {error.start:,}): convert it, or give {SOURCES}"
        ) from None
    if "\0" in text:
        raise GraspError(f"{where} is not text (it holds zero bytes): expected {SOURCES}")
    return text


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, decompressed and decoded, each with its line end."""
    _, compression = _kind(path.name)
    with _os_errors(path), open(path, "rb") as file:
        stream: Iterable[bytes] = _unpacked(file, compression) if compression else file
        for number, line in enumerate(stream, 1):
            text = _decode(f"{path}, line {number:,},", line)
            yield text.removeprefix("\ufeff") if number == 1 else text


def _unpacked(file: IO[bytes], compression: str) -> Iterable[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, compression))


def _text_rows(path: Path, text_field: str) -> Iterator[tuple[str, Row]]:
    # so that copies of WikiText with CRLF give the same rows as the original
    text = re.sub("\r\n?", "\n", "".join(_lines(path)))
    # a WikiText file begins with a heading, " = Robert Boulter = "
    rows = wikitext_rows(text) if re.match(r"\s* = .+ = \n", text) else [text]
    return (("", row) for row in rows)


def _json_rows(path: Path, text_field: str) -> Iterator[tuple[str, Row]]:
    for where, record in json_records(path):
        if not isinstance(record, dict):
            yield where, _row(f"{path}, {where}", "a record", record)
            continue
        field = _field(record, text_field)
        if field is None:
            yield where, Empty(f"no '{text_field}' (found: {_clipped(', '.join(record))})")
        else:
            yield where, _row(f"{path}, {where}", f"'{field}'", record[field], field == text_field)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(path: Path, line: int, text: str) -> Any:
    """Parse `text`, which begins at `line` of the file. Raises GraspError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')} at character {error.colno:,}"
        raise GraspError(f"{path}, line {line + error.lineno - 1:,}: not JSON ({what})") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise GraspError(f"{path}, line {line:,}: cannot be read ({reason(error)})") from None


def _csv_rows(path: Path, text_field: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(CSV_CELL)
    separator = "\t" if ".tsv" in path.name.lower() else ","
    rows = csv.reader(_lines(path), delimiter=separator, strict=True)
    try:
        columns = next(rows, [])
        at = columns.index(_column(str(path), text_field, columns, chat=False))
        for row in filter(None, rows):  # skip blank lines
            where = f"line {rows.line_num:,}"
            if len(row) != len(columns):
                raise GraspError(
                    f"{path}, {where}: {len(row)} cells, and the head names {len(columns)} "
                    "columns: put quotes around texts that hold the separator"
                )
            yield where, row[at] or Empty(f"'{text_field}' is empty")
    except csv.Error as error:
        raise GraspError(f"{path}, line {rows.line_num:,}: not CSV ({reason(error)})") from None


def _parquet_rows(path: Path, text_field: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        field = _column(str(path), text_field, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                where = f"row {number:,}"
                yield where, _row(f"{path}, {where}", f"'{field}'", value, field == text_field)
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise GraspError(
            f"cannot read {path} as Parquet ({reason(error)}): it is damaged, or of another kind"
        ) from None


def _dataset_rows(source: Source, text_field: str) -> Iterator[tuple[str, Row]]:
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # its readers may raise anything
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        raise GraspError(
            f"{source.label}, split {source.split}, is neither a file nor a data set that loads "
            f"({reason(cause or error)}): expected {SOURCES}"
        ) from None
    finally:
        datasets.logging.set_verbosity(verbosity)
    field = _column(source.label, text_field, rows.column_names)
    for number, value in enumerate(rows[field]):
        where = f"row {number:,}"
        yield where, _row(f"{source.label}, {where}", f"'{field}'", value, field == text_field)


def _field(names: Iterable[str], text_field: str) -> str | None:
    """The name of the field to read: `text_field`, or a CHAT_FIELDS one if there is no `text`."""
    wanted = (text_field, *CHAT_FIELDS) if text_field == "text" else (text_field,)
    return next((name for name in wanted if name in names), None)


def _column(source: str, text_field: str, columns: Sequence[str], *, chat: bool = True) -> str:
    field = _field(columns, text_field) if chat or text_field in columns else None
    if field is None:
        raise GraspError(
            f"{source} has no column '{text_field}' (found: {_clipped(', '.join(columns))}): "
            "name the right one as `text_field`"
        )
    if list(columns).count(field) > 1:
        raise GraspError(f"{source} has two columns named '{field}': rename one of them")
    return field


def _row(where: str, what: str, value: Any, asked_for: bool = True) -> Row:
    """Check `value` and return it as a row. Plain text must be in the field `asked_for`."""
    if value is None or value == []:
        return Empty(f"{what} is {'null' if value is None else 'empty'}")
    if isinstance(value, list) or (isinstance(value, str) and asked_for):
        return value
    wanted = "a text or a list of messages" if asked_for else "a list of messages"
    raise GraspError(
        f"{where}: {what} holds {type(value).__name__}, not {wanted}: name the right field as "
        "`text_field`"
    )


def _clipped(text: str) -> str:
    """`text` on one line, cut to 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + " ..."
