"""`grasp verify DIR`: check that a checkpoint matches its record.

The checkpoint is loaded in fresh processes, the way its users will load it, and compared with
grasp.json and with the probe (logits of the model in memory when it was saved). The checks that
need no other process also run before a checkpoint is published.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp.checkpoint.record import Record, sha256
from grasp.errors import GraspError
from grasp.model.stored import INDEX, SINGLE

if TYPE_CHECKING:  # slow to import, and not needed to refuse other folders
    from torch import Tensor

    from grasp.checkpoint.probe import Probe

SEES = re.compile("vision|visual|image|audio")  # in names of weights that no text passes
# Relative to the largest logit. Another CPU, GPU or torch release rounds differently.
TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 5e-2, "torch.float16": 1e-2}


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one checkpoint."""

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> VerifyReport:
    """Check a checkpoint written by grasp; failed checks are reported, not raised.

    A modeling_grasp.py that differs from this release's runs only with `trust_remote_code`. Raises
    GraspError if the folder is not a grasp checkpoint.
    """
    folder = Path(folder).resolve()
    record, own_code = Record.read(folder), _model_type(folder).startswith("grasp_")
    checks = _check_disk(folder, record)
    ways = {"with import grasp": "grasp", "without grasp": "remote"}
    if not own_code:
        ways = {"as the stock class": "stock"}
    elif not trust_remote_code and not _is_own_code(folder / "modeling_grasp.py"):
        del ways["without grasp"]
        checks.append(
            Check(
                "loads without grasp",
                False,
                "modeling_grasp.py is not this release's own, so it was not run "
                "(grasp.verify(..., trust_remote_code=True) runs it)",
            )
        )
    for title, way in ways.items():
        checks += _check_loaded(folder, title, way, record)
    return VerifyReport(str(folder), tuple(checks))


def check_saved(folder: Path, model: Any, tokenizer: Any) -> None:
    """Run the checks of `verify` that need no other process, before a checkpoint is published.

    `model` and `tokenizer` were just read from `folder`, onto the device of the saved model. Raises
    GraspError with the failed checks.
    """
    from grasp.checkpoint.probe import Probe

    record = Record.read(folder)
    found = Probe.read(folder).compare(model, tokenizer)
    _refuse_failed(folder, [*_check_disk(folder, record), *_check_found("", found, record)])


def check_exported(folder: Path, model: Any, tokenizer: Any, probe: Probe) -> None:
    """Check a folder without grasp.json: its outputs must match `probe` up to rounding."""
    found = probe.compare(model, tokenizer)
    computed = [_check_logits("logits", found, exact=False), _check_tokens("tokenizer", found)]
    _refuse_failed(folder, [_check_tensors(folder), *computed])


def _refuse_failed(folder: Path, checks: list[Check]) -> None:
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if failed:
        raise GraspError(
            f"{folder} is not published, as it would fail `grasp verify` ({'; '.join(failed)})"
        )


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except FileNotFoundError:
        raise GraspError(f"{folder} is not a grasp checkpoint: it has no config.json") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise GraspError(f"{folder} is not a grasp checkpoint: config.json: {error}") from None


def _is_own_code(path: Path) -> bool:
    own = Path(__file__).parents[1] / "model" / "modeling_grasp.py"
    return path.is_file() and path.read_bytes() == own.read_bytes()


def _check_disk(folder: Path, record: Record) -> list[Check]:
    checks = [_check_files(folder, record.sha256), _check_tensors(folder)]
    return checks + ([check_sparsity(folder, record.sparsity)] if record.sparsity else [])


def _check_files(folder: Path, hashes: dict[str, str]) -> Check:
    """Check that the weight files are bit-identical to those that were written."""
    found = {path.name for path in folder.glob("*.safetensors")}
    wrong = sorted(found.symmetric_difference(hashes))
    wrong += [
        name for name in sorted(found & hashes.keys()) if sha256(folder / name) != hashes[name]
    ]
    names = ", ".join(wrong)
    detail = f"not as written: {names}" if wrong else f"{len(hashes)} files as written"
    return Check("files", not wrong, detail)


def _check_tensors(folder: Path) -> Check:
    """Check that every tensor of the index exists and is finite."""
    from safetensors import SafetensorError

    count = 0
    try:
        for file, name, tensor in _tensors(folder):
            count += 1
            if not tensor.isfinite().all():
                return Check("tensors", False, f"{name} in {file} is not finite")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Check("tensors", False, _one_line(str(error)))
    return Check("tensors", count > 0, f"{count} tensors, all finite")


def check_sparsity(folder: Path, sparsity: dict[str, Any]) -> Check:
    """Check that decoder matrices hold the pattern and have the recorded number of zeros."""
    from safetensors import SafetensorError

    try:
        return _zeros_by_pattern(folder, sparsity)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Check("sparsity", False, _one_line(str(error)))


