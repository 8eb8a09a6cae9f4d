"""Measure how the calibration text and its length affect the result.

    python -m benchmarks.calibration_text --texts FILE,builtin --eval-texts FILE,FILE \\
      --samples 32,128,512 [--seeds 0,1,2]

`grasp prune` runs for each text with each number of samples; every result is measured on each of
--eval-texts. Checkpoints stay in --out; a second call runs only what is missing. --epochs applies
to the largest number of samples; the others get more epochs, so that all runs see as many tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import grasp
from benchmarks.rows import keep_settings
from grasp.evaluate.perplexity import evaluate_text
from grasp.report.comparison import span
from grasp.report.summary import markdown_table


def measure(folder: str, text: str, options: argparse.Namespace) -> dict[str, Any]:
    return evaluate_text(
        folder,
        text,
        seq_len=options.eval_seq_len,
        windows=options.eval_windows,
        device=options.device,
    ).to_json()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The perplexities on each of the texts: of the dense model and of each result."""
    out, evaluations = options.out, options.eval_texts.split(",")
    own = ("texts", "samples", "seq_len", "epochs", "model", "keep")  # more seeds may be added
    keep_settings(out, {name: getattr(options, name) for name in own})
    counts = [int(n) for n in options.samples.split(",")]
    dense = {text: measure(options.model, text, options) for text in evaluations}
    rows = []
    for seed in map(int, options.seeds.split(",")):
        for number, text in enumerate(options.texts.split(",")):
            for samples in counts:
                folder = out / f"{number}-{samples}-{seed}"
                if not folder.exists():
                    grasp.prune(
                        options.model,
                        folder,
                        keep=options.keep,
                        calibration=text,
                        samples=samples,
                        seq_len=options.seq_len,
                        epochs=max(1, options.epochs * max(counts) // samples),
                        ffn_multiple=1,
                        compensate="refit",
                        device=options.device,
                        seed=seed,
                    )
                found = {e: measure(str(folder), e, options)["value"] for e in evaluations}
                rows.append({"text": text, "samples": samples, "seed": seed, "perplexity": found})
                print(json.dumps(rows[-1]), flush=True)
    return {"dense": dense, "rows": rows}


def table(result: dict[str, Any]) -> str:
    dense, rows = result["dense"], result["rows"]
    lines = [["dense", "", *(f"{found['value']:.2f}" for found in dense.values())]]
    for text, samples in dict.fromkeys((row["text"], row["samples"]) for row in rows):
        same = [row for row in rows if (row["text"], row["samples"]) == (text, samples)]
        cells = []
        for evaluation, whole in dense.items():
            values = [row["perplexity"][evaluation] for row in same]
            cells.append(f"{span(values)}, {mean(values) / whole['value']:.2f} ×")
        lines.append([Path(text).name, f"{samples}", *cells])
    head = ["learned on", "samples", *(f"on {Path(text).name}" for text in dense)]
    how = next(iter(dense.values()))
    return (
        f"{markdown_table(head, lines)}\n\nPerplexity in fp32, {how['windows']} windows of "
        f"{how['seq_len']} tokens; mean of the seeds (least to most), × over dense."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", required=True, help="as --calibration, separated by commas")
    parser.add_argument("--eval-texts", required=True, help="as --eval-text, separated by commas")
    parser.add_argument("--samples", default="32,64,128,256,512")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1, help="over the most samples")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seeds", default="0", help="numbers separated by commas")
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/calibration_text"))
    options = parser.parse_args(argv)
    result = run(options)
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "README.md").write_text(table(result) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
