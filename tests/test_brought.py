"""Every family that people bring, through every verb: a result, or one line that says why not.

What ran is compared with docs/families.json, of which the tables of the docs are made.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import ran
import torch
from families import BROUGHT, UNTRIED, brought_model, save_brought
from safetensors.torch import save_file
from test_gguf import llama_cpp, log_probabilities

from grasp.budget.budget import Budget
from grasp.budget.projection import Mask
from grasp.checkpoint import probe, verify
from grasp.compress.fold import fold
from grasp.errors import GraspError
from grasp.model import classes
from grasp.model.load import load_model
from grasp.model.units import UnitSpace
from grasp.planning.layouts import least
from grasp.planning.plan import plan

names = pytest.mark.parametrize("name", BROUGHT)
layouts = pytest.mark.parametrize("layout", ["per-layer", "uniform"])
WIDTHS = ("--keep", 0.5, "--ffn-multiple", 8)
SHORT = ("--samples", 2, "--seq-len", 16)
QUICK = (*SHORT, "--epochs", 1, "--scale-epochs", 1, "--eval-windows", 1, "--device", "cpu")
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
    if refusal is not None:
        ran.check(name, layout, transformers="no", why=reason(refusal))
        for fix in refusal.partition(": use ")[2].split(" or "):
            changed = {"--layout": layout, **dict(re.findall(r"(--[\w-]+) ([\w-]+)", fix))}
            advised = sum(changed.items(), ()) if changed != {"--layout": layout} else ()
            assert not advised or tried("plan", model, *WIDTHS, *SHORT, *advised) is None, refusal
        return
    assert tried("verify", "out") is None
    assert tried("show", "out") is None
    assert tried("eval", "out", "--text", text, "--seq-len", 16, "--windows", 1) is None
    tried("export", "out", "--to", "hf-uniform", "--out", "hf-uniform")
    exported = tried("export", "out", "--to", "gguf", "--out", "out.gguf", "--type", "f32")
    if exported is None:
        check_in_llama_cpp("out.gguf", "out")
    kinds = plan(str(model), keep=0.5, ffn_multiple=8, seq_len=16, layout=layout).prunes
    goes = ", ".join(ran.KINDS[kind] for kind in kinds)
    in_llama_cpp = "yes" if exported is None else "no"
    ran.check(name, layout, goes=goes, transformers="yes", **{"llama.cpp": in_llama_cpp})


def reason(refusal):
    """Why, without the name of the model or what to use instead."""
    why = refusal.partition(": use ")[0]
    for named in (r"^--layout [\w-]+ is not possible for \w+: ", r"^\w+ is not supported: "):
        why = re.sub(named, "", why)
    why = re.sub(r"^\w+ has one number of", "its class has one number of", why)
    return why.removesuffix(": grasp cannot prune this model")


def check_in_llama_cpp(file, folder):
    """Log-probabilities after prompts of several lengths are those of transformers."""
    model, _ = load_model(folder, dtype=torch.float32)
    ids = torch.arange(3, 33)[None]
    wanted = model(ids, use_cache=False).logits[0].log_softmax(-1)
    compared = 0
    with llama_cpp(file, context=64) as post:
        for end in range(2, 31, 4):
            found = log_probabilities(post, ids[0, :end].tolist())
            if found is not None:  # the likeliest token is a whole character
                compared += 1
                # of Gemma's GELU it has a table of 16-bit values
                assert (found[:256] - wanted[end - 1]).abs().max() < 0.02 * wanted.std()
    assert compared > 2


READ_WITHOUT_GRASP = """
import json, sys
sys.modules["grasp"] = None  # importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

said = {}
for line in sys.stdin.read().splitlines():
    name, folder = line.split("\t")
    try:
        kept = load_file(f"{folder}/kept.pt")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        sees = config.get_text_config() is not config
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        ids = kept["ids"]
        assert torch.equal(model(ids, use_cache=False).logits, kept["logits"]), "logits differ"
        greedy = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        assert torch.equal(tokens, kept["tokens"]), "tokens differ"
        said[name] = "yes"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def keep_answers(model, folder):
    """What READ_WITHOUT_GRASP expects of the model in that folder."""
    ids = torch.arange(3, 43)[None]
    greedy = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, use_cache=False)
    kept = {
        "ids": ids,
        "logits": model(ids, use_cache=False).logits,
        "tokens": model.generate(ids, attention_mask=torch.ones_like(ids), **greedy),
    }
    save_file({key: value.contiguous() for key, value in kept.items()}, folder / "kept.pt")


def read_without_grasp(folders, cache):
    """name -> "yes", or what differs in a process that cannot import grasp."""
    run = subprocess.run(
        [sys.executable, "-c", READ_WITHOUT_GRASP],
        input="\n".join(f"{name}\t{folder}" for name, folder in folders.items()),
        env={**os.environ, "HF_MODULES_CACHE": str(cache / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_widths_by_layer_load_without_grasp(tmp_path, monkeypatch):
    """All families in one process: its start takes longer than a model."""

    def refuse(*_):
        raise GraspError("a stock class would be chosen where widths happen to be equal")

    monkeypatch.setattr(classes, "_stock_config", refuse)
    folders, said = {}, {}
    for name in BROUGHT:
        try:
            model = brought_model(name)
            space = UnitSpace.of(model)
            after = least(space, Budget.of(keep=0.5, ffn_multiple=8, layout="per-layer"))
            folded = fold(model, Mask.first(space, after))
        except GraspError:
            said[name] = "no"
            continue
        folders[name] = tmp_path / name
        folded.save_pretrained(folders[name])
        keep_answers(folded, folders[name])
    said |= read_without_grasp(folders, tmp_path)
    assert {*said.values()} <= {"yes", "no"}, said
    for name, cell in said.items():
        ran.check(name, "per-layer", remote=cell)


def test_a_family_that_nothing_names_needs_no_code(tried, text, tmp_path):
    """From the command line to a process without grasp, in layers of different widths."""
    source = "".join(file.read_text() for file in (ran.ROOT / "grasp").rglob("*.py")).lower()
    folders = {}
    for name, (prefix, _) in UNTRIED.items():
        assert name not in source and prefix.lower() not in source
        dense, folder = save_brought(tmp_path / f"dense-{name}", name), tmp_path / name
        options = (*WIDTHS, *QUICK, "--protect-first", 1, "--calibration", text)
        assert tried("prune", dense, "--out", folder, *options) is None
        assert tried("eval", folder, "--text", text, "--seq-len", 16, "--windows", 1) is None
        assert tried("verify", folder) is None
        model, _ = load_model(folder, dtype=torch.float32)
        assert type(model).__name__ == f"Grasp{prefix}ForCausalLM"
        keep_answers(model, folder)
        folders[name] = folder
    assert read_without_grasp(folders, tmp_path) == dict.fromkeys(UNTRIED, "yes")


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


def test_the_tables_are_of_what_ran():
    table = ran.read()
    assert table.keys() == BROUGHT.keys()
    ran.check_page(ran.ROOT / "docs" / "runtimes.md", ran.whole(table))
    ran.check_page(ran.ROOT / "README.md", ran.short(table))
