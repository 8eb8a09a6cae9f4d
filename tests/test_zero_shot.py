"""Zero-shot scores equal their definition, on real documents if there are any."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from families import save_tiny, tiny_model, tiny_tokenizer
from lm_eval.tasks._yaml_loader import load_yaml

import grasp
from grasp.errors import GraspError
from grasp.evaluate.zero_shot import LOCAL_TASKS, evaluate_tasks

# As on the hub: the fields of a data set, and none that it has not.
PIQA = [
    {
        "goal": "Keep bread fresh.",
        "sol1": "Leave it in the sun.",
        "sol2": "Wrap it up.",
        "label": 1,
    },
    {"goal": "Open a jar.", "sol1": "Turn its lid.", "sol2": "Turn its label around.", "label": 0},
    {"goal": "Dry a wet shirt", "sol1": "Hang it out.", "sol2": "Freeze it.", "label": 0},
    {"goal": "Cut paper.", "sol1": "Use a comb of wood.", "sol2": "Use scissors.", "label": 1},
    {"goal": "Cool tea.", "sol1": "Add ice.", "sol2": "Add hot water to it.", "label": 0},
]
FOUR = {"text": ["a stone", "a cow", "the rain", "light"], "label": ["A", "B", "C", "D"]}
NUMBERED = {"text": ["Venus", "the Moon", "Mars"], "label": ["1", "2", "3"]}
ARC = [
    {"question": "Which of these is alive?", "choices": FOUR, "answerKey": "B"},
    {"question": "What goes around the Earth?", "choices": NUMBERED, "answerKey": "2"},
    {"question": "What do plants take from the sun?", "choices": FOUR, "answerKey": "D"},
]
OTHERS = {
    "arc_challenge.test": ARC[0],
    "boolq.validation": {"question": "is it wet", "passage": "Rain falls.", "label": 1},
    "hellaswag.validation": {
        "activity_label": "Cooking",
        "ctx_a": "A man cuts bread.",
        "ctx_b": "he",
        "endings": ["eats it.", "flies.", "is a spoon.", "sings [title] on."],
        "label": "0",
    },
    "openbookqa.test": {"question_stem": "Fire is", "choices": FOUR, "answerKey": "D"},
    "winogrande.validation": {
        "sentence": "The cup did not fit the box as the _ was too big.",
        "option1": "cup",
        "option2": "box",
        "answer": "1",
    },
}
UPSTREAM = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


def write(folder: Path, name: str, records: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    write(folder, "piqa.validation", PIQA)
    write(folder, "arc_easy.test", ARC)
    for name, record in OTHERS.items():
        write(folder, name, [record])
    return folder


@pytest.fixture(scope="module")
def pruned(tiny, text, tmp_path_factory):
    """Layers of different widths."""
    out = tmp_path_factory.mktemp("zero_shot") / "pruned"
    options = dict(samples=8, seq_len=32, method="random", scale_epochs=0, eval_windows=1)
    grasp.prune(tiny, out, calibration=text, device="cpu", **options)
    return out


@torch.no_grad()
def likelihood(model, prompt: str, answer: str) -> float:
    """log p(answer | prompt), one token a byte, in double precision."""
    ids = tiny_tokenizer()(prompt + answer, return_tensors="pt")["input_ids"]
    log_p = model(ids).logits[0].double().log_softmax(-1)
    first = len(prompt.encode())
    return math.fsum(log_p[t - 1, ids[0, t]].item() for t in range(first, ids.shape[1]))


def scores_by_definition(model, documents):
    """acc takes the likelier answer, acc_norm the one that is likelier per character."""
    right = {"acc": [], "acc_norm": []}
    for question, answers, label in documents:
        prompt = f"Question: {question}\nAnswer:"
        found = [likelihood(model, prompt, f" {answer}") for answer in answers]
        per_character = [value / len(text) for value, text in zip(found, answers, strict=True)]
        right["acc"].append(found.index(max(found)) == label)
        right["acc_norm"].append(per_character.index(max(per_character)) == label)
    n = len(documents)
    return {
        metric: (sum(hits) / n, math.sqrt(sum(hits) / n * (1 - sum(hits) / n) / (n - 1)))
        for metric, hits in right.items()
    }


def test_equal_to_the_definition(tiny, data):
    seen = []
    found = evaluate_tasks(
        str(tiny),
        ["piqa", "arc_easy"],
        tasks_data=data,
        batch_size=3,
        device="cpu",
        progress=lambda *step: seen.append(step),
    )
    piqa = [(d["goal"], [d["sol1"], d["sol2"]], d["label"]) for d in PIQA]
    arc = [
        (d["question"], d["choices"]["text"], d["choices"]["label"].index(d["answerKey"]))
        for d in ARC
    ]
    for task, documents in (("piqa", piqa), ("arc_easy", arc)):
        expected = scores_by_definition(tiny_model("llama"), documents)
        assert found.models[0].scores[task].keys() == expected.keys()
        for metric, (value, stderr) in expected.items():
            score = found.models[0].scores[task][metric]
            assert (score.value, score.stderr) == pytest.approx((value, stderr))
    assert seen[-1] == (21, 21) and seen == sorted(seen)  # 5 times 2 answers, and 4 + 3 + 4


@pytest.mark.parametrize("task", sorted(UPSTREAM))
def test_the_tasks_ask_as_those_of_lm_eval(task):
    source = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset"}
    unused = {"tag", "training_split", "should_decontaminate", "doc_to_decontamination_query"}
    ours = load_yaml(LOCAL_TASKS / f"{task}.yaml")
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / UPSTREAM[task])
    # where there is a test split, lm-eval asks that one and not the validation split
    split = "test_split" if theirs.get("test_split") else "validation_split"
    assert ours["dataset_kwargs"]["file"] == f"{task}.{theirs[split]}.jsonl"
    asked = theirs.keys() - source - unused - {"test_split", "validation_split"} | {split}
    assert ours.keys() - source == asked
    for key in asked:
        mine, other = (v.__code__ if callable(v) else v for v in (ours[key], theirs[key]))
        assert mine == other, key


def test_every_task_reads_its_documents(tiny, data):
    assert sorted(UPSTREAM) == sorted(path.stem for path in LOCAL_TASKS.glob("*.yaml"))
    found = evaluate_tasks(str(tiny), sorted(UPSTREAM), tasks_data=data, limit=1, device="cpu")
    with_norm = {"arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa"}
    for task, scores in found.models[0].scores.items():
        assert scores.keys() == ({"acc", "acc_norm"} if task in with_norm else {"acc"})
        assert all(score.value in (0, 1) and score.stderr is None for score in scores.values())


def test_dense_and_pruned_in_one_run(tiny, pruned, data):
    both = evaluate_tasks(
        str(pruned), "piqa, arc_easy", against=str(tiny), tasks_data=data, limit=4, device="cpu"
    )
    for name, scores in zip((pruned, tiny), both.models, strict=True):
        alone = evaluate_tasks(str(name), "piqa,arc_easy", tasks_data=data, limit=4, device="cpu")
        assert alone.models == (scores,) and scores.model == str(name)
        assert (scores.dtype, scores.bos, scores.truncated) == ("float32", False, 0)
    assert [row[:2] for row in both.rows()] == [
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
    ]
    stated = json.loads(json.dumps(both.to_json()))
    assert stated["tasks"]["piqa"].pop("sha256") != stated["tasks"]["arc_easy"].pop("sha256")
    assert stated["tasks"] == {
        "piqa": {
            "version": 1.0,
            "few_shot": 0,
            "documents": 4,
            "documents_available": 5,
            "data": "piqa.validation.jsonl",
            "split": "validation",
        },
        "arc_easy": {
            "version": 1.0,
            "few_shot": 0,
            "documents": 3,
            "documents_available": 3,
            "data": "arc_easy.test.jsonl",
            "split": "test",
        },
    }
    assert stated["settings"] == {
        "limit": 4,
        "batch_size": 1,
        "device": "cpu",
        "softmax": "float32",
        "chat_template": False,
        "seed": 1234,
    }
    assert stated["versions"]["lm_eval"] == version("lm_eval")
    assert both.measured_on() == (
        f"Zero-shot: lm-eval {version('lm_eval')}, score ± standard error; piqa 1.0: "
        "piqa.validation.jsonl, the first 4 of 5 documents, 0-shot; arc_easy 1.0: "
        "arc_easy.test.jsonl, 3 documents, 0-shot; on cpu in float32, no BOS."
    )


def test_what_is_cut_is_counted(data, tmp_path):
    short = save_tiny(tmp_path / "short", max_position_embeddings=48)
    found = evaluate_tasks(str(short), "piqa", tasks_data=data, device="cpu")
    lengths = [
        len(f"Question: {d['goal']}\nAnswer: {d[answer]}") - 1  # the last token is no input
        for d in PIQA
        for answer in ("sol1", "sol2")
    ]
    assert found.models[0].truncated == sum(length > 48 for length in lengths) > 0
    assert "requests truncated" in found.measured_on()


# --- what cannot work ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"device": "gpu"}, "`device` must be cpu, cuda, cuda:1 or auto, got 'gpu'"),
        ({"tasks": "pika"}, r"no task 'pika' \(did you mean piqa\?\) among those that read"),
        ({"tasks": ""}, "no task '' among those that read `tasks_data`: there are arc_challenge"),
        ({"against": "nowhere"}, "no such folder or file: nowhere"),
    ],
)
def test_bad_options(tiny, data, options, message):
    options = {"tasks": "piqa", "tasks_data": data, "device": "cpu", **options}
    with pytest.raises(GraspError, match=message):
        evaluate_tasks(str(tiny), options.pop("tasks"), **options)


GOOD = json.dumps(PIQA[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "has no piqa.validation.jsonl: put it there, one JSON record per line, with the fie",
        ),
        ("\n", "is empty: expected records with the fields goal, sol1, sol2, label"),
        (f"{GOOD}\n[1]\n", r"piqa.validation.jsonl, line 2: no 'goal'; expected a record"),
        (f'{GOOD}\n\n{{"goal": null}}\n', r"line 3: no 'goal'; expected a record with the"),
        (f"{GOOD}\n{{\n", "line 2: not JSON"),
        (
            GOOD.replace(": 1", ": -1"),
            "line 1: label -1 gives no answer; use a split that has them",
        ),
        (
            f"{GOOD}\n{GOOD.replace(': 1', ': []')}",
            "task piqa does not load: .*: check the documents",
        ),
        (GOOD.replace("it up.", 60 * "it up. "), "an answer is empty or longer than the 256"),
    ],
)
def test_documents_that_do_not_fit(tiny, tmp_path, content, message):
    if content is not None:
        (tmp_path / "piqa.validation.jsonl").write_text(content)
    with pytest.raises(GraspError, match=message):
        evaluate_tasks(str(tiny), "piqa", tasks_data=tmp_path, device="cpu")


def test_an_answer_that_is_not_among_the_choices(tiny, tmp_path):
    write(tmp_path, "arc_easy.test", [ARC[0], {**ARC[1], "answerKey": "E"}])
    with pytest.raises(GraspError, match=r"cannot score arc_easy with .*: 'E' is not in list"):
        evaluate_tasks(str(tiny), "arc_easy", tasks_data=tmp_path, device="cpu")


def test_weights_that_are_no_numbers(data, tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight[:] = math.nan
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(GraspError, match="likelihoods that are not numbers: the weights are dam"):
        evaluate_tasks(str(tmp_path), "piqa", tasks_data=data, device="cpu")


def test_without_lm_eval(tiny, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    with pytest.raises(GraspError, match=r"needs lm-eval: pip install 'graspprune\[tasks\]'"):
        evaluate_tasks(str(tiny), "piqa", tasks_data=data, device="cpu")


def test_the_default_is_the_hub(tiny, monkeypatch):
    """lm-eval's whole index, of 14,000 tasks, takes a while to read."""
    command = [sys.executable, "-m", "grasp", "eval", str(tiny), "--tasks=piqa"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tiny.parent / "empty")}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("error: task piqa does not load: ") and "baber/piqa" in done.stderr
    )
    assert "or give local documents as --tasks-data" in done.stderr
    assert done.stderr.count("\n") == 1


