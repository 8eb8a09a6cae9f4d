"""Zero-shot accuracy by lm-eval, of one model or of two on the same documents.

Tasks are lm-eval's own, with documents from the hub, or those in tasks/. The latter ask the same
questions, but read local JSON lines: FOLDER/piqa.validation.jsonl and so on, with the fields of the
hub's data set.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from grasp import __version__
from grasp.data.reading import json_records
from grasp.errors import GraspError, install, reason
from grasp.journal import Progress
from grasp.model.load import load_model, packed_errors, pick_device
from grasp.model.source import resolve
from grasp.report.results import add_measured, check_record

LOCAL_TASKS = Path(__file__).parent / "tasks"
SEED = 1234  # lm-eval's own, for drawing few-shot examples
VERSIONS = ("lm_eval", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class Score:
    """One metric of one task, and its standard error (None: one document, or undefined)."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.stderr:.4f}" if self.stderr is not None else "")


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model, as scores[task][metric], and its settings that affect them."""

    model: str
    dtype: str
    bos: bool  # its tokenizer puts a BOS before each text
    truncated: int  # requests cut from the left to the model's limit
    scores: dict[str, dict[str, Score]]


@dataclass(frozen=True)
class ZeroShot:
    """Scores of one or two models, and everything that affects them."""

    models: tuple[ModelScores, ...]
    tasks: dict[str, dict[str, Any]]  # version, few_shot, documents, ..._available, data, sha256
    settings: dict[str, Any]
    versions: dict[str, str]

    def head(self) -> tuple[str, ...]:
        return ("task", "metric", *(model.model for model in self.models))

    def rows(self) -> list[tuple[str, ...]]:
        """Return table rows: (task, metric, score of each model)."""
        return [
            (task, metric, *(str(model.scores[task][metric]) for model in self.models))
            for task, metrics in self.models[0].scores.items()
            for metric in metrics
        ]

    def measured_on(self) -> str:
        """Describe in one line how it was measured."""
        tasks = "; ".join(
            f"{name} {task['version']}: {task['data']}, {_of(task)}, {task['few_shot']}-shot"
            for name, task in self.tasks.items()
        )
        models = "; ".join(dict.fromkeys(_says(model) for model in self.models))
        return (
            f"Zero-shot: lm-eval {self.versions['lm_eval']}, score ± standard error; {tasks}; "
            f"on {self.settings['device']} in {models}."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _of(task: dict[str, Any]) -> str:
    used, available = task["documents"], task["documents_available"]
    part = f"the first {used:,} of {available:,}" if used < available else f"{used:,}"
    return f"{part} documents"


def _says(model: ModelScores) -> str:
    bos = "BOS before each" if model.bos else "no BOS"
    cut = f", {model.truncated:,} requests truncated" if model.truncated else ""
    return f"{model.dtype}, {bos}{cut}"


def evaluate_tasks(
    model: str,
    tasks: str | Sequence[str],
    *,
    against: str | None = None,
    tasks_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    trust_remote_code: bool = False,
    record: bool = False,
    progress: Progress | None = None,
) -> ZeroShot:
    """Score `model`, and `against` if given, on tasks of lm-eval ("piqa,arc_easy" or a list).

    `tasks_data` is a folder of local documents for the tasks in tasks/; without it, documents come
    from the hub and any task of lm-eval may be named. `limit` uses only the first documents of each
    task. Models are loaded in fp32 on a CPU and as stored on a GPU; log-probabilities are fp32 on
    both. No chat template is used. `record` adds the scores to the files of `model`, which must be
    a grasp checkpoint.

    Raises GraspError if lm-eval is not installed, a task is unknown, documents are missing, damaged
    or too long, a model does not load, or its scores are not numbers.
    """
    if batch_size < 1:
        raise GraspError(f"`batch_size` must be at least 1, got {batch_size}")
    device = pick_device(device)
    models = [name for name in (model, against) if name is not None]
    for name in models:
        resolve(name)  # a mistyped name fails before anything is fetched
    if record:
        check_record(Path(model))
    with _reported(progress):
        loaded = _load_tasks(tasks, tasks_data, limit)
        results = [
            _evaluate(name, loaded, limit, batch_size, device, trust_remote_code) for name in models
        ]
    scores = ZeroShot(
        models=tuple(scores for scores, _ in results),
        tasks={
            name: _describe(name, task, results[0][1], tasks_data)
            for name, task in loaded["tasks"].items()
        },
        settings={
            "limit": limit,
            "batch_size": batch_size,
            "device": device,
            "softmax": "float32",
            "chat_template": False,
            "seed": SEED,
        },
        versions={"grasp": __version__, **{package: version(package) for package in VERSIONS}},
    )
    if record:
        add_measured(Path(model), "zero_shot", scores)
    return scores


def check_tasks(
    tasks: str | Sequence[str], tasks_data: str | Path | None, limit: int | None
) -> None:
    """Raise GraspError if `evaluate_tasks` would, before a model is loaded."""
    with _reported(None):
        _load_tasks(tasks, tasks_data, limit)


def read_documents(*, folder: str, file: str, fields: list[str], **_: Any) -> dict[str, Any]:
    """Read the documents of a task in tasks/, by split; lm-eval calls this for its data set.

    `file` is TASK.SPLIT.jsonl, one record per line. Raises GraspError if a record lacks one of
    `fields`.
    """
    import datasets

    path = Path(folder, file)
    if not path.is_file():
        raise GraspError(
            f"`tasks_data` {folder} has no {file}: put it there, one JSON record per line, with "
            f"the fields {', '.join(fields)}"
        )
    records = []
    for where, record in json_records(path):
        values = record if isinstance(record, dict) else {}
        lacking = [field for field in fields if values.get(field) is None]
        if lacking:
            raise GraspError(
                f"{path}, {where}: no '{lacking[0]}'; expected a record with the fields "
                f"{', '.join(fields)}"
            )
        if values.get("label") == -1:  # data sets mark hidden answers of a test split like this
            raise GraspError(
                f"{path}, {where}: label -1 gives no answer; use a split that has them"
            )
        records.append({field: record[field] for field in fields})
    if not records:
        raise GraspError(f"{path} is empty: expected records with the fields {', '.join(fields)}")
    return {file.split(".")[-2]: datasets.Dataset.from_list(records)}


def _load_tasks(
    tasks: str | Sequence[str], data: str | Path | None, limit: int | None
) -> dict[str, Any]:
    """Load lm-eval's tasks and groups of tasks, with their documents."""
    if limit is not None and limit < 1:
        raise GraspError(f"`limit` must be at least 1, got {limit}")
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    from lm_eval.tasks import TaskManager

    if data is None:
        manager = TaskManager()
        place = f"lm-eval {version('lm_eval')}: `lm-eval ls tasks` lists them"
    else:
        manager = TaskManager(
            include_path=LOCAL_TASKS, include_defaults=False, metadata={"folder": str(data)}
        )
        place = f"those that read `tasks_data`: there are {', '.join(manager.all_tasks)}"
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise GraspError(f"no task {name!r}{hint} among {place}")

    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            for kind, found in manager.load([name]).items():
                loaded[kind].update(found)
        except GraspError:
            raise
        except Exception as error:  # the hub, a data set or a task may fail in many ways
            fix = (
                f"check the documents in {data}"
                if data is not None
                else "check the connection, or give local documents as `tasks_data`"
            )
            raise GraspError(f"task {name} does not load: {reason(error)}: {fix}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    return loaded


def _evaluate(
    name: str,
    tasks: dict[str, Any],
    limit: int | None,
    batch_size: int,
    device: str,
    trust_remote_code: bool,
) -> tuple[ModelScores, dict[str, Any]]:
    """Return the scores of one model, and lm-eval's own result."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(
        name,
        dtype=torch.float32 if device == "cpu" else None,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    dtype = str(model.dtype).removeprefix("torch.")
    lm = HFLM(
        model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
    )
    try:
        with packed_errors(name, model):
            result: Any = evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False)
    except (AssertionError, ValueError) as error:  # lm-eval's ways to refuse a task or a document
        refusal = (
            reason(error)
            if str(error)
            else f"an answer is empty or longer than the {lm.max_length} tokens that it accepts"
        )
        raise GraspError(
            f"lm-eval cannot score {', '.join(tasks['tasks'])} with {name}: {refusal}"
        ) from error
    requests = [request for task in tasks["tasks"].values() for request in task.instances]
    if any(math.isnan(value) for request in requests for value in _likelihoods(request)):
        raise GraspError(
            f"{name} gives likelihoods that are not numbers: the weights are damaged or overflow "
            f"in {dtype}"
        )
    scores = ModelScores(
        model=name,
        dtype=dtype,
        bos=lm.tok_encode("a")[0] == tokenizer.bos_token_id,
        truncated=sum(
            len(lm.tok_encode("".join(request.args))) > lm.max_length + 1  # the last is only scored
            for request in requests
            if request.request_type == "loglikelihood"
        ),
        scores={task: _scores(values) for task, values in result["results"].items()},
    )
    return scores, result


def _scores(values: dict[str, Any]) -> dict[str, Score]:
    """Return the metrics among lm-eval's values, whose keys are `metric,filter`."""
    scores = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        scores[key.removesuffix(",none")] = Score(
            float(value), float(stderr) if isinstance(stderr, int | float) else None
        )
    return scores


def _likelihoods(request: Any) -> list[float]:
    """Return the log-likelihoods of a request's answer or text; generated text has none."""
    values = (reply[0] if isinstance(reply, tuple) else reply for reply in request.resps)
    return [value for value in values if isinstance(value, float)]


def _describe(
    name: str, task: Any, result: dict[str, Any], data: str | Path | None
) -> dict[str, Any]:
    """Describe what a task's scores depend on besides the model."""
    config = task.config
    split = config.test_split or config.validation_split
    if data is not None:
        file = Path(data, config.dataset_kwargs["file"])
        source, digest = file.name, hashlib.sha256(file.read_bytes()).hexdigest()
    else:
        parts = (config.dataset_path, config.dataset_name, split)
        source, digest = ":".join(part for part in parts if part), None
    counts = result["n-samples"][name]
    return {
        "version": result["versions"][name],
        "few_shot": result["n-shot"][name],
        "documents": counts["effective"],
        "documents_available": counts["original"],
        "data": source,
        "split": split,
        "sha256": digest,
    }


class _Bar:
    """Replacement for lm-eval's tqdm bar, which reports to `progress` instead."""

    def __init__(self, progress: Progress | None, items: Any = (), **options: Any) -> None:
        self.items, self.done, self.total = items, 0, options.get("total") or len(items)
        self.progress = None if options.get("disable") else progress

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _reported(progress: Progress | None) -> Iterator[None]:
    """Report lm-eval's requests to `progress`, and hide its other bars and its log messages."""
    try:
        import lm_eval.api.model as tokenizing
        import lm_eval.api.task as preparing
        import lm_eval.models.huggingface as running
    except ImportError:
        raise GraspError(f"`tasks` needs lm-eval: {install('tasks')}") from None
    import datasets

    with contextlib.ExitStack() as undo:

        def replace(module: Any, bar: Any) -> None:
            undo.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = bar

        replace(tokenizing, partial(_Bar, None))
        replace(preparing, partial(_Bar, None))
        replace(running, partial(_Bar, progress))
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        remarks = logging.getLogger("lm_eval")
        undo.callback(remarks.setLevel, remarks.level)
        remarks.setLevel(logging.ERROR)
        yield
