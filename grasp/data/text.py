"""Text in, token blocks out: the same reading and joining for calibration and for evaluation.

Text is a list of rows (records of a file or a data set) joined by two newlines, which is how
GPTQ, SparseGPT and the papers after them feed WikiText-2 to a model. A plain text file is one row,
except WikiText's own files: their rows are their lines, as in the hub's copy, so that a local
`wiki.test.raw` and the data set `wikitext:wikitext-2-raw-v1:test` give the same string.
No BOS is put anywhere: evaluation adds one to each window when asked.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp.errors import GraspError, reason

ROW_SEPARATOR = "\n\n"
HELD_OUT_BLOCKS = 64
FILE_SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".json", ".parquet")
SOURCES = "a text, .jsonl, .json or .parquet file, or a hub data set as name[:config[:split]]"

Progress = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True, eq=False)
class Corpus:
    """One text as token ids, with what a recipe needs to say where they come from.

    `ids` is int64 [tokens] on the CPU. `sha256` is that of the UTF-8 text (of the int64 ids when
    the model wrote them itself).
    """

    name: str
    ids: Tensor = field(repr=False)
    sha256: str
    split: str | None = None  # of a hub data set

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
    """Read `spec` (see `read_text`) and tokenise all of it in one call, without special tokens."""
    text = read_text(spec, text_field=text_field, split=split)
    # verbose=False: the text is meant to be longer than the model's context
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    hub = None if spec == "builtin" or _is_local(spec) else HubName.parse(spec, split)
    return Corpus(
        name=hub.label if hub else Path(spec).name,
        ids=torch.tensor(ids["input_ids"], dtype=torch.int64),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        split=hub.split if hub else None,
    )


def sample_corpus(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Corpus:
    """Text that the model writes itself (`self`): samples * seq_len ids, no data needed.

    Each sample starts after a BOS, which is not part of it, and is drawn at temperature 1 from the
    whole vocabulary. An EOS is kept and continued after, as in packed training text. Draws are made
    on the CPU from one generator, so the seed means the same on every device.
    """
    start = next(
        (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None
    )
    if start is None:
        raise GraspError(
            "'self' needs a token to start from, and the tokenizer has neither BOS nor EOS: "
            "give text instead"
        )
    generator = torch.Generator().manual_seed(seed)
    written = []
    for first in range(0, samples, batch_size):
        rows = min(batch_size, samples - first)
        written.append(_sample(model, start, rows, seq_len, generator))
        if progress:
            progress(first + rows, samples)
    return Corpus.of_ids("self", torch.cat(written).flatten())


@torch.no_grad()
def _sample(model: Any, start: int, rows: int, seq_len: int, generator: torch.Generator) -> Tensor:
    ids = torch.full((rows, 1), start)
    columns: list[Tensor] = []
    cache = None
    for _ in range(seq_len):
        out = model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        probabilities = out.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.multinomial(probabilities, 1, generator=generator)
        columns.append(ids)
    return torch.cat(columns, dim=1)


def token_blocks(corpus: Corpus, *, seq_len: int, samples: int, seed: int) -> Tensor:
    """`samples` non-overlapping blocks of a corpus, chosen by seed: int64 [samples, seq_len].

    The corpus is cut from its beginning into blocks of `seq_len` tokens (a shorter rest is left
    out) and blocks are drawn without replacement, never those of `held_out_text`. Raises
    GraspError if there are too few.
    """
    if seq_len < 2:
        raise GraspError(f"--seq-len {seq_len} leaves nothing to predict: ask for at least 2")
    if samples < 1:
        raise GraspError(f"--samples {samples} is no sample: ask for at least 1")
    available = corpus.tokens // seq_len
    if samples > available:
        fix = (
            f"pass --samples {available}, a shorter --seq-len"
            if available
            else "a shorter --seq-len"
        )
        raise GraspError(
            f"too little text: {corpus.name} has {corpus.tokens:,} tokens, {available:,} blocks of "
            f"{seq_len}; --samples {samples} needs {samples * seq_len:,} tokens: {fix} or more text"
        )
    blocks, held_out = _held_out(corpus, seq_len, samples)
    rest = blocks[len(held_out) :]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return rest[order[:samples]]


def held_out_text(corpus: Corpus, *, seq_len: int, samples: int) -> Corpus | None:
    """Up to 64 blocks that `token_blocks` never draws, the same for every seed, to evaluate on.

    None where the samples need the whole corpus.
    """
    _, held_out = _held_out(corpus, seq_len, samples)
    if not len(held_out):
        return None
    return Corpus.of_ids(f"{corpus.name}, held-out blocks", held_out.flatten())


def _held_out(corpus: Corpus, seq_len: int, samples: int) -> tuple[Tensor, Tensor]:
    """All blocks of the corpus in one fixed order, and the first of them, set aside."""
    available = corpus.tokens // seq_len
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
    blocks = corpus.ids[: available * seq_len].view(available, seq_len)[order]
    return blocks, blocks[: max(0, min(HELD_OUT_BLOCKS, available - samples))]


def read_text(spec: str, *, text_field: str = "text", split: str = "train") -> str:
    """The text behind `spec`, its rows joined by two newlines.

    `spec` is `builtin` (`builtin_text`), a local file (.jsonl, .json and .parquet by suffix, plain
    UTF-8 text otherwise), or a hub data set or local data set folder `name[:config[:split]]`, read
    by `datasets`; `split` is used where the spec names none. `text_field` is the field or column
    that holds the text. Raises GraspError.
    """
    if spec == "builtin":
        return builtin_text()
    if _is_local(spec):
        rows = _file_rows(Path(spec), text_field)
    else:
        rows = _dataset_rows(HubName.parse(spec, split), text_field)
    text = ROW_SEPARATOR.join(rows)
    if not text.strip():
        raise GraspError(f"{spec} holds no text: expected {SOURCES}")
    if re.search("[\ud800-\udfff]", text):  # JSON can escape them, no tokenizer takes them
        raise GraspError(f"{spec} holds lone surrogates, which are not text: remove them")
    return text


def builtin_text() -> str:
    """English that is on every machine: the language reference and the docstrings of Python itself.

    `pydoc_data.topics` and the top-level modules of the standard library, 1.4 MB under the PSF
    licence. It differs between versions of Python; a recipe records its sha256.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise GraspError("this Python has no pydoc_data: give --calibration") from None

    docstrings = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstrings.append(ast.get_docstring(node) or "")
    return ROW_SEPARATOR.join([*topics.values(), *filter(None, docstrings)])


