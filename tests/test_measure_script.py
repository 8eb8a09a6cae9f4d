"""tools/measure_gpu.sh: a failing part leaves its log and exit code, and the others still run."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "measure_gpu.sh"
FAKE = """#!/bin/sh
case "$*" in
  *" roof "*) echo no GPU; exit 3 ;;
  *"-m pytest"*) kill -9 $$ ;;
esac
echo "$@"
"""


def measure(tmp_path, *options):
    """The script with a python that fails at times: exit code, output and the parts that ran."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    done = subprocess.run(
        [SCRIPT, "--small", "--out", tmp_path / "out", *options],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    rows = (tmp_path / "out" / "parts.jsonl").read_text().splitlines()
    return done, {row["part"]: row["exit"] for row in map(json.loads, rows)}


def test_a_part_that_fails_stops_no_other(tmp_path):
    done, parts = measure(tmp_path)
    assert parts.pop("roofs") == 3 and parts.pop("tests") == 137
    assert set(parts.values()) == {0} and {"step-512x1", "tune", "op-ffn", "job"} <= parts.keys()
    assert done.returncode == 1 and "failed or over their time: roofs tests" in done.stdout
    assert (tmp_path / "out/roofs.log").read_text() == "no GPU\n"
    assert "--cases 512x1" in (tmp_path / "out/step-512x1.log").read_text()


def test_only_the_parts_that_were_asked_for_run(tmp_path):
    done, parts = measure(tmp_path, "--only", "tune,op-swiglu")
    assert parts == {"tune": 0, "op-swiglu": 0}
    assert done.returncode == 0


def test_a_part_that_might_end_too_late_does_not_start(tmp_path):
    done, parts = measure(tmp_path, "--only", "roofs,tune", "--within", "200")
    assert parts == {"roofs": 3}  # of 40 and 130 seconds, and three times as many on a CPU
    assert (tmp_path / "out/tune.log").read_text() == "tune is left out: no time is left for it\n"
    assert "tune is left out" in done.stdout


def test_the_archive_has_what_is_known_after_every_part(tmp_path):
    archive = tmp_path / "all.tgz"
    measure(tmp_path, "--only", "tune,op-swiglu", "--archive", archive)
    with tarfile.open(archive) as found:
        names = {Path(name).name for name in found.getnames()}
    assert {"parts.jsonl", "tune.log", "op-swiglu.log"} <= names
