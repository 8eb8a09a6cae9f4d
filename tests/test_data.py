"""Reading text, joining rows, choosing blocks, and the errors of each."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp.data.blocks import held_out_text, token_blocks
from grasp.data.corpus import Corpus, read_corpus, read_text
from grasp.data.reading import find_source, wikitext_rows
from grasp.data.sampling import sample_corpus
from grasp.errors import GraspError

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2-raw/wiki.test.raw"
HEAD = " \n = Robert Boulter = \n \n Robert Boulter is an English actor . \n \n = = 2004 = = \n"
ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n", "",
        " = = 2004 = = \n"]  # fmt: skip


def corpus_of(tokens: int) -> Corpus:
    return Corpus("notes.txt", torch.arange(tokens), sha256="")


def read(spec: str, text_field: str = "text", split: str = "train", template: str = "") -> str:
    return read_with_notes(spec, text_field, split, template)[0]


def read_with_notes(spec, text_field="text", split="train", template=""):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template or None, "tiny"
    return read_text(find_source(str(spec), split), tokenizer, text_field)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Joining


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.txt"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_wikitext_file_reads_as_the_rows_of_the_hub(tmp_path, name, newline):
    spec = write(tmp_path / name, HEAD.replace("\n", newline))
    assert read(spec) == "\n\n".join(ROWS)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not beside the checkout")
def test_wikitext_2_reads_like_a_data_set_of_its_lines(tmp_path):
    rows = wikitext_rows(WIKITEXT.read_text(encoding="utf-8"))
    assert len(rows) == 4358  # as the hub's viewer says of wikitext-2-raw-v1, split test
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "data/test.parquet")
    text = read(str(WIKITEXT))
    assert text == read(f"{tmp_path / 'data'}::test") == "\n\n".join(rows)


def test_plain_text_is_one_row_as_it_is(tmp_path):
    text = "One line.\nAnother.\n\n\nAn end without a newline"
    assert read(write(tmp_path / "notes.md", text)) == text
    assert read(write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + text.encode())) == text


# Formats


@settings(max_examples=25)
@given(
    rows=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1
    )
)
def test_every_format_gives_the_same_text(tmp_path_factory, rows):
    rows = [*rows, "a word"]
    folder = tmp_path_factory.mktemp("formats")
    records = [{"id": n, "body": row} for n, row in enumerate(rows)]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    write(folder / "a.json", json.dumps(records))
    write(folder / "strings.json", json.dumps(rows))
    write(folder / "a.jsonl", lines)
    write(folder / "a.jsonl.gz", gzip.compress(lines))
    write(folder / "a.jsonl.zst", pa.compress(lines, codec="zstd", asbytes=True))
    write(folder / "lines.json", "\n\n".join(json.dumps(r) for r in records))
    for name, separator in [("a.csv", ","), ("a.tsv", "\t")]:
        table = io.StringIO(newline="")
        csv.writer(table, delimiter=separator).writerows([("id", "body"), *enumerate(rows)])
        write(folder / name, table.getvalue())
    pq.write_table(pa.table({"body": rows}), folder / "a.parquet")
    for file in folder.iterdir():
        assert read(file, "body") == "\n\n".join(rows), file.name


def test_packed_text_is_unpacked(tmp_path):
    text = "One line.\nAnother.\n"
    twice = gzip.compress(text.encode()) * 2  # as `cat a.gz b.gz` writes it
    assert read(write(tmp_path / "a.txt.gz", twice)) == text * 2
    zstd = pa.compress(text.encode(), codec="zstd", asbytes=True)
    assert read(write(tmp_path / "a.zst", zstd)) == text


def test_one_object_over_several_lines_is_one_record(tmp_path):
    spec = write(tmp_path / "pretty.json", json.dumps({"text": "a\nb", "id": 1}, indent=2))
    assert read(spec) == "a\nb"
    write(tmp_path / "pretty.json", '\n{\n "text": "a",\n "id": }')
    with pytest.raises(GraspError, match=r"pretty.json, line 4: not JSON \(Expecting value at"):
        read(spec)


def test_a_cell_may_be_long_and_hold_lines(tmp_path):
    text = "a, b\n" * 40_000
    assert read(write(tmp_path / "a.csv", f'id,text\n1,"{text}"\n\n')) == text


def test_a_pipe_is_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as beside:
        beside.submit(pipe.write_text, "from a pipe")
        assert read(pipe) == "from a pipe"


def test_a_data_set_with_configuration_and_split(tmp_path):
    for config, split, word in [("en", "train", "one"), ("en", "test", "two"), ("de", "test", "x")]:
        (tmp_path / config).mkdir(exist_ok=True)
        rows = "\n".join(json.dumps({"text": f"{word} {n}"}) for n in range(4))
        write(tmp_path / config / f"{split}.jsonl", rows)
    configs = "".join(
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f'  - split: {s}\n    path: "{c}/{s}.jsonl"\n' for s in splits)
        for c, splits in {"en": ["train", "test"], "de": ["test"]}.items()
    )
    write(tmp_path / "README.md", f"---\nconfigs:\n{configs}---\n")
    assert read(f"{tmp_path}:en") == "one 0\n\none 1\n\none 2\n\none 3"
    assert read(f"{tmp_path}:en", split="test").startswith("two 0")
    assert read(f"{tmp_path}:de:test").startswith("x 0")
    assert read(f"{tmp_path}:en:test[1:3]") == "two 1\n\ntwo 2"
    corpus = read_corpus(f"{tmp_path}:en:test", tiny_tokenizer())
    assert (corpus.name, corpus.split) == (f"{tmp_path}:en", "test")
    with pytest.raises(GraspError, match="split dev, is neither a file nor a data set that"):
        read(f"{tmp_path}:en:dev")
    with pytest.raises(GraspError, match=r"has no column 'body' \(found: text\).*`text_field`"):
        read(f"{tmp_path}:en", "body")


def test_the_builtin_corpus_fills_the_default_samples():
    text = read("builtin")
    assert "mutable" in text
    # 512 samples of 512 tokens at four characters a token, the usual rate of English
    assert len(text) > 512 * 512 * 4


# Conversations

CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So."},
]
RENDERED = "<|user|>Why?\n<|assistant|>So.\n"


@pytest.mark.parametrize(
    ("name", "record", "text_field", "rendered"),
    [
        ("a.jsonl", {"messages": TALK}, "text", RENDERED),
        ("a.jsonl", {"messages": TALK, "body": "b"}, "messages", RENDERED),
        ("a.jsonl", {"messages": TALK, "text": "the text"}, "text", "the text"),
        ("a.jsonl", {"messages": "a text"}, "messages", "a text"),
        ("a.json", {"conversations": SHAREGPT}, "text", "<|system|>Be brief.\n" + RENDERED),
        (
            "a.jsonl",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
            "text",
            "<|user|>Why?\n",
        ),
    ],
)
def test_conversations_are_rendered_by_the_chat_template(
    tmp_path, name, record, text_field, rendered
):
    spec = write(tmp_path / name, json.dumps(record, indent=2 if name == "a.json" else None))
    assert read(spec, text_field, template=CHATML) == rendered


def test_a_table_of_conversations_has_no_keys_that_are_null(tmp_path):
    calling = {"role": "assistant", "content": None, "tool_calls": ["f()"]}
    talks = [[*TALK], [TALK[0], calling]]
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls|length }} calls{% endif %};{% endfor %}"
    )
    pq.write_table(pa.table({"messages": talks}), tmp_path / "a.parquet")
    for spec in (tmp_path / "a.parquet", f"{tmp_path}::train"):
        text = read(spec, template=template)
        assert text == "user:Why?;assistant:So.;\n\nuser:Why?;assistant:1 calls;"


def test_a_note_names_the_template(tmp_path):
    spec = write(tmp_path / "a.jsonl", "\n".join([json.dumps({"messages": TALK})] * 3))
    digest = hashlib.sha256(CHATML.encode()).hexdigest()[:12]
    _, notes = read_with_notes(spec, template=CHATML)
    assert notes == (
        f"a.jsonl: 3 conversations are rendered by the chat template of tiny (sha256 {digest})",
    )


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (TALK, "", "a.jsonl, line 1 is a conversation, and the tokenizer of tiny has no chat temp"),
        (TALK, "{{ raise_exception('no users') }}", r"tiny refuses this conversation \(no users\)"),
        (TALK, "{{ messages[7].content + 1 }}", r"line 1: the chat template of tiny refuses"),
        (["Why?"], CHATML, r"expected messages with role and content, .* \(found: str\)"),
        ([{"user": "Why?"}], CHATML, r"expected messages with role and .* \(found: user\)"),
        ([{"role": "user", "content": 7}], CHATML, "a message's content is int, not text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            CHATML,
            "line 1: a message has a part of type image: only text is read",
        ),
        ("Why?", CHATML, r"line 1: 'messages' holds str, not a list of messages: name the right"),
        ({"role": "user"}, CHATML, r"'messages' holds dict, not a list of messages"),
    ],
)
def test_conversations_that_cannot_be_rendered(tmp_path, messages, template, message):
    spec = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    with pytest.raises(GraspError, match=message) as raised:
        read(spec, template=template)
    assert "\n" not in str(raised.value)


# Records without text


def test_records_without_text_are_left_out_and_counted(tmp_path):
    records = [{"text": None}, {"other": 1}, {"text": "a"}, {"text": ""}, {"text": "b"}]
    spec = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    text, notes = read_with_notes(spec)
    assert text == "a\n\n\n\nb"  # an empty text is a row, as in WikiText
    left_out = "2 of 5 records have no text and are left out"
    assert notes == (f"a.jsonl: {left_out} (line 1: 'text' is null)",)
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    text, notes = read_with_notes(tmp_path / "a.parquet")
    assert (text, notes[0][:25]) == ("a", "a.parquet: 1 of 2 records")
    text, notes = read_with_notes(write(tmp_path / "a.csv", "id,text\n1,\n2,a\n3,b\n"))
    assert text == "a\n\nb" and notes[0].endswith("(line 2: 'text' is empty)")
    silent = [{"role": "user", "content": None}]
    records = [{"messages": TALK}, {"messages": []}, {"messages": TALK}, {"messages": silent}]
    spec = write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, records)))
    text, notes = read_with_notes(spec, template=CHATML)
    assert text == f"{RENDERED}\n\n{RENDERED}"
    assert notes[0].startswith("b.jsonl: 2 of 4 records have no text") and "2 conv" in notes[1]


# Bad input

COMPLETE = gzip.compress(b"text " * 100, mtime=0)  # the same in every process


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"empty.txt holds no text: expected"),
        ("blank.txt", " \n\n", r"blank.txt holds no text: expected"),
        ("empty.jsonl", "", r"empty.jsonl holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin.txt is not UTF-8 text \(byte 3\)"),
        ("late.txt", b"a\n" * 50_000 + b"\xe9\n", r"late.txt, line 50,001, is not UTF-8 text"),
        ("wide.txt", "text".encode("utf-16"), r"wide.txt is not UTF-8 text \(byte 0\): convert it"),
        ("half.txt", "caf\xe9".encode()[:-1], r"half.txt is not UTF-8 text"),
        ("zeros.bin", b"GGUF\0\0\0", r"zeros.bin is not text \(it holds zero bytes\)"),
        ("a.jsonl", '{"txt": "b"}', r"no text in 1 of 1 .*line 1: no 'text' \(found: txt\)"),
        (
            "n.jsonl",
            '{"text": null}',
            r"in 1 of 1 records \(line 1: 'text' is null\): name the",
        ),
        ("n.jsonl", '{"text": "a"}\nnull\n{}', r"no text in 2 of 3 records \(line 2: a record is"),
        ("b.jsonl", '{"text": 7}', r"b.jsonl, line 1: 'text' holds int, not a text .*`text_field`"),
        ("c.jsonl", '{"text": "a"}\n{"text', r"c.jsonl, line 2: not JSON \(Unterminated"),
        ("c.jsonl", '{"text\n{"text": "a"}', r"c.jsonl, line 1: not JSON \(Invalid control"),
        ("d.json", '[{"text": "a"}, 7]', r"d.json, record 2: a record holds int, not a text"),
        ("e.json", '\n[{"text": "a"}', r"e.json, line 2: not JSON"),
        ("f.jsonl", '{"text": "a\\ud800"}', r"f.jsonl holds lone surrogates"),
        ("deep.json", "[" * 100_000, r"deep.json, line 1: cannot be read"),
        ("long.jsonl", '{"text": "a"}\n1' + "0" * 5000, r"long.jsonl, line 2: cannot be read"),
        ("a.csv", "body,id\na,1", r"no column 'text' \(found: body, id\): name the right one"),
        ("a.csv", 'x"\ny', r"a.csv has no column 'text' \(found: x\"\)"),
        ("b.csv", "messages\n[]", r"b.csv has no column 'text' \(found: messages\)"),
        ("c.csv", "text,text\na,b", r"c.csv has two columns named 'text'"),
        ("d.csv", "text,id\na, b,1", r"d.csv, line 2: 3 cells, and the head names 2 .*quotes"),
        ("e.csv", 'text\n"a', r"e.csv, line 2: not CSV \(unexpected end of data\)"),
        ("f.csv", b"text\n\xe9", r"f.csv is not UTF-8 text"),
        ("not.parquet", "text", r"not.parquet is not a parquet file, as its name says: expected"),
        ("cut.parquet", "PAR1text", r"cannot read .*cut.parquet as Parquet \(.+\): it is damaged"),
        ("not.txt.gz", "text", r"not.txt.gz is not a gzip file, as its name says"),
        ("cut.gz", COMPLETE[:-9], r"cannot read .*cut.gz \(Truncated compressed stream\)"),
        ("sum.gz", COMPLETE[:-8] + b"12345678", r"cannot read .*sum.gz \(zlib inflate failed"),
        ("bad.zst", b"\x28\xb5\x2f\xfdtext", r"cannot read .*bad.zst \("),
        ("a.parquet.gz", COMPLETE, r"a.parquet.gz is of a kind that is not read: exp"),
        ("a.pdf", "%PDF", r"a.pdf is of a kind that is not read"),
        ("a.txt", b"\0" * 10, r"a.txt is not text \(it holds zero bytes\)"),
    ],
)
def test_bad_files_name_the_value_and_the_fix(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(GraspError, match=message) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"the cat sat on the mat and ran to town {n}" for n in range(400)]
    pq.write_table(pa.table({"body": texts, "id": range(400)}), path)
    with pytest.raises(GraspError, match=r"no column 'text' \(found: body, id\)"):
        read(path)
    with pytest.raises(GraspError, match=r"a.parquet, row 0: 'id' holds int, not a text"):
        read(path, "id")
    content = bytearray(path.read_bytes())
    content[60:2000] = b"\xff" * 1940
    path.write_bytes(content)
    with pytest.raises(GraspError, match=r"cannot read .*a.parquet as Parquet \(.+\)") as raised:
        read(path, "body")
    assert "\n" not in str(raised.value)
    columns = [pa.array(texts), pa.array(texts)]
    pq.write_table(pa.table(columns, names=["text", "text"]), path)
    with pytest.raises(GraspError, match=r"a.parquet has two columns named 'text'"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            "{",
            r"train, is neither a file nor a data set that loads \(.+\): expect",
        ),
        ("a.parquet", "text", r"is neither a file nor a data set that loads \(.*Parquet"),
        ("a.jsonl", '{"body": "a"}', r"has no column 'text' \(found: body\)"),
        ("a.jsonl", '{"text": 7}', r"row 0: 'text' holds int, not a text"),
    ],
)
def test_a_folder_of_bad_files(tmp_path, capfd, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(GraspError, match=message) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)
    assert "Failed" not in capfd.readouterr().err  # nothing is said twice


# What a name means


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"'' names no text: expected a text, .jsonl"),
        (" ", r"' ' names no text"),
        ("self", r"only `calibration` may be self"),
        ("missing.txt", r"missing.txt does not exist: expected a text, .jsonl"),
        ("missing.parquet", r"missing.parquet does not exist: expected a text"),
        ("missing.csv", r"missing.csv does not exist"),
        ("owner/missing.jsonl.GZ", r"owner/missing.jsonl.GZ does not exist"),
        ("missing.zst:train", r"missing.zst:train does not exist"),
        ("./missing", r"./missing does not exist"),
        ("/missing/folder", r"/missing/folder does not exist"),
        ("a text of\nseveral words", r"^a text of several words does not exist"),
        ("a" * 5000, r"^a{200} ... does not exist"),
        ("https://example.org/a.txt", r"https://example.org/a.txt does not exist"),
        ("here.txt:train", r"here.txt is a file, which has no splits"),
        ("bare", r"bare is a folder without data files"),
    ],
)
def test_what_is_a_file_by_its_name_is_not_looked_for_on_the_hub(
    tmp_path, monkeypatch, spec, message
):
    def load_dataset(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.txt", "text")
    Path("bare").mkdir()
    write(Path("bare/README.md"), "no data")
    with pytest.raises(GraspError, match=message):
        read(spec)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("wikitext", ("wikitext", None, "validation")),
        ("allenai/c4:en", ("allenai/c4", "en", "validation")),
        ("owner/chats-2.5::train[:1%]", ("owner/chats-2.5", None, "train[:1%]")),
    ],
)
def test_names_of_the_hub(spec, found):
    source = find_source(spec, "validation")
    assert (source.name, source.config, source.split) == found and source.file is None


def test_a_source_is_found_without_torch():
    code = "import grasp.data.reading, sys; assert not {'torch', 'datasets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Notes


@pytest.mark.parametrize("verb", ["prune", "compare", "sparsify"])
def test_a_run_logs_what_was_left_out_and_rendered(chatty, talk, tmp_path, call, verb):
    at_once = {
        "prune": ["--method=random", "--scale-epochs=0", "--ffn-multiple=8"],
        "compare": ["--keep=0.5", "--methods=random", "--seeds=0", "--scale-epochs=0"],
        "sparsify": ["--method=magnitude"],
    }
    options = [f"--calibration={talk}", "--samples=8", "--seq-len=32", "--eval-windows=2"]
    options.append(f"--eval-text={talk}")
    out = f"--out={tmp_path / 'out'}"
    code, _, err = call(verb, chatty, out, *options, *at_once[verb], "--device=cpu")
    assert code == 0, err
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    notes = [r["text"] for r in map(json.loads, log) if r.get("event") == "note"]
    assert notes[0].startswith("talk.jsonl: 1 of 41 records have no text")
    assert notes[1].startswith("talk.jsonl: 40 conversations are rendered by the chat template of")
    assert notes[2].startswith("talk.jsonl is calibrated on, too: its perplexity")


def test_eval_prints_the_notes(chatty, talk, call):
    options = [f"--text={talk}", "--seq-len=32", "--windows=2", "--device=cpu"]
    code, out, _ = call("eval", chatty, *options)
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("perplexity") and len(lines) == 3
    assert "1 of 41 records have no text" in lines[1] and f"chat template of {chatty}" in lines[2]
    code, out, _ = call("eval", chatty, *options, "--json")
    assert json.loads(out)["notes"] == lines[1:]


def test_eval_looks_for_the_text_before_the_model(refused):
    assert refused("eval", "no/model", "--text=a.csv").startswith("a.csv does not exist")


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(tiny, folder)
    write(folder / "chat_template.jinja", CHATML)
    return folder


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Forty conversations, and a record without any."""
    lines = [json.dumps({"messages": TALK})] * 40 + ["{}"]
    return write(tmp_path_factory.mktemp("talk") / "talk.jsonl", "\n".join(lines))


