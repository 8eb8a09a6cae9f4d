"""Reading text, joining rows, choosing blocks, and what is said when that cannot be done."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp.data.text import (
    Corpus,
    held_out_text,
    read_corpus,
    read_text,
    sample_corpus,
    token_blocks,
    wikitext_rows,
)
from grasp.errors import GraspError

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2-raw/wiki.test.raw"
HEAD = " \n = Robert Boulter = \n \n Robert Boulter is an English actor . \n \n = = 2004 = = \n"
ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n", "",
        " = = 2004 = = \n"]  # fmt: skip


def corpus_of(tokens: int) -> Corpus:
    return Corpus("notes.txt", torch.arange(tokens), sha256="")


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Joining


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.txt"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_wikitext_file_reads_as_the_rows_of_the_hub(tmp_path, name, newline):
    spec = write(tmp_path / name, HEAD.replace("\n", newline))
    assert read_text(spec) == "\n\n".join(ROWS)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not beside the checkout")
def test_wikitext_2_reads_like_a_data_set_of_its_lines(tmp_path):
    rows = wikitext_rows(WIKITEXT.read_text(encoding="utf-8"))
    assert len(rows) == 4358  # as the hub's viewer says of wikitext-2-raw-v1, split test
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "data/test.parquet")
    text = read_text(str(WIKITEXT))
    assert text == read_text(f"{tmp_path / 'data'}::test") == "\n\n".join(rows)


def test_plain_text_is_one_row_as_it_is(tmp_path):
    text = "One line.\nAnother.\n\n\nAn end without a newline"
    assert read_text(write(tmp_path / "notes.md", text)) == text
    assert read_text(write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + text.encode())) == text


# Formats


@settings(max_examples=25)
@given(rows=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1))
def test_every_format_gives_the_same_text(tmp_path_factory, rows):
    rows = [*rows, "a word"]
    folder = tmp_path_factory.mktemp("formats")
    records = [{"id": n, "body": row} for n, row in enumerate(rows)]
    write(folder / "a.json", json.dumps(records))
    write(folder / "a.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    write(folder / "lines.json", "\n\n".join(json.dumps(r) for r in records))
    pq.write_table(pa.table({"body": rows}), folder / "a.parquet")
    for name in ("a.json", "a.jsonl", "lines.json", "a.parquet"):
        assert read_text(str(folder / name), text_field="body") == "\n\n".join(rows)


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
    assert read_text(f"{tmp_path}:en") == "one 0\n\none 1\n\none 2\n\none 3"
    assert read_text(f"{tmp_path}:en", split="test").startswith("two 0")
    assert read_text(f"{tmp_path}:de:test").startswith("x 0")
    assert read_text(f"{tmp_path}:en:test[1:3]") == "two 1\n\ntwo 2"
    corpus = read_corpus(f"{tmp_path}:en:test", tiny_tokenizer())
    assert (corpus.name, corpus.split) == (f"{tmp_path}:en", "test")
    with pytest.raises(GraspError, match="split dev, is neither a local file nor a data set that"):
        read_text(f"{tmp_path}:en:dev")
    with pytest.raises(GraspError, match=r"has no column 'body' \(found: text\).*--text-field"):
        read_text(f"{tmp_path}:en", text_field="body")


def test_the_builtin_corpus_fills_the_default_samples():
    text = read_text("builtin")
    assert "mutable" in text
    # 512 samples of 512 tokens at four characters a token, the usual rate of English
    assert len(text) > 512 * 512 * 4


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing.txt does not exist: expected a text, .jsonl"),
        ("missing.parquet", None, r"missing.parquet does not exist: expected a text"),
        ("empty.txt", "", r"empty.txt holds no text: expected"),
        ("blank.txt", " \n\n", r"blank.txt holds no text: expected"),
        ("empty.jsonl", "", r"empty.jsonl holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin.txt is not UTF-8 text \(byte 3\)"),
        ("zeros.bin", b"GGUF\0\0\0", r"zeros.bin is not text \(it holds zero bytes\)"),
        ("not.parquet", "text", r"not.parquet is not a Parquet file: expected"),
        ("a.jsonl", '{"text": "a"}\n\n{"txt": "b"}', r"line 3: no text in field 'text' .*txt"),
        ("b.jsonl", '{"text": 7}', r"b.jsonl, line 1: no text in field 'text'.*--text-field"),
        ("c.jsonl", '{"text": "a"}\n{"text', r"c.jsonl, line 2: not JSON \(Unterminated"),
        ("d.json", '[{"text": "a"}, "b"]', r"d.json, record 2: no text in field 'text'.*str"),
        ("e.json", '[{"text": "a"}', r"e.json, array: not JSON"),
        ("f.jsonl", '{"text": "a\\ud800"}', r"f.jsonl holds lone surrogates"),
    ],
)
def test_bad_files_name_the_value_and_the_fix(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(GraspError, match=message) as raised:
        read_text(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_bad_columns_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", None], "id": [1, 2]}), path)
    with pytest.raises(GraspError, match=r"no column 'text' \(found: body, id\)"):
        read_text(str(path))
    with pytest.raises(GraspError, match="'body' holds NoneType, not text, in row 1"):
        read_text(str(path), text_field="body")


def test_a_folder_that_holds_no_data_set(tmp_path):
    with pytest.raises(GraspError, match="neither a local file nor a data set that loads") as error:
        read_text(str(tmp_path))
    assert "\n" not in str(error.value)


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
        "too little text: notes.txt has 29 tokens, 2 blocks of 10; --samples 3 needs 30 tokens: "
        "pass --samples 2, a shorter --seq-len or more text"
    )
    with pytest.raises(GraspError) as error:
        token_blocks(corpus_of(29), seq_len=10, samples=3, seed=0)
    assert str(error.value) == message
    with pytest.raises(GraspError, match="--seq-len 1 leaves nothing to predict"):
        token_blocks(corpus_of(29), seq_len=1, samples=1, seed=0)
    with pytest.raises(GraspError, match="--samples 0 is no sample"):
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
