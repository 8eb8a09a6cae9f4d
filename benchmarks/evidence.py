"""Append each figure as a line of JSON when it is known, and note whether tests back it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from grasp_kernels._triton import launch


def add(out: Path | None, row: dict[str, Any]) -> None:
    """Add a row to a file of such lines: a stop at any moment leaves those that are there."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def passed(report: Path, *modules: str) -> bool:
    """Whether tests of all these modules ran and passed, by pytest's JUnit report."""
    if not report.exists():  # the run was stopped
        return False
    cases = list(ElementTree.parse(report).iter("testcase"))
    for module in modules:
        own = [case for case in cases if module in case.get("classname", "")]
        ran = [case for case in own if case.find("skipped") is None]
        if not ran or any(
            case.find(bad) is not None for case in own for bad in ("failure", "error")
        ):
            return False
    return True


def tiles() -> dict[str, str]:
    """Whose launch configurations the kernels take on this GPU: its own, or its chip's."""
    if not torch.cuda.is_available():
        return {}
    own = launch.measured(torch.cuda.get_device_name())
    return {"tiles": "own" if own.exists() else "chip"}


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]
