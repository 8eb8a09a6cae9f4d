"""Learned gates against every other `--method` at one budget, text and amount of scaling.

    python -m benchmarks.selectors --text FILE --eval-text FILE [--seeds 0,1,2]
    python -m benchmarks.selectors --table --out JSON

Options, resuming and the form of the results are those of `benchmarks.ablation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from benchmarks.ablation import RESULTS, Row, run
from grasp.config import Method, PruneConfig


def selector_rows(ours: PruneConfig) -> list[Row]:
    rows = [Row(method, "learned", replace(ours, method=method)) for method in get_args(Method)]
    return [*rows, Row("fisher+refit", "learned", replace(ours, method="fisher", refit=True))]


def main(argv: Sequence[str] | None = None) -> None:
    run(selector_rows, __doc__ or "", RESULTS / "selectors.json", argv)


if __name__ == "__main__":
    main()
