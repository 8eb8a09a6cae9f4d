"""Whole runs: interrupted at any moment and resumed, repeated, refused; their logs and files."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from importlib import metadata
from itertools import combinations
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from families import save_tiny, tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import grasp
from grasp.budget.budget import Budget
from grasp.cli import main as cli
from grasp.errors import GraspError
from grasp.model.units import UnitSpace
from grasp.run import folder as run
from grasp.run import prune as pipeline
from grasp.run.folder import open_run

SMALL = dict(samples=8, seq_len=32, epochs=2, eval_windows=4, device="cpu")
AT_ONCE = dict(SMALL, method="random", scale_epochs=0)  # nothing is learned

# Forks of a server that has imported everything: a process for each attempt, without its seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "grasp.cli.main",
        "grasp.run.prune",
        "matplotlib.backends.backend_agg",
        "pyarrow.parquet",
        "pytest",
    ]
)


@pytest.fixture(scope="module")
def learned(tiny, text, tmp_path_factory):
    """A run that nothing interrupted."""
    return grasp.prune(tiny, tmp_path_factory.mktemp("run") / "out", calibration=text, **SMALL)


def test_a_checkout_that_is_not_installed_prunes(tiny, text, tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    grasp.prune(tiny, tmp_path / "out", calibration=text, **AT_ONCE)
    made = json.loads((tmp_path / "out/grasp.json").read_text())
    assert made["grasp_version"] == grasp.__version__


def command(model, out, **options):
    """The command line that is `grasp.prune(model, out, **options)`."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return ["prune", str(model), f"--out={out}", *flags]


def start(arguments, stderr=os.devnull, **limits):
    """`grasp ARGUMENTS` in a process of its own, which keeps its state after every step."""
    process = processes.Process(target=_main, args=(arguments, str(stderr)), kwargs=limits)
    process.start()
    return process


def _main(
    arguments,
    stderr,
    *,
    killed=None,
    waits_at=None,
    file_bytes=None,
    state_bytes=None,
    more_memory=None,
    dies=None,
):
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if state_bytes is not None:
        select = pipeline.select

        def select_on_a_full_disk(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (state_bytes, state_bytes))
            return select(*args)

        pipeline.select = select_on_a_full_disk
    if more_memory is not None:
        select = pipeline.select

        def select_within(*args):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + more_memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return select(*args)

        pipeline.select = select_within
    if dies is not None:
        rename = os.rename

        def deadly(source, target):
            if dies == "after":
                rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = deadly
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & sets it to ignore
    torch.set_num_threads(1)
    log, logged = run.Run.log, []

    def log_and_wait(self, **record):
        log(self, **record)
        logged.append(record)
        if waits_at is not None and record.get("stage") == waits_at:
            time.sleep(600)  # for a signal
        if killed is not None:  # (lines, seconds): a machine that is busy kills no later
            time.sleep(0.02)
            if len(logged) == killed[0]:
                signal.setitimer(signal.ITIMER_REAL, killed[1])

    run.Run.log = log_and_wait
    run.SAVE_EVERY, run.SAVING = 0.0, math.inf
    sys.argv = ["grasp", *arguments]
    cli.main()