def wikitext_rows(text: str) -> list[str]:
    """The rows that the hub's copy of a WikiText file has: its lines, blank ones as ""."""
    return [line if line.strip() else "" for line in io.StringIO(text)]


def _is_local(spec: str) -> bool:
    path = Path(spec)
    return path.is_file() or (path.suffix.lower() in FILE_SUFFIXES and not path.is_dir())


def _file_rows(path: Path, text_field: str) -> Iterable[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, text_field)
    if suffix in (".jsonl", ".json"):
        return _json_rows(path, text_field)
    text = _decode(path)
    # a WikiText file begins with a heading, " = Robert Boulter = "
    return wikitext_rows(text) if re.match(r"\s* = .+ = \n", text) else [text]


def _decode(path: Path) -> str:
    try:
        # universal newlines: copies of WikiText with CRLF read as the original
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise GraspError(
            f"{path} is not UTF-8 text (byte {error.start:,}): expected {SOURCES}"
        ) from None
    except FileNotFoundError:
        raise GraspError(f"{path} does not exist: expected {SOURCES}") from None
    except OSError as error:
        raise GraspError(f"cannot read {path} ({error.strerror}): expected {SOURCES}") from None
    if "\0" in text:
        raise GraspError(f"{path} is not text (it holds zero bytes): expected {SOURCES}")
    return text


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where it stands ("line 3") and the value of each record: one a line, or a JSON array's.

    Raises GraspError: no such file, not UTF-8, not JSON.
    """
    text = _decode(path)
    if text.lstrip().startswith("["):
        yield from ((f"record {n}", r) for n, r in enumerate(_parse(path, "array", text), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(path, f"line {number}", line)


def _json_rows(path: Path, text_field: str) -> Iterator[str]:
    for where, record in json_records(path):
        value = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise GraspError(
                f"{path}, {where}: no text in field '{text_field}' (found: {have}); "
                "name the right one with --text-field"
            )
        yield value


def _parse(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise GraspError(f"{path}, {where}: not JSON ({error.msg})") from None


def _parquet_rows(path: Path, text_field: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise GraspError(f"{path} does not exist: expected {SOURCES}") from None
    except (OSError, pyarrow.ArrowInvalid):
        raise GraspError(f"{path} is not a Parquet file: expected {SOURCES}") from None
    if text_field not in file.schema_arrow.names:
        raise _no_column(str(path), text_field, file.schema_arrow.names)
    return _text_column(str(path), text_field, file.read([text_field])[text_field].to_pylist())


@dataclass(frozen=True)
class HubName:
    """`name[:config[:split]]`; slices such as `train[:1%]` are the split's."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, spec: str, default_split: str) -> HubName:
        name, config, split = (*spec.split(":", 2), "", "")[:3]
        return cls(name, config or None, split or default_split)

    @property
    def label(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


def _dataset_rows(hub: HubName, text_field: str) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise GraspError(
            f"{hub.label}, split {hub.split}, is neither a local file nor a data set that loads "
            f"({reason(error)}): expected {SOURCES}"
        ) from None
    if text_field not in rows.column_names:
        raise _no_column(hub.label, text_field, rows.column_names)
    return _text_column(hub.label, text_field, rows[text_field])


def _no_column(source: str, text_field: str, columns: list[str]) -> GraspError:
    return GraspError(
        f"{source} has no column '{text_field}' (found: {', '.join(columns)}): "
        "name the right one with --text-field"
    )


def _text_column(source: str, text_field: str, values: Iterable[Any]) -> list[str]:
    rows = list(values)
    for number, value in enumerate(rows):
        if not isinstance(value, str):
            raise GraspError(
                f"{source}: column '{text_field}' holds {type(value).__name__}, not text, in row "
                f"{number}: name the right one with --text-field"
            )
    return rows
