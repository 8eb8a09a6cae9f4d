"""Calibration texts of several parts: their names and weights, their blocks, what is recorded."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from families import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import grasp
from grasp.data.corpus import Corpus
from grasp.data.mixture import Mixture, read_mixture
from grasp.data.parts import Part, find_parts, shares
from grasp.errors import GraspError


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch):
    """a.txt, b.txt and c.txt here, each of one letter."""
    monkeypatch.chdir(tmp_path)
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 4000)


def named(spec: str, samples: int = 20) -> list[tuple[str, float, int]]:
    return [(p.spec, float(p.weight), p.blocks) for p in find_parts(spec, samples)]


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("a.txt", [("a.txt", 1, 20)]),
        ("a.txt:1", [("a.txt", 1, 20)]),
        ("a.txt,b.txt", [("a.txt", 0.5, 10), ("b.txt", 0.5, 10)]),
        ("a.txt, b.txt:0.25", [("a.txt", 0.75, 15), ("b.txt", 0.25, 5)]),
        ("self:.1,builtin", [("self", 0.1, 2), ("builtin", 0.9, 18)]),
        ("self,a.txt,b.txt:4e-1", [("self", 0.3, 6), ("a.txt", 0.3, 6), ("b.txt", 0.4, 8)]),
        ("a.txt:0.1,b.txt:0.2,self:0.7", [("a.txt", 0.1, 2), ("b.txt", 0.2, 4), ("self", 0.7, 14)]),
        ("org/set:config:test,a.txt:0.5", [("org/set:config:test", 0.5, 10), ("a.txt", 0.5, 10)]),
        ("set:config:train[:1%]:0.3,self", [("set:config:train[:1%]", 0.3, 6), ("self", 0.7, 14)]),
        ("set:3.0.0:0.5,set:3.0:train", [("set:3.0.0", 0.5, 10), ("set:3.0:train", 0.5, 10)]),
    ],
)  # fmt: skip
def test_parts_and_weights(spec, found):
    assert named(spec) == found


def test_a_file_with_commas_and_colons_in_its_name_is_one_part(tmp_path):
    (tmp_path / "a,b:0.5").write_text("text")
    assert named("a,b:0.5") == [("a,b:0.5", 1, 20)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.txt:x,b.txt", "the weight of a.txt must be a number above 0 and at most 1, got 'x'"),
        ("a.txt:0,b.txt", "the weight of a.txt must be a number above 0 and at most 1, got '0'"),
        ("a.txt:-0.5,b.txt", "the weight of a.txt must be .* got '-0.5'"),
        ("self:1.5,b.txt", "the weight of self must be .* got '1.5'"),
        ("builtin:nan", "the weight of builtin must be .* got 'nan'"),
        ("a.txt:", "the weight of a.txt must be .* got ''"),
        ("org/set:2", "the weight of org/set must be .* got '2'"),
        ("a.txt:0.7,b.txt:0.7", "the weights of `calibration` must sum to 1, got 1.4"),
        ("a.txt:0.7,b.txt:0.7,c.txt", "must sum to at most 1, got 1.4"),
        ("a.txt:0.7,b.txt:0.2", "`calibration` must sum to 1, got 0.9: give the last"),
        ("a.txt:0.5,b.txt:0.5,c.txt", "sum to 1, which leaves nothing for c.txt"),
        ("a.txt,a.txt:0.3", "`calibration` names a.txt twice"),
        ("a.txt,none.txt", "none.txt does not exist: expected a text"),
        ("a.txt,", "'' names no text"),
        ("a.txt,b.txt:0.01", "`samples=20` leaves no block for b.txt"),
    ],
)  # fmt: skip
def test_bad_parts_name_the_value_and_the_fix(spec, message):
    with pytest.raises(GraspError, match=f"^{message}" if message[0] == "t" else message):
        find_parts(spec, 20)


@pytest.mark.parametrize("verb", ["plan", "prune", "compare", "sparsify"])
def test_every_verb_refuses_them_at_once(verb, refused, tiny):
    out = [] if verb == "plan" else ["--out=out"]
    width = [] if verb == "sparsify" else ["--ffn-multiple=8"]
    message = refused(verb, tiny, *out, *width, "--calibration=builtin:0.7,self:0.7")
    assert message.startswith("the weights of --calibration must sum to 1, got 1.4")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_shares_are_whole_exact_and_next_to_the_ratio(ratio, total):
    weights = [Fraction(part, sum(ratio)) for part in ratio]
    found = shares(weights, total)
    assert sum(found) == total
    assert all(abs(n - w * total) < 1 for n, w in zip(found, weights, strict=True))


def mixture(**blocks: int) -> Mixture:
    """A corpus of 4,000 tokens for each letter: a's are 0, 1, 2, ..., b's 10,000, 10,001, ..."""
    total = sum(blocks.values())
    starts = range(0, 10_000 * len(blocks), 10_000)
    corpora = [
        Corpus(name, start + torch.arange(4000), name)
        for name, start in zip(blocks, starts, strict=True)
    ]
    parts = [Part(name, Fraction(n, total), n) for name, n in blocks.items()]
    return Mixture(tuple(corpora), tuple(parts))


def test_blocks_are_in_proportion_whole_and_from_where_they_say():
    found = mixture(a=30, b=10).blocks(seq_len=10, seed=3)
    assert found.shape == (40, 10)
    assert torch.equal(found - found[:, :1], torch.arange(10).expand(40, 10))
    source = found[:, 0] // 10_000
    assert source.bincount().tolist() == [30, 10]
    for first in range(4, 41, 4):  # in every prefix, too
        assert source[:first].sum() == first // 4


def test_a_part_has_the_blocks_that_it_has_alone():
    found = mixture(a=30, b=10).blocks(seq_len=10, seed=3)
    alone = mixture(a=30).blocks(seq_len=10, seed=3)
    assert torch.equal(found[found[:, 0] < 10_000], alone)


def test_the_seed_decides():
    first, again, other = (mixture(a=30, b=10).blocks(seq_len=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_held_out_blocks_are_in_proportion_and_never_drawn():
    text = mixture(a=90, b=30)
    rest = text.held_out(seq_len=10)
    assert rest.name == "0.75 a, 0.25 b, held-out blocks" and rest.tokens == 640
    assert (rest.ids >= 10_000).sum() == 160
    drawn = {*text.blocks(seq_len=10, seed=0).flatten().tolist()}
    assert not drawn & {*rest.ids.tolist()}


def test_a_part_that_is_used_up_is_not_held_out():
    rest = mixture(a=30, b=400).held_out(seq_len=10)
    assert rest.tokens == 40 and rest.ids.max() < 4000  # 30 / 430 of 64 blocks
    assert mixture(a=400, b=400).held_out(seq_len=10) is None


def test_too_little_text_names_the_part():
    with pytest.raises(GraspError) as error:
        mixture(a=30, b=401).blocks(seq_len=10, seed=0)
    assert str(error.value) == (
        "too little text: b has 4,000 tokens, 400 blocks of 10; its weight 0.93 takes 401: lower "
        "its weight, `samples` or `seq_len`, or use more text"
    )


def test_only_a_run_can_sample_the_models_own_text():
    with pytest.raises(GraspError, match="only `calibration` may be self"):
        read_mixture("a.txt,self", tiny_tokenizer(), samples=4)


def test_what_a_run_records(tiny, text, tmp_path):
    options = dict(method="fisher", scale_epochs=0, ffn_multiple=8, samples=10, seq_len=16)
    spec = f"{text}:0.5,builtin:0.3,self"
    record = grasp.prune(tiny, "out", calibration=spec, device="cpu", **options).record
    said = record.calibration
    assert said["name"] == "0.5 words.txt, 0.3 builtin, 0.2 self"
    assert [(part["name"], part["weight"], part["blocks"]) for part in said["parts"]] == [
        ("words.txt", 0.5, 5),
        ("builtin", 0.3, 3),
        ("self", 0.2, 2),
    ]
    assert len({part["sha256"] for part in said["parts"]} | {said["sha256"]}) == 4
    assert said["tokens"] == sum(part["tokens"] for part in said["parts"])
    assert record.results["pruned"]["data"] == f"{said['name']}, held-out blocks"
    for file in ("README.md", "report.html"):
        page = (tmp_path / "out" / file).read_text()
        assert f"{said['tokens']:,} tokens read, 10 blocks of 16 tokens used: 5 and 3 and 2" in page
    assert json.loads((tmp_path / "out" / "grasp.json").read_text())["calibration"] == said


def test_stopped_and_resumed(tiny, text, tmp_path, monkeypatch):
    options = dict(method="fisher", scale_epochs=0, ffn_multiple=8, samples=10, seq_len=16)
    options |= dict(calibration=f"{text},self", device="cpu")

    def stop(record):
        if record.get("stage") == "fisher":
            raise KeyboardInterrupt

    whole = grasp.prune(tiny, "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        grasp.prune(tiny, "out", show=stop, **options)
    with pytest.raises(GraspError, match="calibration: "):
        grasp.prune(tiny, "out", **{**options, "calibration": f"{text}:0.6,self"})
    assert grasp.prune(tiny, "out", **options).record.calibration == whole.record.calibration