# Tokens


def test_a_corpus_says_where_it_comes_from(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = read_corpus(write(tmp_path / "a.txt", "long enough"), tokenizer)
    assert not caplog.records
    assert tokenizer.decode(corpus.ids) == "long enough"  # no BOS, no EOS
    assert corpus.to_json() == {
        "name": "a.txt",
        "split": None,
        "tokens": 11,
        "sha256": hashlib.sha256(b"long enough").hexdigest(),
    }
    assert str(corpus) == f"a.txt, 11 tokens, sha256 {corpus.sha256[:12]}"


@given(tokens=st.integers(0, 300), seq_len=st.integers(2, 20), data=st.data())
def test_blocks_are_distinct_and_aligned(tokens, seq_len, data):
    available = tokens // seq_len
    samples = data.draw(st.integers(1, max(available, 1)))
    corpus = corpus_of(tokens)
    if not available:
        with pytest.raises(GraspError, match="0 blocks"):
            token_blocks(corpus, seq_len=seq_len, samples=samples, seed=0)
        return
    blocks = token_blocks(corpus, seq_len=seq_len, samples=samples, seed=0)
    assert blocks.shape == (samples, seq_len)
    starts = blocks[:, 0].tolist()
    assert len(set(starts)) == samples
    assert all(start % seq_len == 0 for start in starts)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(seq_len))


