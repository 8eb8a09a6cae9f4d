"""The report page of a checkpoint, as HTML and as drawn by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from test_zero_shot import PIQA, write

import grasp
from grasp.checkpoint.record import Record
from grasp.report.page import report_page
from grasp.report.results import add_measured

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RECORD = Record(
    grasp_version="0.1.0",
    model="org/<b>tiny",
    recipe={
        "method": "learned",
        "compensate": "none",
        "samples": 8,
        "seq_len": 16,
        "budget": {"kind": "keep", "asked": 0.5, "layout": "per-layer"},
    },
    seed=0,
    mask_sha256="0" * 64,
    kept=[{"ffn": [*range(40)], "kv": [0, 1]}, {"ffn": [*range(56)], "kv": [0, 1, 2, 3]}],
    versions={"torch": "2.13.0"},
    calibration={"name": "words.txt", "tokens": 4321},
    budget={"obtained": 50, "of": 100},
    params={
        "prunable_before": 1000,
        "prunable_after": 500,
        "total_before": 1200,
        "total_after": 700,
    },
    kv_cache_bytes_per_token={"before": 64, "after": 48},
    widths={"before": [[96, 4], [96, 4]], "after": [[40, 2], [56, 4]]},
    results={"architecture": "GraspLlamaForCausalLM", "weight_bytes": 2800},
)
RECORDS = [
    {"event": "started"},
    *[
        {"stage": "learn", "step": s, "steps": 9, "loss": 5 - s / 3}
        | {"cost": 100 - 5 * s, "limit": 101 - 5 * s, "of": 100}
        for s in range(1, 10)
    ],
    *[{"stage": "calibrate", "step": s, "steps": 4, "loss": 3.0} for s in range(1, 5)],
]


class Reader(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_stands_alone():
    page = Reader(report_page(RECORD, RECORDS))
    for part in ("pruned to 50.00%", "1,000", "500", "4,321 tokens", "trust_remote_code", "0.5"):
        assert part in page.text, part
    assert page.tags.count("svg") == 2 and "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "<b>tiny" in page.text  # as written: no name becomes markup
    assert report_page(RECORD, RECORDS) == report_page(RECORD, RECORDS)


def test_what_was_not_learned_or_measured_is_not_drawn():
    page = Reader(report_page(RECORD, RECORDS[:1]))
    assert page.tags.count("svg") == 1 and "perplexity" not in page.text
    result = dict(value=20.0, data="words.txt", split="test", windows=3, seq_len=16, bos=False)
    measured = RECORD.measured(dense={**result, "value": 10.0}, pruned=result)
    text = Reader(report_page(measured, RECORDS)).text
    assert "2.00 x" in text and "words.txt, split test, 3 windows of 16 tokens" in text
    measured = measured.measured(architecture="LlamaForCausalLM")
    assert "trust_remote_code" not in Reader(report_page(measured, RECORDS)).text


def test_sizes_are_those_of_the_weights():
    text = Reader(report_page(RECORD, RECORDS)).text
    assert "2,800 bytes" in text and "dense 4,800 · 0.58 x" in text
    assert "tokens/s" not in text and "Zero-shot" not in text


def test_recorded_results_are_in_every_file(call, tiny, text, tmp_path):
    out = tmp_path / "out"
    options = dict(method="random", scale_epochs=0, samples=8, seq_len=32, eval_windows=1)
    grasp.prune(tiny, out, calibration=text, device="cpu", **options)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    write(tmp_path, "piqa.validation", PIQA)
    common = [out, "--against", tiny, "--device=cpu", "--record"]
    shape = ["--batch-sizes=2", "--prompt-lens=6", "--tokens=2", "--repetitions=2"]
    for command in (
        ["eval", *common, "--tasks=piqa", "--tasks-data", tmp_path],
        ["bench", *common, *shape],
        ["bench", *common, *shape],  # the second takes the place of the first
    ):
        code, _, err = call(*command)
        assert code == 0, err

    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    changed = {name for name in after if after[name] != before[name]}
    assert after.keys() == before.keys() and changed == {"README.md", "grasp.json", "report.html"}
    stored = json.loads(after["grasp.json"])
    assert stored.pop("results").items() >= json.loads(before["grasp.json"])["results"].items()
    assert stored.items() <= json.loads(before["grasp.json"]).items()
    page = Reader(after["report.html"].decode())
    assert page.tags.count("svg") == 1  # nothing was learned
    for shown in (page.text, after["README.md"].decode()):
        assert "acc_norm" in shown and "prefill 2 x 6" in shown and "lm-eval" in shown
        assert shown.count("Speed: batch x prompt") == 1
    assert "prefill, 2 x 6" in page.text and "tokens/s" in page.text


def test_one_of_several_results_keeps_its_own_curves(tmp_path):
    """Their log lies in the folder of all."""
    folder = tmp_path / "0.5"
    folder.mkdir()
    (folder / "grasp.json").write_text(json.dumps(RECORD.to_json()))
    (folder / "report.html").touch()
    records = [{**record, "part": part} for part in ("0.5", "0.8") for record in RECORDS]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    measured = {"to_json": {}, "head": ("task",), "rows": [("piqa",)], "measured_on": "so"}
    values = {name: lambda value=value: value for name, value in measured.items()}
    add_measured(folder, "zero_shot", SimpleNamespace(**values))
    stored = Record.read(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == report_page(stored, RECORDS)


def test_only_a_checkpoint_has_a_record(refused, tiny, tmp_path, monkeypatch):
    assert "is not a grasp checkpoint" in refused("bench", tiny, "--device=cpu", "--record")
    assert refused("eval", tiny, "--text=x.txt", "--record", code=2) == (
        "Invalid value: --record is for --tasks, which is not given"
    )
    shutil.copytree(tiny, tmp_path / "out")
    (tmp_path / "out" / "grasp.json").write_text(json.dumps(RECORD.to_json()))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written to" in refused("bench", "out", "--device=cpu", "--record")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it(tmp_path):
    (tmp_path / "report.html").write_text(report_page(RECORD, RECORDS), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-sync", "--disable-quic"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1400"]
    shot = tmp_path / "report.png"
    subprocess.run(
        [CHROMIUM, *options, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    from matplotlib.image import imread

    pixels = (imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (1400, 900)
    for colour in (0x2F6F9F, 0xE4E7EC, 0xC7822B):  # kept, dense, the budget's curve
        rgb = [colour >> 16, colour >> 8 & 255, colour & 255]
        assert (abs(pixels - rgb).max(-1) <= 2).sum() > 50, hex(colour)


def test_labels_are_text():
    assert re.search(r"<text[^>]*>FFN channels</text>", report_page(RECORD, RECORDS))
