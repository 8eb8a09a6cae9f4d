"""Several texts to evaluate on: each beside the dense model wherever results are shown."""

from __future__ import annotations

import json
import re

import pytest

import grasp
from grasp.checkpoint.record import Record
from grasp.report.page import report_page
from grasp.report.summary import measured_on, model_card, size_rows

SMALL = dict(samples=4, seq_len=32, scale_epochs=0, eval_windows=2, eval_seq_len=64, device="cpu")
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def texts(text, tmp_path_factory):
    """The text of the calibration, and another one."""
    other = tmp_path_factory.mktemp("other") / "other.txt"
    other.write_text(text.read_text().upper())
    return text, other


@pytest.fixture(scope="module")
def made(tiny, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    options = dict(SMALL, method="fisher", ffn_multiple=8, calibration=texts[0], eval_text=texts)
    return grasp.prune(tiny, out, dtype="bf16", **options)  # measured as stored, in fp32


def test_each_text_has_the_figures_that_it_has_alone(made, tiny, texts):
    for (dense, pruned), text in zip(made.record.perplexities, texts, strict=True):
        assert dense["data"] == pruned["data"] == text.name
        for model, found in ((tiny, dense), (made.folder, pruned)):
            alone = grasp.evaluate_text(str(model), str(text), seq_len=64, windows=2, device="cpu")
            assert found == json.loads(json.dumps(alone.to_json()))
    results = made.record.results
    assert (results["dense"], results["pruned"]) == made.record.perplexities[0]
    assert made.record.recipe["eval_text"] == [str(text) for text in texts]


def test_every_report_shows_both(made, call):
    log = [json.loads(line) for line in (made.folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["other_texts"] == made.record.results["other_texts"]
    shown = call("show", made.folder)[1]
    card, page = ((made.folder / name).read_text() for name in ("README.md", "report.html"))
    for dense, pruned in made.record.perplexities:
        a, b = dense["value"], pruned["value"]
        row = ("perplexity, " + dense["data"], f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f} x")
        assert row in size_rows(made.record)
        assert "| " + " | ".join(row) + " |" in card
        assert f"{row[0]}: {row[1]} -> {row[2]} ({row[3]})" in shown
        assert page.count(row[0]) == 2  # a tile and bars
        bars = page[page.index("<h2>Quality</h2>") :]
        shares = re.search(rf"{row[0]}</span>.*?width: ([\d.]+)%.*?width: ([\d.]+)%", bars)
        assert [float(part) for part in shares.groups()] == [
            pytest.approx(100 * value / max(a, b), abs=0.01) for value in (b, a)
        ]
    how = "words.txt, 2 windows; other.txt, 2 windows; of 64 tokens without overlap"
    assert how in measured_on(made.record) and how in card and how in page and how in shown


def test_a_checkpoint_of_one_text_reads_as_before(made, texts):
    content = made.record.to_json()
    del content["results"]["other_texts"]
    content["recipe"]["eval_text"] = str(texts[0])
    old = Record.from_json(content)
    assert len(old.perplexities) == 1
    assert [row[0] for row in size_rows(old)][-1] == "perplexity"
    assert measured_on(old).startswith("Perplexity: words.txt, 2 windows of 64 tokens without")
    assert "other.txt" not in model_card(old) + report_page(old, [])


def test_from_the_command_line(made, tiny, texts, tmp_path, call):
    out, both = tmp_path / "out", [f"--eval-text={text}" for text in texts]
    options = ["--method=fisher", "--ffn-multiple=8", f"--calibration={texts[0]}", *OPTIONS]
    options.append("--dtype=bf16")
    code, said, err = call("prune", tiny, f"--out={out}", *options, *both)
    assert code == 0 and "perplexity, words.txt" in said and "perplexity, other.txt" in said
    assert "evaluate dense, other.txt: 2 of 2" in err
    assert Record.read(out).perplexities == made.record.perplexities


def test_sparsify(tiny, texts, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "scale_epochs"}
    options |= dict(method="magnitude", calibration=texts[0], eval_text=texts)
    record = grasp.sparsify(tiny, tmp_path / "out", **options).record
    assert [pruned["data"] for _, pruned in record.perplexities] == ["words.txt", "other.txt"]


def test_compare_has_a_column_for_each(tiny, texts, tmp_path):
    options = dict(SMALL, methods=("fisher", "random"), keep=(0.7, 0.5), seeds=(0, 1))
    found = grasp.compare(tiny, tmp_path / "out", calibration=texts[0], eval_text=texts, **options)
    page = (found.folder / "README.md").read_text()
    head = re.search(r"^\| method .*$", page, re.MULTILINE).group()
    assert head == (
        "| method | keep 0.7, words.txt | keep 0.7, other.txt | keep 0.5, words.txt | "
        "keep 0.5, other.txt | seconds | peak memory |"
    )
    dense = found.summary["dense"]
    assert dense["other_texts"][0]["data"] == "other.txt"
    own = [c for c in found.summary["cells"] if (c["method"], c["keep"]) == ("fisher", 0.5)]
    values = [c["other_texts"][0]["value"] for c in own]
    ratio = sum(values) / 2 / dense["other_texts"][0]["value"]
    row = re.search(r"^\| fisher .*$", page, re.MULTILINE).group().split(" | ")
    assert row[4] == (f"{sum(values) / 2:.2f} ({min(values):.2f}–{max(values):.2f}), {ratio:.2f} ×")
    assert "words.txt, 2 windows; other.txt, 2 windows; of 64 tokens" in page


def test_eval(made, tiny, texts, call):
    options = ["--seq-len=64", "--windows=2", "--device=cpu", f"--against={tiny}"]
    options += [f"--text={text}" for text in texts]
    code, said, _ = call("eval", made.folder, *options)
    assert code == 0
    assert [line.split(": perplexity ")[0] for line in said.splitlines()] == [
        *[str(made.folder)] * 2,
        *[str(tiny)] * 2,
    ]
    found = json.loads(call("eval", made.folder, *options, "--json")[1])["perplexity"]
    of = [[p["value"] for p in found if p["data"] == text.name] for text in texts]
    assert of == [[b["value"], a["value"]] for a, b in made.record.perplexities]


def test_bad_texts_are_refused_at_once(refused, tiny, texts):
    options = ["--out=out", "--ffn-multiple=8", f"--eval-text={texts[0]}"]
    assert refused("prune", tiny, *options, "--eval-text=none.txt").startswith("none.txt does not")
    said = refused("prune", tiny, *options, f"--eval-text={texts[0]}")
    assert said == f"--eval-text names {texts[0]} twice: give it once"
    said = refused("eval", tiny, f"--text={texts[0]}", "--text=none.txt")
    assert said.startswith("none.txt does not exist")