def records(folder):
    log = Path(folder, "log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run_folder(out):
    return out.with_name(out.name + ".run")


def contents(folder):
    """All that two equal runs have in common: every byte but the times of day."""
    summary = json.loads((folder / "grasp.json").read_text())
    del summary["results"]["seconds"]
    weights = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    return summary, weights


def test_killed_at_random_moments(tiny, text, tmp_path):
    options = dict(SMALL, calibration="self", eval_text=text, eval_seq_len=32, batch_size=2)
    options |= dict(accumulate=2, epochs=12, init_scores="equal", eval_windows=2)
    whole = grasp.prune(tiny, tmp_path / "whole", **options)
    draw, out, killed = random.Random(0), tmp_path / "out", 0
    while killed < 6 and not out.exists():
        moment = draw.randint(2, 9), draw.uniform(0.001, 0.05)
        attempt = start(command(tiny, out, **options), tmp_path / "stderr", killed=moment)
        attempt.join()
        killed += attempt.exitcode == -signal.SIGALRM  # as abrupt as SIGKILL
        said = (tmp_path / "stderr").read_text()
        assert attempt.exitcode in (0, -signal.SIGALRM), said
    assert killed >= 3
    if not out.exists():
        grasp.prune(tiny, out, **options)
    with pytest.raises(GraspError, match="exists already"):
        grasp.prune(tiny, out, **options)
    assert sorted(os.listdir(tmp_path)) == ["out", "stderr", "whole"]
    assert contents(out) == contents(whole.folder)

    log = records(out)
    resumed = sum(r.get("event") == "resumed" for r in log)
    assert 0 < resumed <= killed
    first_step = next(n for n, r in enumerate(log) if r.get("stage") == "learn")
    assert "resumed" in [r.get("event") for r in log[first_step:]]
    for stage in ("learn", "calibrate"):  # a kill costs one step, not the stage
        steps = [r["step"] for r in log if r.get("stage") == stage]
        assert set(steps) == set(range(1, steps[-1] + 1))
        assert len(steps) <= steps[-1] + resumed


@pytest.mark.parametrize(
    ("number", "code", "stopped"),
    [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_stopped_by_a_signal(tiny, text, tmp_path, learned, number, code, stopped):
    out, stderr = tmp_path / "out", tmp_path / "stderr"
    arguments = command(tiny, out, calibration=text, **SMALL)
    attempt = start(arguments, stderr, waits_at="learn")
    while not any(r.get("stage") == "learn" for r in records(run_folder(out))):
        assert attempt.is_alive()
        time.sleep(0.01)
    os.kill(attempt.pid, number)
    attempt.join()
    assert attempt.exitcode == code
    said = stderr.read_text().strip().splitlines()
    assert said[-1] == f"{stopped}: run the same command again to resume"
    assert "Traceback" not in stderr.read_text()
    assert not out.exists() and run_folder(out).is_dir()

    again = grasp.prune(tiny, out, calibration=text, **SMALL)
    assert contents(again.folder) == contents(learned.folder)
    assert not run_folder(out).exists()


@pytest.mark.parametrize("dies", ["before", "after"])
def test_killed_while_the_result_appears(tiny, text, tmp_path, dies):
    whole = grasp.prune(tiny, tmp_path / "whole", calibration=text, **AT_ONCE)
    out = tmp_path / "out"
    attempt = start(command(tiny, out, calibration=text, **AT_ONCE), dies=dies)
    attempt.join()
    assert attempt.exitcode == -signal.SIGKILL
    assert out.exists() == (dies == "after") and run_folder(out).exists()
    if dies == "before":
        grasp.prune(tiny, out, calibration=text, **AT_ONCE)
    else:
        with pytest.raises(GraspError, match="exists already"):
            grasp.prune(tiny, out, calibration=text, **AT_ONCE)
    assert not run_folder(out).exists()
    assert contents(out) == contents(whole.folder)


def test_the_log(learned):
    log = records(learned.folder)
    events = ["started", "fidelity", "finished"]
    assert [r["event"] for r in log if "event" in r] == events
    stages = list(dict.fromkeys(r["stage"] for r in log if "stage" in r))
    assert stages == ["evaluate dense", "fisher", "learn", "blocks", "calibrate", "evaluate pruned"]
    for stage, steps in (("learn", 16), ("calibrate", 8)):
        told = [r for r in log if r.get("stage") == stage]
        assert [(r["step"], r["steps"]) for r in told] == [(n, steps) for n in range(1, steps + 1)]
        assert told[0]["eta"] is None  # of one report, nobody knows how long its steps took
        assert all(r["eta"] >= 0 for r in told[1:])
        for r in told:
            assert math.isfinite(r["loss"]) and r["tokens_per_second"] > 0
            assert 50e6 < r["peak_memory"] < 100e9  # bytes, whatever the platform counts in
        assert told[-1]["eta"] == 0
    learning = [r for r in log if r.get("stage") == "learn"]
    space, budget = learned.mask.space, learned.summary["budget"]
    for r in learning:
        assert 3 * r["ffn"] + space.layers[0].kv_cost * r["kv"] == r["cost"]
        assert r["cost"] <= r["limit"] <= r["of"] == space.cost
    limits = [r["limit"] for r in learning]  # annealed: from everything to what was asked
    assert limits == sorted(limits, reverse=True)
    assert (limits[0], limits[-1]) == (space.cost, budget["limit"])
    assert [r["time"] for r in log] == sorted(r["time"] for r in log)


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InterruptedError), open_run(out, {}) as first:
        first.remember("fact", lambda: 1)
        with open(run_folder(out) / "log.jsonl", "a") as log:
            log.write('{"time": 1, "st')
        raise InterruptedError
    with open_run(out, {}) as again:
        assert [r["event"] for r in again.records()] == ["started", "resumed"]
    assert [r["event"] for r in records(run_folder(out))] == ["started", "resumed"]


def test_the_time_a_run_lay_stopped_does_not_count(tmp_path):
    stopped = run_folder(tmp_path / "out")
    with pytest.raises(InterruptedError), open_run(tmp_path / "out", {}) as first:
        first.remember("fact", lambda: 1)
        raise InterruptedError
    began = time.time() - 3600
    log = [{"time": began, "event": "started"}, {"time": began + 60, "stage": "learn"}]
    (stopped / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    with open_run(tmp_path / "out", {}) as again:
        assert 60 <= again.seconds() < 3600


def test_a_fact_is_computed_once(tmp_path):
    for expected in (1, 1):
        with pytest.raises(InterruptedError), open_run(tmp_path / "out", {}) as opened:
            assert opened.remember("n", lambda: len(os.listdir(tmp_path))) == expected
            (tmp_path / "more").touch()
            raise InterruptedError


def test_another_configuration_is_refused_with_the_difference(tiny, text, tmp_path):
    out = tmp_path / "out"
    stopped = start(command(tiny, out, calibration=text, **AT_ONCE), dies="before")
    stopped.join()
    before = sorted(run_folder(out).rglob("*"))
    with pytest.raises(GraspError) as refused:
        grasp.prune(tiny, out, calibration=text, **dict(AT_ONCE, seed=7, keep=0.4, samples=9))
    message = str(refused.value)
    assert message.startswith(f"{run_folder(out)} holds an unfinished run of another configuration")
    assert "(budget.asked: 0.5 there, 0.4 now; samples: 8 there, 9 now; seed: 0 there, 7" in message
    assert "remove the folder, or choose another `out`" in message
    assert sorted(run_folder(out).rglob("*")) == before


def test_a_run_of_another_verb_is_refused_in_a_line(tiny, text, tmp_path):
    out = tmp_path / "out"
    start(command(tiny, out, calibration=text, **AT_ONCE), dies="before").join()
    with pytest.raises(GraspError, match=r"unfinished run of another command or release: remove"):
        grasp.sparsify(tiny, out, calibration=text, samples=2, seq_len=32, device="cpu")


def test_damaged_options_of_a_run_are_told(tiny, text, tmp_path):
    out = tmp_path / "out"
    start(command(tiny, out, calibration=text, **AT_ONCE), dies="before").join()
    (run_folder(out) / "config.json").write_text("{")
    with pytest.raises(
        GraspError, match=r"config\.json is damaged \(.*\): remove .* to start anew"
    ):
        grasp.prune(tiny, out, calibration=text, **AT_ONCE)


def test_a_foreign_folder_is_never_touched(tiny, tmp_path):
    notes = run_folder(tmp_path / "out") / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    with pytest.raises(GraspError, match=r"out\.run holds files that are not grasp's"):
        grasp.prune(tiny, tmp_path / "out", seq_len=32)
    assert list(tmp_path.rglob("*")) == [notes.parent, notes]


def test_another_text_under_the_same_name_is_refused(tiny, text, tmp_path):
    out, words = tmp_path / "out", tmp_path / "words.txt"
    words.write_text(text.read_text())
    start(command(tiny, out, calibration=words, **AT_ONCE), dies="before").join()
    words.write_text(text.read_text().replace("stone", "brick"))
    with pytest.raises(GraspError, match="holds an unfinished run of another configuration"):
        grasp.prune(tiny, out, calibration=words, **AT_ONCE)
    words.write_text(text.read_text())
    grasp.prune(tiny, out, calibration=words, **AT_ONCE)


@pytest.mark.parametrize("what", ["evaluation texts", "weights", "threads"])
def test_what_else_a_run_depends_on(what, tiny, text, tmp_path, monkeypatch):
    out, other, model = tmp_path / "out", tmp_path / "other.txt", tmp_path / "model"
    other.write_text(text.read_text().upper())
    shutil.copytree(tiny, model)
    options = AT_ONCE | dict(calibration=text, eval_text=other, eval_seq_len=32)
    start(command(model, out, **options), dies="before").join()
    if what == "evaluation texts":
        other.write_text(text.read_text().replace("stone", "brick"))
    if what == "weights":
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if what == "threads":
        own = pipeline.environment
        monkeypatch.setattr(pipeline, "environment", lambda d: own(d) | {"threads": "77"})
    with pytest.raises(GraspError, match=rf"another configuration \({what}[:.].* now\)"):
        grasp.prune(model, out, **options)


def test_a_folder_in_use_is_refused(tiny, tmp_path):
    out = tmp_path / "out"
    holding = open_run(out, {})
    with holding, pytest.raises(GraspError, match=r"out\.run is in use by another grasp process"):
        grasp.prune(tiny, out, seq_len=32)
    assert run_folder(out).is_dir()


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_an_existing_result_is_never_touched(tiny, tmp_path, make):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(GraspError, match="out exists already: choose another `out` or remove it"):
        grasp.prune(tiny, out, seq_len=32)
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_without_anything_to_resume_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "new" / "parent" / "out", {}):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_gates_start_from_the_ranks_of_fisher(tiny, text, tmp_path):
    fisher, learned = (
        grasp.prune(tiny, tmp_path / m, calibration=text, **AT_ONCE | dict(method=m, lr=1e-9))
        for m in ("fisher", "learned")
    )
    assert torch.equal(fisher.mask.keep, learned.mask.keep)


def test_the_seed_fixes_everything(tiny, text, tmp_path, learned):
    same = grasp.prune(tiny, tmp_path / "same", calibration=text, **SMALL)
    assert contents(same.folder) == contents(learned.folder)
    other = grasp.prune(tiny, tmp_path / "other", calibration=text, seed=1, **SMALL)
    assert other.summary["mask_sha256"] != same.summary["mask_sha256"]


def test_methods(tiny, text, tmp_path, learned):
    masks = {"learned": learned.mask.keep}
    for method in ("random", "magnitude", "fisher"):
        options = dict(AT_ONCE, method=method, calibration=text, ffn_multiple=8)
        result = grasp.prune(tiny, tmp_path / method, **options)
        assert result.summary["recipe"]["method"] == method
        masks[method] = result.mask.keep
    assert all(not torch.equal(a, b) for a, b in combinations(masks.values(), 2))
    # weights know no seed
    options = dict(AT_ONCE, method="magnitude", calibration=text, ffn_multiple=8, seed=1)
    again = grasp.prune(tiny, tmp_path / "again", **options)
    assert torch.equal(again.mask.keep, masks["magnitude"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_refit_end_to_end(tiny, text, tmp_path, dtype):
    options = dict(AT_ONCE, method="magnitude", calibration=text, dtype=dtype)
    plain, ours = (
        grasp.prune(tiny, tmp_path / how, compensate=how, **options) for how in ("none", "refit")
    )
    assert torch.equal(plain.mask.keep, ours.mask.keep)
    before, after = (r.summary["results"]["pruned"]["value"] for r in (plain, ours))
    assert before != after
    steps = [r["step"] for r in records(ours.folder) if r.get("stage") == "refit"]
    assert steps == [1, 2, 3]
    assert "refitted by least squares" in (ours.folder / "README.md").read_text(encoding="utf-8")
    weight = grasp.load(ours.folder, device="cpu")[0].model.layers[0].mlp.down_proj.weight
    assert not torch.equal(weight, weight.bfloat16().float())  # nothing was rounded


@pytest.fixture(scope="module")
def several(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("several") / "out"
    return grasp.prune(tiny, out, keep=(0.7, 0.5), calibration=text, **SMALL)


def test_several_budgets_from_one_choice(tiny, text, tmp_path, learned, several):
    """The smallest is what it is alone; the others are its scores under their own budgets."""
    larger, smallest = several
    assert [r.folder.name for r in several] == ["keep-0.7", "keep-0.5"]
    assert torch.equal(smallest.mask.keep, learned.mask.keep)
    assert contents(smallest.folder)[1] == contents(learned.folder)[1]
    for result, asked in zip(several, (0.7, 0.5), strict=True):
        budget = result.summary["budget"]
        assert budget["obtained"] <= budget["limit"] < budget["obtained"] + 32 * 3
        assert (budget["asked"], budget["chosen_for"]) == (asked, 0.5)
        assert grasp.load(result.folder, device="cpu")[0] is not None
        assert "report.html" in os.listdir(result.folder)
    log = records(larger.folder.parent)
    learning = [r["step"] for r in log if r.get("stage") == "learn"]
    assert learning == list(range(1, 17))  # once
    options = dict(AT_ONCE, calibration=text, method="fisher")
    masks = [r.mask for r in grasp.prune(tiny, tmp_path / "f", keep=(0.7, 0.5), **options)]
    alone = [grasp.prune(tiny, tmp_path / str(k), keep=k, **options).mask for k in (0.7, 0.5)]
    assert [m.digest() for m in masks] == [m.digest() for m in alone]


def test_several_budgets_stopped_and_resumed(tiny, text, tmp_path, several, monkeypatch):
    """A finished budget is not made again."""
    out, apply_mask, left = tmp_path / "out", pipeline.apply_mask, [2]

    def stop(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return apply_mask(*args)

    monkeypatch.setattr(pipeline, "apply_mask", stop)
    options = dict(SMALL, keep=(0.7, 0.5), calibration=text)
    with pytest.raises(KeyboardInterrupt):
        grasp.prune(tiny, out, **options)
    assert not out.exists()
    again = grasp.prune(tiny, out, **options)
    for one, other in zip(again, several, strict=True):
        assert contents(one.folder) == contents(other.folder)
    made = [r["part"] for r in records(out) if r.get("stage") == "calibrate" and r["step"] == 1]
    assert made == ["keep-0.7", "keep-0.5"]
    assert not run_folder(out).exists()


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize(
    "asked", [{"keep": 0.6}, {"params": 90_000}, {"kv_cache": 0.5}], ids=lambda asked: str(*asked)
)
def test_no_more_than_asked(tiny, text, tmp_path, asked, layout):
    options = dict(AT_ONCE, calibration=text, ffn_multiple=4, layout=layout, **asked)
    summary = grasp.prune(tiny, tmp_path / "out", **options).summary
    dense, model = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, tmp_path / "out")
    )
    space, before = UnitSpace.of(model), UnitSpace.of(dense)
    obtained = {
        "keep": space.prunable_params / before.prunable_params,
        "params": sum(p.numel() for p in model.parameters()),
        "kv_cache": space.kv_cache_bytes_per_token() / before.kv_cache_bytes_per_token(),
    }
    ((kind, limit),) = asked.items()
    assert obtained[kind] <= limit
    assert summary["params"]["total_after"] == obtained["params"]
    assert summary["params"]["prunable_after"] == space.prunable_params
    assert summary["widths"]["after"] == [[n.ffn, n.kv_groups] for n in space.layers]
    budget = Budget.of(**asked, ffn_multiple=4, layout=layout)
    assert summary["budget"]["obtained"] == budget.cost(space)
    unspent = budget.limit(before) - budget.cost(space)
    assert 0 <= unspent < budget.step(before)

    code = (tmp_path / "out" / "modeling_grasp.py").exists()
    if layout == "uniform":
        assert len(set(space.layers)) == 1 and not code
        assert type(model).__module__.startswith("transformers.models.")
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    elif kind != "kv_cache":  # whose channels all stay
        assert len(set(space.layers)) > 1 and code


def test_every_source_of_text(tiny, text, tmp_path):
    words = text.read_text()
    (tmp_path / "words.jsonl").write_text(json.dumps({"body": words}))
    pyarrow.parquet.write_table(pyarrow.table({"body": [words]}), tmp_path / "words.parquet")
    masks = {}
    for name in (text, tmp_path / "words.jsonl", tmp_path / "words.parquet", "self"):
        options = dict(AT_ONCE, method="fisher", text_field="body", ffn_multiple=4)
        result = grasp.prune(tiny, tmp_path / "out", calibration=name, **options)
        said = result.summary["calibration"]
        assert said["name"] == Path(name).name
        masks[said["name"]] = result.mask.keep
        assert said["tokens"] == (8 * 32 if name == "self" else len(words))
        (tmp_path / "out").rename(tmp_path / f"out-{said['name']}")
    assert torch.equal(masks["words.txt"], masks["words.jsonl"])
    assert torch.equal(masks["words.txt"], masks["words.parquet"])
    assert not torch.equal(masks["words.txt"], masks["self"])


@pytest.mark.parametrize("verb", ["prune", "several", "sparsify"])
def test_what_verify_would_fail_is_not_published(tiny, text, tmp_path, verb, monkeypatch):
    def go():
        options = dict(calibration=text, samples=8, seq_len=32, eval_windows=4, device="cpu")
        if verb == "sparsify":
            return grasp.sparsify(tiny, out, method="magnitude", **options).folder
        options |= AT_ONCE
        if verb == "prune":
            return grasp.prune(tiny, out, **options).folder
        return grasp.prune(tiny, out, keep=(0.7, 0.5), **options)[1].folder

    def save_damaged(model, tokenizer, folder, record):
        saved = save(model, tokenizer, folder, record)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].roll(1)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return saved

    out, save = tmp_path / "out", pipeline.save_checkpoint
    monkeypatch.setattr(pipeline, "save_checkpoint", save_damaged)
    for _ in range(2):
        with pytest.raises(GraspError, match="is not published, as it would fail") as refused:
            go()
        assert "(files: not as written: model.safetensors; logits: differ by" in str(refused.value)
        assert not out.exists() and (run_folder(out) / "facts" / "dense.json").exists()
    monkeypatch.setattr(pipeline, "save_checkpoint", save)
    made = go()
    assert grasp.load(made, device="cpu")[0] is not None and not run_folder(out).exists()


@pytest.mark.parametrize("verb", [grasp.prune, grasp.sparsify])
def test_what_cannot_be_saved_is_refused_before_the_work(tiny, text, tmp_path, verb, monkeypatch):
    def no_such_file(*_args, **_options):
        raise ValueError("the vocabulary was never written")

    def write_another(tokenizer, folder, **options):
        tokenizer.add_tokens(["def", "café"])
        return write(tokenizer, folder, **options)

    def refusal(model=tiny):
        options = dict(calibration=text, samples=8, seq_len=32, device="cpu")
        with pytest.raises(GraspError) as refused:
            verb(model, tmp_path / "out", show=shown.append, **options)
        assert not any("stage" in record for record in shown)
        assert "out.run" not in os.listdir(tmp_path)
        return str(refused.value)

    shown, tokenizers = [], "transformers.PreTrainedTokenizerFast.save_pretrained"
    write = PreTrainedTokenizerFast.save_pretrained
    monkeypatch.setattr(tokenizers, no_such_file)
    said = refusal()
    assert said.startswith(f"cannot write {tmp_path / 'out.run' / 'checkpoint'} as a result will")
    assert said.endswith("(nothing is computed yet): the vocabulary was never written")
    monkeypatch.setattr(tokenizers, write_another)
    assert refusal().startswith("the tokenizer gives other tokens once it is saved and read again")
    monkeypatch.setattr(tokenizers, write)
    large = tiny_model("llama", dtype=torch.float16)
    for layer in large.model.layers:
        layer.mlp.up_proj.weight.mul_(300)
        layer.mlp.gate_proj.weight.mul_(300)
    large.save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    assert refusal(tmp_path / "large") == (
        "the model's logits are not finite in torch.float16: store the model in bf16 or fp32 first"
    )


def test_a_result_that_overflows_is_not_published(text, tmp_path, monkeypatch):
    """Its perplexity is measured in fp32, where it does not."""

    def shrink_to_large_weights(*args):
        model = apply_mask(*args)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(300)
            layer.mlp.gate_proj.weight.mul_(300)
        return model

    model, apply_mask = save_tiny(tmp_path / "model", dtype=torch.float16), pipeline.apply_mask
    monkeypatch.setattr(pipeline, "apply_mask", shrink_to_large_weights)
    said = "logits: not finite in torch.float16: store the model in bf16 or fp32 first"
    with pytest.raises(GraspError, match=said):
        grasp.prune(model, tmp_path / "out", calibration=text, **AT_ONCE)
    assert sorted(os.listdir(tmp_path)) == ["model", "out.run"]


def test_the_summary_is_grasp_json_and_the_results_are_measured(learned):
    assert learned.summary == json.loads((learned.folder / "grasp.json").read_text())
    results = learned.summary["results"]
    model, tokenizer = grasp.load(learned.folder, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == learned.summary["params"]["total_after"]
    assert results["dense"]["windows"] == results["pruned"]["windows"] == 4
    assert results["dense"]["value"] != results["pruned"]["value"]
    assert tokenizer.decode(tokenizer("stone").input_ids) == "stone"
    assert "pruned to 47.62%" in (learned.folder / "report.html").read_text(encoding="utf-8")
    with safe_open(learned.folder / "model.safetensors", framework="pt") as weights:
        assert weights.get_slice("model.layers.0.mlp.down_proj.weight").get_shape() == [
            64,
            learned.summary["widths"]["after"][0][0],
        ]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9, "length_penalty": 2.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"num_beams": 4, "early_stopping": True, "pad_token_id": 2, "a_key_of_tomorrow": 3},
    ],
)
def test_the_generation_config_goes_along_as_it_is(tiny, text, tmp_path, settings):
    """Some that transformers reads it refuses to write."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(settings))
    pruned = grasp.prune(model, tmp_path / "pruned", calibration=text, **AT_ONCE).folder
    padded = grasp.export(pruned, tmp_path / "padded", to="hf-uniform").path
    options = dict(calibration=text, method="magnitude", samples=8, seq_len=32, eval_windows=4)
    sparse = grasp.sparsify(model, tmp_path / "sparse", device="cpu", **options).folder
    for folder in (pruned, padded, sparse):
        written = json.loads((folder / "generation_config.json").read_text())
        del written["transformers_version"]
        assert written == settings


def test_learning_in_bf16_does_not_round_what_is_saved(tiny, text, tmp_path):
    options = dict(SMALL, method="magnitude", compensate="none", scales="unit", dtype="bf16")
    options |= dict(calibration=text)
    result = grasp.prune(tiny, tmp_path / "out", **options)
    dense, _ = grasp.load(tiny, device="cpu")
    pruned, _ = grasp.load(result.folder, device="cpu")
    assert pruned.dtype == torch.float32
    for (ffn, _), before, after in zip(
        result.mask.layers(), dense.model.layers, pruned.model.layers, strict=True
    ):
        assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight[ffn])
        scales = after.mlp.down_proj.weight / before.mlp.down_proj.weight[:, ffn]
        torch.testing.assert_close(scales, scales[:1].expand_as(scales))  # one a channel, exact


def test_text_to_evaluate_on(tiny, text, tmp_path):
    """Its windows are never longer than the model takes, 256 here."""
    options = dict(AT_ONCE, samples=180, eval_text=text)  # no text is left over
    result = grasp.prune(tiny, tmp_path / "out", calibration=text, **options)
    assert result.summary["results"]["pruned"]["seq_len"] == 256
    assert result.summary["results"]["pruned"]["data"] == "words.txt"


@pytest.mark.parametrize(
    ("limit", "full_at"),
    [
        ({"file_bytes": 300}, "the first file"),
        ({"file_bytes": 2_000}, "the trial"),
        ({"state_bytes": 2_000}, "a state"),
        ({"file_bytes": 100_000}, "weights"),
    ],
)
def test_a_full_disk(tiny, text, tmp_path, learned, limit, full_at):
    out, stderr = tmp_path / "out", tmp_path / "stderr"
    stderr.touch()
    attempt = start(command(tiny, out, calibration=text, **SMALL), stderr, **limit)
    attempt.join()
    said = stderr.read_text()
    print(full_at, said)
    assert attempt.exitcode == 1 and "Traceback" not in said
    assert f"error: cannot write {run_folder(out)}" in said.splitlines()[-1]
    assert not out.exists()
    assert run_folder(out).exists() == (full_at in ("a state", "weights"))

    again = grasp.prune(tiny, out, calibration=text, **SMALL)
    assert contents(again.folder) == contents(learned.folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_runs_out(tiny, text, tmp_path):
    out, stderr = tmp_path / "out", tmp_path / "stderr"
    options = dict(SMALL, seq_len=256, samples=16, batch_size=16, init_scores="equal")
    attempt = start(command(tiny, out, calibration=text, **options), stderr, more_memory=2_000_000)
    attempt.join()
    said = stderr.read_text()
    assert attempt.exitcode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: out of memory on cpu (")
    fix = "run the same with --memory low (now fast) to resume"
    assert said.endswith(f"): {fix}\n") and not out.exists()

    again = grasp.prune(tiny, out, calibration=text, **options, memory="low")
    events = [json.loads(line).get("event") for line in (out / "log.jsonl").open()]
    assert again.mask.keep.any() and "resumed" in events