# --- lm-eval on its own ---

# The command, but for its index of 14,000 tasks, which takes it 20 s to read.
LM_EVAL = """
import functools, sys
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.tasks.TaskManager = own
sys.argv[0] = "lm_eval"
cli_evaluate()
assert "grasp" not in sys.modules
"""


def test_the_command_line_of_lm_eval(pruned, data, tmp_path):
    """It reads the checkpoint itself, and has no grasp."""
    task = load_yaml(LOCAL_TASKS / "piqa.yaml", resolve_func=False)
    del task["custom_dataset"]
    task["dataset_path"] = "json"
    task["dataset_kwargs"] = {"data_files": {"validation": str(data / "piqa.validation.jsonl")}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.yaml").write_text(yaml.safe_dump(task))
    homes = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    homes["PYTHONUTF8"] = "1"  # it prints arrows
    options = ["--model", "hf", "--tasks", "piqa", "--include_path", tmp_path / "tasks"]
    options += ["--model_args", f"pretrained={pruned},trust_remote_code=True,dtype=float32"]
    options += ["--device", "cpu", "--output_path", tmp_path / "found.json"]
    done = subprocess.run(
        [sys.executable, "-c", LM_EVAL, "run", *options],
        cwd=tmp_path,
        env=os.environ | homes,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    (report,) = tmp_path.glob("found*.json")
    found = json.loads(report.read_text())["results"]["piqa"]
    ours = evaluate_tasks(str(pruned), "piqa", tasks_data=data, device="cpu").models[0]
    for metric, score in ours.scores["piqa"].items():
        assert [found[f"{metric},none"], found[f"{metric}_stderr,none"]] == [
            score.value,
            score.stderr,
        ]