def _zeros_by_pattern(folder: Path, sparsity: dict[str, Any]) -> Check:
    from grasp.budget.pattern import Pattern

    pattern, zeros, matrices = Pattern.parse(sparsity["pattern"]), 0, 0
    for _, name, weight in _tensors(folder):
        if ".layers." not in name or SEES.search(name) or weight.dim() != 2:
            continue
        if not pattern.holds(weight):
            return Check("sparsity", False, f"{name} is not {pattern.text}")
        matrices += 1
        zeros += int((weight == 0).sum())
    detail = f"{pattern.text} in {matrices} matrices, {zeros:,} zeros"
    return Check("sparsity", zeros == sparsity["zeros_after"], detail)


def _tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file, name, tensor) of all that the index names, or of all in the single file."""
    from safetensors import safe_open

    named: dict[str, list[str]] = {SINGLE: []}  # by file; none are all
    if (folder / INDEX).is_file():
        named = {}
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for name, file in weight_map.items():
            named.setdefault(file, []).append(name)
    for file in sorted(named):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in named[file] or tensors.keys():
                yield file, name, tensors.get_tensor(name)


def _check_loaded(folder: Path, title: str, way: str, record: Record) -> list[Check]:
    found = _in_fresh_process(folder, way)
    if "error" in found:
        return [Check(f"loads {title}", False, _one_line(found["error"]))]
    return [
        Check(f"loads {title}", True, found["class"]),
        *_check_found(f" {title}", found, record),
        Check(
            f"generate {title}",
            found["cached"] == found["uncached"],
            "16 greedy tokens, the same with a cache and without"
            if found["cached"] == found["uncached"]
            else f"with a cache {found['cached']}, without {found['uncached']}",
        ),
    ]


def _check_found(title: str, found: dict[str, Any], record: Record) -> list[Check]:
    """Check the result of `Probe.compare` against grasp.json and the probe."""
    kinds = ("ffn", "kv", "experts")
    widths = list(zip(*(found[kind] for kind in kinds), strict=True))
    kept = [tuple(len(layer.get(kind, ())) for kind in kinds) for layer in record.kept]
    # 0 is recorded of what has no units
    wrong = [
        index
        for index, pair in enumerate(zip(widths, kept, strict=False))
        if any(own not in (0, width) for width, own in zip(*pair, strict=True))
    ]
    same_widths = len(widths) == len(kept) and not wrong
    return [
        Check(
            f"widths{title}",
            same_widths,
            f"{len(widths)} layers" if same_widths else f"layers {wrong} differ from grasp.json",
        ),
        Check(
            f"parameters{title}",
            found["parameters"] == record.params["total_after"],
            f"{found['parameters']:,}, grasp.json says {record.params['total_after']:,}",
        ),
        _check_logits(f"logits{title}", found),
        _check_tokens(f"tokenizer{title}", found),
    ]


def _check_logits(name: str, found: dict[str, Any], *, exact: bool = True) -> Check:
    """Compare logits with the probe: if `exact`, bit by bit on the same processor and software."""
    import torch

    from grasp.model.load import environment

    then, now = found["environment"], environment(torch.device(found["device"]))
    dtype, difference = found["dtype"], found["difference"]
    if not found["finite"]:
        return Check(name, False, not_finite(dtype))
    place = f"{then['processor']}, torch {then['torch']}, transformers {then['transformers']}"
    same = all(now[key] == then[key] for key in ("torch", "transformers", "device", "processor"))
    if exact and same:
        if found["bit_equal"]:
            return Check(name, True, f"bit-equal to the model in memory ({dtype})")
        return Check(name, False, f"differ by {difference:.1e} from those computed on this {place}")
    limit = TOLERANCE[dtype]
    detail = f"differ by {difference:.1e} (limit {limit:.0e}) from those computed on {place}"
    return Check(name, difference <= limit, detail)


def not_finite(dtype: str) -> str:
    """Why logits are not finite though the weights are, and the fix."""
    if dtype == "torch.float16":
        return f"not finite in {dtype}: store the model in bf16 or fp32 first"
    return f"not finite in {dtype}: the weights are damaged: make the result again"


def _check_tokens(name: str, found: dict[str, Any]) -> Check:
    same = found["same_tokens"]
    detail = "the tokens of a text as written" if same else "a text's tokens are not as written"
    return Check(name, same, detail)


def _in_fresh_process(folder: Path, way: str) -> dict[str, Any]:
    """Run probe.py in a new interpreter; return {"error": reason} if that fails."""
    source = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    root = str(Path(__file__).parents[2])  # where grasp is imported from, installed or not
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,  # copies of modeling_grasp.py, removed at the end
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        result = Path(scratch, "result.json")
        run = subprocess.run(
            [sys.executable, "-c", source, str(folder), way, str(result)],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            return dict(json.loads(result.read_text()))
    lines = run.stderr.strip().splitlines() or [f"the process ended with {run.returncode}"]
    return {"error": lines[-1]}


def _one_line(text: str) -> str:
    return " ".join(text.split())
