"""The folder of a run: its options, its log, and the state to resume from.

A run works in `<out>.run`: `config.json`, `log.jsonl`, `state/` (safetensors) and `facts/` (JSON).
The finished checkpoint is renamed to `<out>` at the very end, so `<out>` is complete or absent.
Whatever interrupts a run, the same command resumes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp.checkpoint.record import Record
from grasp.distributed import after_first, check_same, from_first, is_first
from grasp.errors import GraspError
from grasp.journal import Journal, read_log
from grasp.machine import disk_errors, peak_memory
from grasp.run.ready import check_out, run_folder

SAVE_EVERY = 20.0  # seconds
SAVING = 0.05  # of the time at most, where a state is so large that saving it takes long
OWN_FILES = {
    *("checkpoint", "config.json", "facts", "finished", "inputs.json", "lock", "log.jsonl", "state")
}
Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """A finished checkpoint and its record."""

    folder: Path
    record: Record

    @property
    def summary(self) -> dict[str, Any]:
        """The content of the checkpoint's grasp.json."""
        return self.record.to_json()


class Run:
    """One resumable run. Use `open_run`."""

    def __init__(self, out: Path, folder: Path, show: Show, part: str | None = None) -> None:
        self.out, self.folder, self._show, self._part = out, folder, show, part
        self.checkpoint = folder / "checkpoint"

    def part(self, name: str) -> Run:
        """Return this run for one of several results; its stages, facts and log carry `name`."""
        return Run(self.out, self.folder, self._show, name)

    def stage(self, name: str) -> StageJournal:
        return StageJournal(self, name)

    def path(self, kind: str, name: str) -> Path:
        return self.folder / kind / (f"{self._part}, {name}" if self._part else name)

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that is computed only once per run, even if the run is resumed."""
        path = self.path("facts", f"{name}.json")
        known = from_first(lambda: path.read_text() if path.exists() else None)
        if known is None:
            value = compute()  # on all ranks
            known = from_first(lambda: json.dumps(value))
            if is_first():
                _write(path, known.encode())
        return json.loads(known)

    def forget_states(self) -> None:
        """Remove what the stages of a part resume from, once its result is kept."""
        from_first(self._forget_states)

    def _forget_states(self) -> None:
        for path in (self.folder / "state").glob("*.safetensors"):
            if path.name.startswith(f"{self._part}, "):
                path.unlink()

    def same_inputs(self, inputs: dict[str, Any]) -> None:
        """Refuse to resume from a state that other texts, weights or software have made.

        So are ranks that do not have the same.
        """
        for name, value in inputs.items():
            check_same(name, value)
        if not is_first():
            return
        path = self.folder / "inputs.json"
        if path.exists():
            _same(self.folder, _read(path), inputs)
        else:
            _write(path, json.dumps(inputs, indent=2).encode())

    def steps_of(self, stage: str) -> Callable[[int, int], None]:
        """A function that logs how many steps of a stage are done, and of how many."""
        return lambda step, steps: self.log(stage=stage, step=step, steps=steps)

    def log(self, **record: Any) -> None:
        """Write one JSON line to the log, and pass it on to show progress."""
        if not is_first():
            return
        record |= {"part": self._part} if self._part else {}
        with disk_errors(self.folder), open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        self._show(record)

    def records(self) -> list[dict[str, Any]]:
        """Return the log so far; for a part, without the records of other parts."""
        return read_log(self.folder / "log.jsonl", self._part)

    def seconds(self) -> float:
        """Return the seconds that the run, or a part up to its last record, has worked.

        Time between an interruption and the resumption does not count.
        """
        return from_first(self._seconds)

    def _seconds(self) -> float:
        worked = [
            b["time"] - a["time"]
            for a, b in pairwise([*read_log(self.folder / "log.jsonl"), {"time": time.time()}])
            if b.get("event") != "resumed" and self._part in (None, b.get("part"))
        ]
        return round(sum(worked), 1)

    def finished(self, name: str) -> Path:
        """Return the path where one of several checkpoints waits for the others."""
        return self.folder / "finished" / name

    def finish(self, name: str) -> None:
        """Set the checkpoint aside as one of several; it survives an interruption."""
        from_first(partial(self._finish, name))

    def _finish(self, name: str) -> None:
        with disk_errors(self.folder):
            self.finished(name).parent.mkdir(exist_ok=True)
            _sync_all(self.checkpoint)
            os.rename(self.checkpoint, self.finished(name))

    def publish(self) -> None:
        """Move the finished checkpoint, or all of several, into place; remove the run's folder."""
        from_first(self._publish)  # the other ranks wait

    def _publish(self) -> None:
        several = self.folder / "finished"
        result = several if several.exists() else self.checkpoint
        with disk_errors(self.out):
            shutil.copyfile(self.folder / "log.jsonl", result / "log.jsonl")
            _sync_all(result)
            os.rename(result, self.out)
        shutil.rmtree(self.folder, ignore_errors=True)  # NFS keeps the open lock


