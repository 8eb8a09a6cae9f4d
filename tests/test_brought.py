"""Every family that people bring, through every verb: a result, or one line that says why not."""

from __future__ import annotations

import re

import pytest
from families import BROUGHT, save_brought

from grasp.checkpoint import probe, verify

names = pytest.mark.parametrize("name", BROUGHT)
layouts = pytest.mark.parametrize("layout", ["per-layer", "uniform"])
WIDTHS = ("--keep", 0.5, "--ffn-multiple", 8)
SHORT = ("--samples", 1, "--seq-len", 16)
QUICK = (*SHORT, "--epochs", 1, "--scale-epochs", 1, "--eval-windows", 1, "--device", "cpu")
REFUSED = {  # in each layout; all others are pruned
    "per-layer": {"bitnet", "gpt-2", "mamba"}
    | {"mixtral", "qwen3-moe", "gpt-oss", "qwen3-next", "granite, hybrid"},  # mixtures of experts
    "uniform": {
        "bitnet",
        "gpt-2",
        "mamba",
        "helium",
        "stablelm",
        "lfm2",
        "qwen2.5-vl, sees images",
        "gemma4, keys as values",
    },
}
LATE = {"gemma4", "gemma4, shared keys"}  # refused by prune, as refit cannot run their layers


@pytest.fixture(scope="session")
def brought(tmp_path_factory):
    """brought(name) is the folder of that model."""
    folders = {}

    def brought(name):
        if name not in folders:
            folders[name] = save_brought(tmp_path_factory.mktemp("brought") / "model", name)
        return folders[name]

    return brought


@pytest.fixture
def tried(call, tmp_path, monkeypatch):
    """tried(*arguments) is None of a command that ends well, or else the line that it ends with."""
    monkeypatch.setattr(  # the verb itself starts a process of seconds for each way to load
        verify, "_in_fresh_process", lambda folder, _: probe.load_and_compare(str(folder), "grasp")
    )
    monkeypatch.chdir(tmp_path)

    def tried(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = call(*arguments)
        if code == 0:
            return None
        assert code == 1 and not out, (out, err)
        assert sorted(tmp_path.rglob("*")) == before
        *_, last = err.splitlines()
        assert err.count("error: ") == 1 and last.startswith("error: "), err
        return last.removeprefix("error: ")

    return tried


@names
@layouts
def test_what_is_planned_is_what_is_pruned(name, layout, brought, tried, text):
    model = brought(name)
    refusal = tried("plan", model, *WIDTHS, *SHORT, "--layout", layout)
    options = (*WIDTHS, *QUICK, "--layout", layout, "--calibration", text)
    late = tried("prune", model, "--out", "out", *options)
    if name in LATE and late is not None:
        assert late.endswith(": use --compensate none")
        assert tried("prune", model, "--out", "out", *options, "--compensate", "none") is None
        late = None
    assert late == refusal
    assert (refusal is None) == (name not in REFUSED[layout]), refusal
    if refusal is not None:
        for fix in refusal.partition(": use ")[2].split(" or "):
            changed = {"--layout": layout, **dict(re.findall(r"(--[\w-]+) ([\w-]+)", fix))}
            advised = sum(changed.items(), ()) if changed != {"--layout": layout} else ()
            assert not advised or tried("plan", model, *WIDTHS, *SHORT, *advised) is None, refusal
        return
    assert tried("verify", "out") is None
    assert tried("show", "out") is None
    assert tried("eval", "out", "--text", text, "--seq-len", 16, "--windows", 1) is None
    for to in ("gguf", "hf-uniform"):
        tried("export", "out", "--to", to, "--out", to)


@names
def test_other_verbs_end_in_a_result_or_a_line(name, brought, tried, text):
    model = brought(name)
    options = ("--pattern", "2:4", *QUICK[:4], *QUICK[8:], "--calibration", text)
    if tried("sparsify", model, "--out", "sparse", *options) is None:
        assert tried("verify", "sparse") is None
    assert tried("eval", model, "--text", text, "--seq-len", 16, "--windows", 1) is None
    assert "is not a grasp checkpoint" in tried("verify", model)
    assert "is not a grasp checkpoint" in tried("show", model)
    for to in ("gguf", "hf-uniform"):
        tried("export", model, "--to", to, "--out", to)
