"""Start a benchmark in one process or on ranks of torchrun, and collect what each finds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grasp import distributed

Found = dict[str, Any]


def main(
    parser: argparse.ArgumentParser,
    compare: Callable[[argparse.Namespace], Found],
    of_rank: Callable[[argparse.Namespace], Found],
) -> None:
    """Print what `compare` returns, and write it to --out; on a rank, what `of_rank` returns."""
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-of", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank_of:
        distributed.join()
        found = distributed.everywhere(of_rank(asked))
        if distributed.is_first():
            print(json.dumps(found))
        distributed.leave()
        return
    result = json.dumps(compare(asked), indent=2)
    print(result)
    if asked.out:
        asked.out.write_text(result + "\n")


def in_one_process(module: str, folder: str, *arguments: str) -> Found:
    """What `of_rank` of a module finds without torchrun."""
    (found,) = _found([], module, folder, *arguments)
    return found


def on_ranks(ranks: int, module: str, folder: str, *arguments: str) -> list[Found]:
    """What `of_rank` of a module finds on ranks of torchrun, of a thread each."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return _found(launcher, module, folder, *arguments)


def _found(launcher: list[str], module: str, folder: str, *arguments: str) -> list[Found]:
    words = [sys.executable, *launcher, "-m", module, f"--rank-of={folder}", *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: list[Found] = json.loads(done.stdout)
    return found
