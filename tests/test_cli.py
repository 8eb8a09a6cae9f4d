"""The command line: the output of each verb, and one-line errors."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from families import tiny_tokenizer
from rich.console import Console
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import grasp
from grasp.checkpoint import verify as verify_module
from grasp.cli import main as cli
from grasp.cli import output, progress
from grasp.config import PruneConfig, SparsifyConfig
from grasp.errors import GraspError
from grasp.evaluate import perplexity as evaluate
from grasp.planning import plan as planning
from grasp.run import prune as pipeline

SMALL = ["--samples=8", "--seq-len=32", "--epochs=1", "--eval-windows=2", "--device=cpu"]
AT_ONCE = [*SMALL, "--method=random", "--scale-epochs=0"]  # nothing is learned


@pytest.fixture(scope="module")
def pruned(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "pruned[1]"  # brackets mean markup to rich
    options = dict(samples=8, seq_len=32, method="random", scale_epochs=0, eval_windows=2)
    grasp.prune(tiny, out, calibration=text, device="cpu", **options)
    return out


def damaged(tiny, folder, value):
    """The tiny model with `value` for some of its weights."""
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.lm_head.weight[:5] = value
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep=0"], "--keep must be above 0 and at most 1, got 0.0"),
        (["--keep=1.5"], "--keep must be above 0 and at most 1, got 1.5"),
        (
            ["--keep=0.01"],
            "--keep must be at least 0.2858, which one block of every kind in every layer requires",
        ),
        (["--params=1k"], "--params must be between 70,080 and 162,240 for this model, got 1,000"),
        (["--params=7B"], "for this model, got 7,000,000,000"),
        (["--kv-cache=0.1"], "--kv-cache must be at least 0.25, which one block"),
        (["--keep=0.5", "--params=90k"], "--keep and --params are two budgets: give one of them"),
        (["--keep=0.8,0.5", "--params=90k"], "--keep and --params are two budgets: give one"),
        (
            ["--ffn-multiple=7"],
            "--ffn-multiple must divide the widths of this model, 96 among them, got 7",
        ),
        (
            ["--kv-multiple=3"],
            "--kv-multiple must divide the widths of this model, 4 among them, got 3",
        ),
        (["--seq-len=1"], "--seq-len must be at least 2, got 1"),
        (["--seq-len=257"], "--seq-len must be at most 256 for this model, got 257"),
        (["--samples=0"], "--samples must be at least 1, got 0"),
        (["--samples=0", "--calibration=self"], "--samples must be at least 1, got 0"),
        (["--samples=900"], "too little text: words.txt has "),
        (["--epochs=0"], "--epochs must be at least 1, got 0"),
        (["--batch-size=0"], "--batch-size must be at least 1, got 0"),
        (["--accumulate=0"], "--accumulate must be at least 1, got 0"),
        (["--scale-epochs=-1"], "--scale-epochs must be at least 0, got -1"),
        (["--seed=-1"], "--seed must be between 0 and 4294967295, got -1"),
        (["--lr=0"], "--lr must be a finite number above 0, got 0.0"),
        (["--lr=inf"], "--lr must be a finite number above 0, got inf"),
        (
            ["--compensate=refit", "--method=greedy-head-similarity"],
            "--compensate must be none with",
        ),
        (
            ["--samples=2", "--method=greedy-output-approximation"],
            "--samples must be at least 3 with greedy-output-approximation",
        ),
        (["--samples=1"], "--samples must be at least 2 with --compensate"),
        (
            ["--as-published", "--init-scores=fisher"],
            "--as-published sets --init-scores to 'equal', got 'fisher'",
        ),
        (
            ["--as-published", "--ffn-multiple=32"],
            "--as-published sets --ffn-multiple to 1, got 32",
        ),
        (["--method=magic"], "--method must be one of learned, free, fisher, taylor"),
        (["--anneal=2"], "--anneal must be between 0 and 1, got 2.0"),
        (["--device=gpu"], "--device must be cpu, cuda, cuda:1 or auto, got 'gpu'"),
        (["--calibration=no/such.txt"], "no/such.txt does not exist: expected a text, .jsonl"),
        (["--eval-text=none.jsonl"], "none.jsonl does not exist: expected a text, .jsonl"),
        (["--eval-text=none.jsonl", "--calibration=self"], "none.jsonl does not exist: expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_of_prune(refused, tiny, text, options, message):
    options = [f"--calibration={text}", *SMALL, *options]
    assert message in refused("prune", tiny, "--out=new/out", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "MODEL"], "Missing option '--out'."),
        (["prune", "--out=x"], "Missing argument 'MODEL'."),
        (
            ["prune", "MODEL", "--out=x", "--keep=half"],
            "Invalid value for '--keep': expected a number or a list such as",
        ),
        (["prune", "MODEL", "--out=x", "--kep=0.5"], "No such option: --kep"),
        (
            ["plan", "MODEL", "--params=7X"],
            "expected a number such as 3500000000, 3.5B or 120M, got '7X'",
        ),
        (["plan", "MODEL", "--params=1e400B"], "3.5B or 120M, got '1e400B'"),
        (["eval", "MODEL"], "Invalid value: give --text, --tasks or both"),
        (["eval", "MODEL", "--tasks=x", "--bos"], "--bos and --text-field are for --text"),
        (["eval", "MODEL", "--text=x", "--limit=9"], "--limit and --tasks-data are for --tasks"),
        (["prun", "MODEL"], "No such command 'prun'"),
        (["plan", "MODEL", "--samples=1e9"], "Invalid value for '--samples': "),
        (["plan", "MODEL", "--samples=1e9"], "'1e9'"),  # in the words of any release of typer
        (["compare", "MODEL", "--out=x", "--seeds="], "Invalid value for '--seeds': expected a"),
        (["bench", "MODEL", "--batch-sizes=a"], "Invalid value for '--batch-sizes': expected a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(refused, arguments, message):
    assert message in refused(*arguments, code=2)


@pytest.mark.parametrize("out", [".", "file/out"])
def test_no_place_for_the_result(refused, tiny, text, tmp_path, out):
    (tmp_path / "file").touch()
    message = refused("prune", tiny, f"--out={out}", f"--calibration={text}", *SMALL)
    expected = {".": ". exists already: choose another --out or remove it first"}
    assert message.startswith(expected.get(out, "cannot write file/out.run: [Errno 20]"))


def test_no_methods_are_not_all(refused, tiny, text):
    message = refused("compare", tiny, "--out=out", "--methods=", f"--calibration={text}", *SMALL)
    assert message.startswith("--methods must be among learned, ") and message.endswith("got ''")


def test_an_empty_name_is_not_this_folder(refused, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    assert "'' names no model: expected a folder" in refused("plan", "")


def test_a_model_is_no_text(refused, tiny):
    message = refused("prune", tiny, "--out=out", f"--calibration={tiny}", *SMALL)
    assert message.startswith(f"{tiny} is a model's folder, not a text: expected a text")


def test_a_name_too_long(refused, tiny):
    assert "File name too long" in refused("prune", tiny, "--out=" + 300 * "x", *SMALL)


def test_cuda_where_there_is_none(refused, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("prune", tiny, "--out=out", *SMALL, "--device=cuda")
    assert message == f"device cuda asked for, but torch {torch.__version__} sees no GPU"


def test_the_devices_of_eval(refused, tiny, text):
    options = [f"--text={text}", "--device=gpu"]
    assert "--device must be cpu, cuda, cuda:1 or auto, got 'gpu'" in refused(
        "eval", tiny, *options
    )


# --- models and text ---


def write_model(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=256)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=256)),
            "GPT2LMHeadModel is not supported: it has no list of decoder layers",
        ),
        (
            MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=2)),
            "--keep must be at least 0.9005, which one block of every kind in every layer requires",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_architectures(refused, text, tmp_path, model, message):
    write_model(tmp_path / "model", model)
    options = [f"--calibration={text}", "--ffn-multiple=8", *SMALL]
    assert message in refused("prune", "model", "--out=out", *options)


def test_no_such_model(refused):
    for verb in (["prune", "nowhere", "--out=out"], ["plan", "nowhere"]):
        assert refused(*verb).startswith("no such folder or file: nowhere (a model on the hub")
    assert "nowhere" in refused("eval", "nowhere", "--text=builtin")


def test_weights_that_could_run_code(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    message = refused("prune", "model", "--out=out")
    assert message.startswith("model has only pickle weights (pytorch_model.bin)")
    assert "convert them to safetensors" in message


def test_an_empty_text(refused, tiny, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for verb in (["prune", tiny, "--out=out", "--calibration=empty.txt", *SMALL], None):
        arguments = verb or ["eval", tiny, "--text=empty.txt", "--device=cpu"]
        assert refused(*arguments).startswith("empty.txt holds no text: expected a text, .jsonl")


def test_a_text_too_short_to_evaluate_on(refused, tiny, text, tmp_path):
    (tmp_path / "short.txt").write_text("one two three")
    options = [f"--calibration={text}", "--eval-text=short.txt", *AT_ONCE]
    message = refused("prune", tiny, "--out=out", *options)
    assert message.startswith("too little text: short.txt has 13 tokens, 0 windows of 256; ")


def test_the_wrong_field(refused, tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "words"}\n')
    message = refused("prune", tiny, "--out=out", "--calibration=rows.jsonl", *SMALL)
    assert "no 'text' (found: body)): name the right field as --text-field" in message


def test_what_is_no_checkpoint(refused, tiny):
    for verb in ("show", "verify"):
        assert "no" in refused(verb, tiny) and "grasp.json" in refused(verb, tiny)


# --- machines ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(refused, tiny, text, tmp_path, value):
    damaged(tiny, tmp_path / "model", value)
    for calibration in (text, "self"):
        message = refused("prune", "model", "--out=out", f"--calibration={calibration}", *SMALL)
        assert message == (
            "model is damaged: lm_head.weight holds NaN or infinite values: download it again"
        )
    message = refused("eval", "model", f"--text={text}", "--device=cpu")
    assert message.startswith("the loss is nan after window 1 of ")


def test_logits_that_overflow(refused, tiny, text, tmp_path):
    damaged(tiny, tmp_path / "model", 1e38)
    message = refused("prune", "model", "--out=out", f"--calibration={text}", *SMALL)
    assert message.startswith("the model's logits are not finite in torch.float32: the weights are")
    message = refused("eval", "model", f"--text={text}", "--device=cpu", "--windows=2")
    assert message.startswith("the loss is ") and " after window 1 of 2: the weights" in message


@pytest.mark.parametrize(
    "options", ["--init-scores=equal", "--init-scores=fisher", "--method=fisher"]
)
def test_a_loss_that_overflows_while_learning(call, tiny, text, tmp_path, options, monkeypatch):
    """Though the first look at the model does not show it, and no text is left to measure it on."""
    for look in ("try_saving", "check_fidelity"):
        monkeypatch.setattr(pipeline, look, lambda *_: None)
    damaged(tiny, tmp_path / "model", 1e38)
    (tmp_path / "all.txt").write_text(text.read_text()[: 8 * 32])
    arguments = [f"--out={tmp_path / 'out'}", f"--calibration={tmp_path / 'all.txt'}", *SMALL]
    code, _, err = call("prune", tmp_path / "model", *arguments, options)
    said = err.splitlines()[-1]
    assert code == 1 and "Traceback" not in err and not (tmp_path / "out").exists()
    assert said.startswith("error: the loss is ") and " at step 1: try a smaller --lr" in said


def test_memory_that_runs_out(refused, tiny, text, monkeypatch):
    def forward(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nLess is free")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    said = "CUDA out of memory. Tried to allocate 2 GiB. Less is free"
    reason = f"({said}): lower --batch-size (now 1) or "
    message = refused("prune", tiny, "--out=out", f"--calibration={text}", *SMALL)
    fix = "--seq-len (now 32), or use --dtype bf16; other options need a new start: remove out.run"
    assert message == f"out of memory on cpu {reason}{fix}"
    message = refused("eval", tiny, f"--text={text}", "--device=cpu")
    assert message == f"out of memory on device cpu {reason}--seq-len"


def test_an_error_of_ours_is_not_hidden(call, tiny, text, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(pipeline, "reconstruct", broken)
    options = [f"--out={tmp_path / 'out'}", f"--calibration={text}", *AT_ONCE]
    monkeypatch.setattr(sys, "argv", ["grasp", "prune", str(tiny), *options])
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        cli.main()


def test_ctrl_c(call, tiny, text, monkeypatch):
    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_texts", stopped)
    code, out, err = call("eval", tiny, f"--text={text}")
    assert (code, out) == (130, "")
    assert err.strip() == "stopped"


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "grasp", "prune", "nowhere", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no such folder or file: nowhere")
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


# --- what verbs print ---


def test_help(call):
    code, out, err = call()
    assert (code, err) == (2, "") and "plan" in out
    code, out, _ = call("--help")
    assert code == 0 and all(verb in out for verb in ("prune", "plan", "eval", "verify", "show"))


VERBS = ("prune", "compare", "sparsify", "plan", "eval", "bench", "verify", "show", "export")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(call, verb):
    code, out, err = call(verb, "--help")
    assert (code, err) == (0, "") and "--json" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out and "..." not in out  # nothing is cut off


@pytest.mark.parametrize("kind", [PruneConfig, SparsifyConfig])
def test_every_field_is_an_option(call, kind):
    verb = "prune" if kind is PruneConfig else "sparsify"
    out = call(verb, "--help")[1]
    own = {field.name for field in fields(kind)} - {"model", "budget"}
    assert own <= kind.options().keys()
    assert all(f" --{name.replace('_', '-')} " in out for name in kind.options())


def test_help_has_panels(call):
    out = call("prune", "--help")[1]
    panels = re.split(r"╭─ (\w+) ─+╮", out)
    by_name = dict(zip(panels[1::2], panels[2::2], strict=True))
    for name, option in [
        ("Options", "--keep"),
        ("Learning", "--epochs"),
        ("Learning", "--accumulate"),
        ("Machine", "--device"),
    ]:
        assert f" {option} " in by_name[name]
    for option in (
        "init-scores",
        "anneal",
        "gate-site",
        "schedule",
        "scale-decay",
        "scales",
    ):
        assert f" --{option} " in by_name["Ablation"]
    assert " --eval-text " in by_name["Evaluation"]


def test_version(call):
    assert call("--version") == (0, f"grasp {grasp.__version__}\n", "")


def test_only_what_was_given_reaches_python(call, tiny, monkeypatch):
    seen = {}

    def fake(model, **options):
        seen.update(options)
        raise GraspError(
            "use `layout='uniform'`, not `layout` alone, `model` or `as_published=True`"
        )

    monkeypatch.setattr(planning, "plan", fake)
    code, _, err = call("plan", tiny, "--keep=0.7,0.5", "--layout=per-layer", "--as-published")
    own = dict(dtype="bf16", memory="fast", tokens_per_second=None)
    own |= dict(gpus=None, gpu_memory=None, nodes=1)
    assert code == 1 and seen == dict(keep=[0.7, 0.5], layout="per-layer", as_published=True, **own)
    said = "use --layout uniform, not --layout alone, `model` or --as-published"
    assert err == f"error: {said}\n"


def test_plan_is_for_one_budget(refused, tiny):
    said = refused("plan", tiny, "--keep=0.7,0.5")
    assert said == "--keep must be one number, got [0.7, 0.5]"


def test_prune(call, tiny, text, tmp_path):
    out = tmp_path / "out"
    code, said, err = call("prune", tiny, f"--out={out}", f"--calibration={text}", *SMALL)
    assert code == 0
    dense, after = 129_024, json.loads((out / "grasp.json").read_text())["params"]["prunable_after"]
    assert f"{dense:,}" in said and f"{after:,}" in said and f"{after / dense:.2%}" in said
    assert "Perplexity: words.txt, held-out blocks, 2 windows of 32 tokens" in said
    # where stderr is no terminal, a line for each stage
    stages = [line.partition(":")[0] for line in err.splitlines()]
    own = ["evaluate dense", "fisher", "learn", "blocks", "calibrate", "evaluate pruned"]
    assert stages == own


def test_prune_several(call, tiny, text, tmp_path):
    options = ["--keep=0.7,0.5", f"--out={tmp_path / 'out'}", f"--calibration={text}", *AT_ONCE]
    code, said, err = call("prune", tiny, *options, "--json")
    assert code == 0, err
    assert [summary["budget"]["asked"] for summary in json.loads(said)] == [0.7, 0.5]
    assert call("show", tmp_path / "out" / "keep-0.7")[0] == 0


def test_prune_json(call, tiny, text, tmp_path):
    options = [f"--out={tmp_path / 'out'}", f"--calibration={text}", "--params=120k", *AT_ONCE]
    code, said, _ = call("prune", tiny, *options, "--json")
    summary = json.loads(said)
    assert code == 0 and summary["recipe"]["budget"]["asked"] == 120_000
    assert summary["params"]["total_after"] <= 120_000
    assert [len(layer["ffn"]) for layer in summary["kept"]] == [
        ffn for ffn, _ in summary["widths"]["after"]
    ]


def test_progress_is_one_line_that_changes(call, tiny, text, tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)

    def of_stream(stderr=False):
        return console if stderr else Console()

    monkeypatch.setattr("rich.console.Console", of_stream)
    options = [f"--out={tmp_path / 'out'}", f"--calibration={text}", *SMALL]
    assert call("prune", tiny, *options)[0] == 0
    shown = screen.getvalue()
    for part in ("learn", "loss ", "kept 47.62% of 50.00%", "tokens/s"):  # no time is ever left
        assert part in shown, part
    assert "\x1b[2K" in shown and shown.count("\n") < 12  # the line is rewritten


def test_what_is_printed_may_hold_brackets(capsys):
    with progress.progress() as show:
        show({"event": "note", "stage": "learn", "text": "of /data/[v2]/model and [/y]"})
        show({"stage": "evaluate, notes[v2].txt", "step": 1, "steps": 1})
    output.print_table(("text",), [("notes[v2].txt",)])
    out, err = capsys.readouterr()
    assert "notes[v2].txt" in out
    assert err == "of /data/[v2]/model and [/y]\nevaluate, notes[v2].txt: 1 of 1\n"


@pytest.mark.parametrize(
    ("record", "note"),
    [
        (
            dict(step=3, steps=9, loss=2.5, cost=47, limit=50, of=100)
            | dict(tokens_per_second=812.4, eta=125.0),
            "loss 2.500  kept 47.00% of 50.00%  812 tokens/s  2:05 left",
        ),
        (dict(step=3, steps=9), "3 of 9"),
    ],
)
def test_the_note_beside_a_step(record, note):
    assert progress.note(record) == note


def test_plan(call, tiny):
    code, text, err = call("plan", tiny, "--keep=0.5", "--seq-len=32")
    assert (code, err) == (0, "")
    assert "129,024" in text and "loads in" in text
    code, said, _ = call("plan", tiny, "--keep=0.5", "--seq-len=32", "--json")
    planned = json.loads(said)
    assert code == 0 and planned["prunable"]["before"] == 129_024
    assert planned["prunable"]["after"]["most"] <= 129_024 // 2


def test_plan_and_prune_agree(call, tiny, pruned):
    planned = json.loads(call("plan", tiny, "--seq-len=32", "--json")[1])
    summary = json.loads(call("show", pruned, "--json")[1])
    for name, before, after in (
        ("prunable", "prunable_before", "prunable_after"),
        ("params", "total_before", "total_after"),
    ):
        least, most = (planned[name]["after"][key] for key in ("least", "most"))
        assert planned[name]["before"] == summary["params"][before]
        assert least <= summary["params"][after] <= most


def test_show(call, pruned):
    code, said, err = call("show", pruned)
    assert (code, err) == (0, "")
    summary = json.loads((pruned / "grasp.json").read_text())
    for ffn, kv in summary["widths"]["after"]:
        assert f"{ffn} / 96" in said and "●" * kv + "○" * (4 - kv) in said
    assert "pruned[1]" in "".join(said.split())
    assert said.splitlines()[-1].endswith("fp32, checkpoint re-read from disk.")
    assert json.loads(call("show", pruned, "--json")[1]) == summary


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_all_characters(pruned, tmp_path, encoding):
    folder = tmp_path / "größer"
    folder.symlink_to(pruned)
    done = subprocess.run(
        [sys.executable, "-m", "grasp", "show", folder],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    said = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "????" in said and "checkpoint re-read from disk" in said
    assert ("größer" if encoding == "latin-1" else "gr??er") in said


def test_eval(call, pruned, text):
    options = [f"--text={text}", "--seq-len=64", "--windows=3", "--device=cpu"]
    code, said, _ = call("eval", pruned, *options)
    assert code == 0 and "on words.txt: sequence length 64, the first 3 of" in said
    code, as_json, _ = call("eval", pruned, *options, "--json")
    result = json.loads(as_json)
    assert code == 0 and f"perplexity {result['value']:.2f} " in said


def test_eval_on_tasks_and_text_against_the_dense_model(call, tiny, pruned, text, tmp_path):
    record = {"goal": "Open a jar.", "sol1": "Turn its lid.", "sol2": "Shake it.", "label": 0}
    (tmp_path / "piqa.validation.jsonl").write_text(3 * f"{json.dumps(record)}\n")
    on_tasks = ["--tasks=piqa", f"--tasks-data={tmp_path}", "--limit=2", "--device=cpu"]
    on_text = [f"--text={text}", "--windows=1"]
    code, said, err = call("eval", pruned, f"--against={tiny}", *on_tasks, *on_text)
    assert code == 0 and err.splitlines() == 2 * ["evaluate: 4 of 4"] + 2 * ["evaluate: 1 of 1"]
    first, second, *table, how = said.splitlines()
    assert first.startswith(f"{pruned}: perplexity ") and second.startswith(f"{tiny}: perplexity ")
    assert "the first 2 of 3 documents, 0-shot; on cpu in float32, no BOS." in how
    code, as_json, _ = call("eval", pruned, f"--against={tiny}", *on_tasks, *on_text, "--json")
    found = json.loads(as_json)
    models = [str(pruned), str(tiny)]
    assert [result["model"] for result in found["perplexity"]] == models
    assert [scores["model"] for scores in found["zero_shot"]["models"]] == models
    for scores in found["zero_shot"]["models"]:
        for metric, score in scores["scores"]["piqa"].items():
            row = f"{score['value']:.4f} ± {score['stderr']:.4f}"
            assert any(metric in line and row in line for line in table)


def test_a_task_that_is_not_there(refused, tiny):
    options = ["--tasks=piqa", "--tasks-data=nowhere", "--device=cpu"]
    assert refused("eval", tiny, *options).startswith("--tasks-data nowhere has no piqa.validation")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verify_after_prune(call, tiny, text, tmp_path, dtype):
    """As the stock class: the one way of loading that takes a single process."""
    options = [f"--calibration={text}", *AT_ONCE, "--layout=uniform", f"--dtype={dtype}"]
    assert call("prune", tiny, f"--out={tmp_path / 'out'}", *options)[0] == 0
    code, said, err = call("verify", tmp_path / "out")
    assert (code, err) == (0, ""), said
    checks = said.splitlines()
    assert len(checks) == 8 and all(line.startswith("ok   ") for line in checks)
    assert "bit-equal to the model in memory" in said


def test_verify_after_tampering(call, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(verify_module, "_check_loaded", lambda *_: [])  # a process each
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    assert call("verify", copy)[0] == 0
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    code, said, _ = call("verify", copy)
    assert code == 1 and "FAIL files: not as written: model.safetensors" in said.splitlines()
    code, said, _ = call("verify", copy, "--json")
    assert code == 1 and not json.loads(said)["checks"][0]["passed"]


def test_readme_of_a_checkpoint_names_no_folder_that_is_gone(pruned):
    assert ".run" not in Path(pruned, "README.md").read_text(encoding="utf-8")
