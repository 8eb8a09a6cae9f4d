"""Add what was measured on a checkpoint to its files: grasp.json, README.md and report.html."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from grasp.checkpoint.record import Record
from grasp.errors import GraspError
from grasp.journal import read_log
from grasp.machine import disk_errors
from grasp.report.page import report_page
from grasp.report.summary import layer_figure, model_card


class Measured(Protocol):
    """A result that can be recorded: scores of tasks, or a benchmark."""

    def to_json(self) -> dict[str, Any]: ...
    def head(self) -> tuple[str, ...]: ...
    def rows(self) -> Sequence[tuple[str, ...]]: ...
    def measured_on(self) -> str: ...


def add_reports(folder: Path, record: Record, records: Sequence[dict[str, Any]]) -> None:
    """Write README.md with its plot, and report.html; `records` are the lines of the log."""
    with disk_errors(folder):
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")
        layer_figure(record).savefig(folder / "layers.png", dpi=120)
        (folder / "report.html").write_text(report_page(record, records), encoding="utf-8")


def check_record(folder: Path) -> None:
    """Raise GraspError, before anything is measured, if a result could not be added."""
    Record.read(folder)
    if not os.access(folder, os.W_OK):
        raise GraspError(f"`record`: {folder} cannot be written to: check its permissions")


def add_measured(folder: Path, name: str, measured: Measured) -> None:
    """Add `measured` with its table to a checkpoint as results[name], replacing an earlier one.

    Raises GraspError as `check_record` does, and if the disk is full.
    """
    table = {
        **measured.to_json(),
        "head": measured.head(),
        "rows": measured.rows(),
        "measured_on": measured.measured_on(),
    }
    record = Record.read(folder).measured(**{name: table})
    with disk_errors(folder):
        record.write(folder)
    if not (folder / "report.html").exists():  # sparse checkpoints have none
        return
    own, of_several = folder / "log.jsonl", folder.resolve().parent / "log.jsonl"
    records = read_log(own) if own.exists() else read_log(of_several, part=folder.resolve().name)
    add_reports(folder, record, records)