def test_blocks_are_chosen_by_the_seed_and_are_not_the_first_ones():
    first, again, other = (
        token_blocks(corpus_of(1000), seq_len=10, samples=20, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.max() > 200


def test_held_out_text_is_the_same_for_every_seed_and_never_drawn():
    corpus = corpus_of(1005)
    held_out = held_out_text(corpus, seq_len=10, samples=30)
    assert held_out.tokens == 640 and held_out.name == "notes.txt, held-out blocks"
    for seed in range(3):
        drawn = token_blocks(corpus, seq_len=10, samples=30, seed=seed).flatten()
        assert not set(drawn.tolist()) & set(held_out.ids.tolist())
    assert held_out_text(corpus, seq_len=10, samples=90).tokens == 100
    assert held_out_text(corpus, seq_len=10, samples=100) is None


def test_too_little_text_says_how_much_is_needed():
    assert len(token_blocks(corpus_of(29), seq_len=10, samples=2, seed=0)) == 2
    message = (
        "too little text: notes.txt has 29 tokens, 2 blocks of 10; `samples=3` needs 30 tokens: "
        "use `samples=2`, a shorter `seq_len` or more text"
    )
    with pytest.raises(GraspError) as error:
        token_blocks(corpus_of(29), seq_len=10, samples=3, seed=0)
    assert str(error.value) == message
    with pytest.raises(GraspError, match="`seq_len` must be at least 2, got 1"):
        token_blocks(corpus_of(29), seq_len=1, samples=1, seed=0)
    with pytest.raises(GraspError, match="`samples` must be at least 1, got 0"):
        token_blocks(corpus_of(29), seq_len=2, samples=0, seed=0)


# Text that the model writes


def test_self_is_reproducible_whatever_the_seed_says_elsewhere():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    seen = []
    options = {"samples": 5, "seq_len": 6, "batch_size": 2}
    first = sample_corpus(model, tokenizer, seed=3, progress=lambda *p: seen.append(p), **options)
    assert first.tokens == 30
    assert seen == [(2, 5), (4, 5), (5, 5)]
    torch.manual_seed(9)
    assert torch.equal(first.ids, sample_corpus(model, tokenizer, seed=3, **options).ids)
    assert first.sha256 != sample_corpus(model, tokenizer, seed=4, **options).sha256


def test_self_follows_the_model():
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    model.lm_head.weight.mul_(1000)  # nearly greedy, so the ids are the model's argmax
    ids = sample_corpus(model, tokenizer, samples=1, seq_len=8, seed=0).ids
    greedy = model(torch.cat([torch.tensor([tokenizer.bos_token_id]), ids])[None]).logits.argmax(-1)
    assert torch.equal(greedy[0, :-1], ids)


def test_self_without_a_token_to_start_from():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(GraspError, match="'self' needs a token to start from"):
        sample_corpus(tiny_model("llama"), tokenizer, samples=1, seq_len=2, seed=0)