@contextmanager
def open_run(out: Path, config: dict[str, Any], show: Show = lambda record: None) -> Iterator[Run]:
    """Start or resume the run that will produce `out`.

    A run that fails before there is anything to resume from leaves no folder. Raises GraspError if
    `out` exists, or its run folder is in use or belongs to another configuration (the message lists
    the differences).
    """
    folder, asked = run_folder(out), json.loads(json.dumps(config))
    if not is_first():
        after_first()
        yield Run(out, folder, show)
        return
    check_out(out)
    missing = [parent for parent in folder.parents if not parent.exists()]
    with disk_errors(folder):
        if folder.exists() and {p.name.removesuffix(".new") for p in folder.iterdir()} - OWN_FILES:
            raise GraspError(f"{folder} holds files that are not grasp's: choose another `out`")
        for part in (folder / "state", folder / "facts"):
            part.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 (held for the life of the run)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraspError(f"{folder} is in use by another grasp process: wait for it") from None
        except OSError as error:
            raise GraspError(
                f"{folder} cannot be locked ({error.strerror}): choose an `out` on a local disk"
            ) from None
        resumed = (folder / "config.json").exists()
        if resumed:
            before = _read(folder / "config.json")
            if before.keys() != asked.keys():
                raise GraspError(
                    f"{folder} holds an unfinished run of another command or release: remove the "
                    "folder, or choose another `out`"
                )
            _same(folder, before, asked)
        try:
            check_out(out)  # another process may just have finished it
            if not resumed:
                _write(folder / "config.json", json.dumps(asked, indent=2).encode())
            run = Run(out, folder, show)
            shutil.rmtree(run.checkpoint, ignore_errors=True)
            _drop_cut_line(folder / "log.jsonl")
            run.log(event="resumed" if resumed else "started")
            after_first()
            yield run
        except BaseException:
            if not any([*folder.glob("state/*.safetensors"), *folder.glob("facts/*.json")]):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # another process may use a parent by now
                    for parent in missing:
                        parent.rmdir()
            raise


def _drop_cut_line(log: Path) -> None:
    """Remove a last line that a crash or a full disk has cut short."""
    if log.exists():
        os.truncate(log, log.read_bytes().rfind(b"\n") + 1)


class StageJournal(Journal):
    """Logs a stage, and saves its state every SAVE_EVERY seconds (SAVING) and at its end."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._path = run.path("state", f"{name}.safetensors")
        self._began = self._saved = self._seen = time.monotonic()
        self._first: int | None = None  # the step of the first report, which was at `_began`
        self._wait = SAVE_EVERY

    def load(self) -> dict[str, Tensor] | None:
        return from_first(self.load_own)

    def load_own(self) -> dict[str, Tensor] | None:
        if not self._path.exists():
            return None
        try:
            return load_file(self._path)
        except SafetensorError as error:
            raise GraspError(
                f"{self._path} is damaged ({error}): remove it to redo the stage"
            ) from None

    def save(self, state: Callable[[], dict[str, Tensor]], *, final: bool = False) -> None:
        if not is_first() or (not final and time.monotonic() - self._saved < self._wait):
            return
        began = time.monotonic()
        tensors = {name: t.contiguous().cpu() for name, t in state().items()}
        with disk_errors(self._path):
            beside = self._path.with_suffix(".new")
            save_file(tensors, beside)
            _sync(beside)
            os.replace(beside, self._path)
        self._saved = time.monotonic()
        self._wait = max(SAVE_EVERY, (self._saved - began) / SAVING)

    def note(self, text: str) -> None:
        self._run.log(event="note", stage=self._name, text=text)

    def progress(self, step: int, total: int, loss: float, tokens: int, **info: Any) -> None:
        now = time.monotonic()
        eta = None
        if self._first is None:  # earlier steps compiled kernels, or are of an earlier run
            self._first, self._began = step, now
        else:
            pace = (now - self._began) / (step - self._first)  # seconds per step
            eta = round(pace * (total - step), 1)
        self._run.log(
            stage=self._name,
            step=step,
            steps=total,
            loss=round(loss, 5),
            tokens_per_second=round(tokens / max(now - self._seen, 1e-9), 1),
            peak_memory=peak_memory(),
            eta=eta,
            **info,
        )
        self._seen = now


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise GraspError(
            f"{path} is damaged ({error}): remove {path.parent} to start anew"
        ) from None
    return found


def _write(path: Path, content: bytes) -> None:
    with disk_errors(path):
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(content)
        _sync(beside)
        os.replace(beside, path)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    before, now = _flat(before), _flat(now)
    changed = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise GraspError(
            f"{folder} holds an unfinished run of another configuration ({'; '.join(changed)}): "
            "restore that to resume it, remove the folder, or choose another `out`"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"budget": {"asked": 0.5}} becomes {"budget.asked": 0.5}, so that a difference is short."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
