"""The results page of `grasp compare`: tables and a plot, all from its compare.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from grasp.report.summary import how_measured, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = dict[str, Any]  # the content of compare.json
Record = dict[str, Any]  # one of its cells

# WikiText-2 perplexity at length 2048 without fine-tuning, by the fraction of prunable parameters
# that is kept; as printed in GRASPrune (arXiv 2604.19398).
PUBLISHED_DENSE = 5.49
PUBLISHED = {
    "LLM-Pruner": {0.8: 10.04, 0.6: 39.9, 0.5: 313.0, 0.4: 2725.0},
    "SliceGPT": {0.8: 8.16, 0.6: 16.8, 0.5: 26.1, 0.4: 45.9},
    "FLAP": {0.8: 7.12, 0.6: 13.9, 0.5: 24.8, 0.4: 51.7},
    "GRASPrune": {0.8: 6.47, 0.6: 9.64, 0.5: 12.18, 0.4: 16.65},
}


def page(summary: Summary) -> str:
    """Return README.md of a comparison."""
    settings = "\n".join(f"- {key}: `{value}`" for key, value in summary["config"].items())
    accuracy = "\n\n".join(
        f"## {task}, {metric}\n\n{markdown_table(*accuracy_table(summary, task, metric))}"
        for task, metric in metrics(summary)
    )
    return f"""# {Path(summary["model"]).name}: methods compared

## Perplexity

{markdown_table(*perplexity_table(summary))}

{explained(summary)}

![perplexity and accuracy against kept parameters](compare.png)

{accuracy}

## Published, for context

{markdown_table(*published_table())}

Llama-2-7B on WikiText-2 at length 2048 (dense {PUBLISHED_DENSE}), without fine-tuning, as printed
in GRASPrune (arXiv 2604.19398); × is the ratio to dense. The lowest published at 0.5 is 9.84, by
DISP-LLM at length 4096 (dense 5.12, 1.92 ×); its models need index operations at run time.
Perplexities of different models or lengths cannot be compared; ratios only roughly.

## Settings

{settings}
"""


def perplexity_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each method with its perplexity at each budget, seconds and peak memory.

    Several texts have a column each at each budget.
    """
    dense, budgets = [found["value"] for found in _on_texts(summary["dense"])], _budgets(summary)
    names = [f", {found['data']}" for found in _on_texts(summary["dense"])]
    columns = [f"keep {part}{name if len(names) > 1 else ''}" for part in budgets for name in names]
    head = ["method", *columns, "seconds", "peak memory"]
    rows = [["dense", *(f"{value:.2f}" for _ in budgets for value in dense), "", ""]]
    for method, by_budget in _methods(summary):
        cells = [cell for records in by_budget.values() for cell in records]
        seconds = mean(c["choosing"]["seconds"] + c["making"]["seconds"] for c in cells)
        peak = max(c[stage]["peak_memory"] for c in cells for stage in ("choosing", "making"))
        texts = []
        for part in budgets:
            for own, *found in zip(dense, *map(_values, by_budget[part]), strict=True):
                texts.append(f"{span(found)}, {mean(found) / own:.2f} ×")
        rows.append([method, *texts, f"{seconds:,.0f}", f"{peak / 1e9:.2f} GB"])
    return head, rows


def accuracy_table(summary: Summary, task: str, metric: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one metric of one task: mean of the seeds ± lm-eval's standard error."""
    budgets = _budgets(summary)
    rows = [["dense", *(_accuracy([summary["dense"]], task, metric) for _ in budgets)]]
    for method, by_budget in _methods(summary):
        rows.append([method, *(_accuracy(by_budget[part], task, metric) for part in budgets)])
    return ["method", *(f"keep {part}" for part in budgets)], rows


def published_table() -> tuple[list[str], list[list[str]]]:
    """Head and rows: the published figures of Llama-2-7B."""
    budgets = list(PUBLISHED["GRASPrune"])
    rows = [
        [name, *(f"{by[part]:g}, {by[part] / PUBLISHED_DENSE:.2f} ×" for part in budgets)]
        for name, by in PUBLISHED.items()
    ]
    return ["method", *(f"keep {part}" for part in budgets)], rows


def explained(summary: Summary) -> str:
    """Explain how the figures of the perplexity table were measured."""
    config, prunable = summary["config"], summary["parameters"]["prunable"]
    seeds = sorted({cell["seed"] for cell in summary["cells"]})
    kept = [(cell["keep"], cell["kept"]) for cell in summary["cells"]]
    below = max(1 - got / asked for asked, got in kept)
    several = f"mean over seeds {', '.join(map(str, seeds))} (minimum–maximum)"
    shown = several if len(seeds) > 1 else f"seed {seeds[0]}"
    epochs = config["scale_epochs"]
    greedy = any(cell["method"].startswith("greedy-") for cell in summary["cells"])
    narrow = greedy and config["dtype"] != "fp32"
    fitted = " Greedy methods fit weights and run in fp32." * narrow
    beside = " (including the dense model)" if config["device"] == "cpu" else ""
    return (
        f"{how_measured(*_on_texts(summary['dense']))} Cells: {shown}, and × the ratio to dense. "
        f"Budgets are fractions of {prunable:,} prunable parameters, never exceeded, at most "
        f"{100 * below:.2g} % unspent. All methods use {config['samples']} blocks of "
        f"{config['seq_len']} tokens of {summary['calibration']['name']} and train scales for "
        f"{epochs} epoch{'s' * (epochs != 1)}.{fitted} Seconds and peak memory{beside} cover "
        f"selection, compensation and scales, on {config['device']}."
    )


def metrics(summary: Summary) -> list[tuple[str, str]]:
    """Return (task, the metric that papers report for it); empty if no tasks were run."""
    tasks = summary["dense"]["tasks"]
    scores = tasks["models"][0]["scores"] if tasks else {}
    return [
        (t, "acc_norm" if "acc_norm" in found else next(iter(found))) for t, found in scores.items()
    ]


def figure(summary: Summary) -> Figure:
    """Plot perplexity, and accuracy if tasks were run, against the parameters that are kept."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    texts = _on_texts(summary["dense"])
    panels: list[tuple[str, Any]] = [
        (
            f"perplexity, {found['data']}" if len(texts) > 1 else "perplexity",
            lambda record, at=at: _values(record)[at],
        )
        for at, found in enumerate(texts)
    ]
    for task, metric in metrics(summary):
        panels.append((f"{task}, {metric}", lambda r, t=task, m=metric: _score(r, t, m)["value"]))
    drawn = Figure(figsize=(5 * len(panels) + 2.5, 4.5), layout="constrained")
    for axes, (title, value) in zip(
        drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for number, (method, by_budget) in enumerate(_methods(summary)):
            x = [100 * mean(r["kept"] for r in records) for records in by_budget.values()]
            y = [[value(r) for r in records] for records in by_budget.values()]
            least, middle, most = ([f(v) for v in y] for f in (min, mean, max))
            bars = [
                [m - n for m, n in zip(middle, least, strict=True)],
                [n - m for m, n in zip(middle, most, strict=True)],
            ]
            axes.errorbar(
                x,
                middle,
                yerr=bars,
                label=method,
                color=colormaps["tab20"](number % 20),
                marker="o",
                markersize=3,
                linewidth=1.2,
                capsize=3,
            )
        axes.axhline(value(summary["dense"]), color="#667085", linestyle=":", label="dense")
        axes.set(
            title=title,
            xlabel="prunable parameters kept, %",
            yscale="log" if title.startswith("perplexity") else "linear",
        )
        axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return drawn


def _on_texts(record: Record) -> list[dict[str, Any]]:
    """Perplexities of a cell, or of the dense model, on each text."""
    return [record["perplexity"], *record.get("other_texts", ())]


def _values(record: Record) -> list[float]:
    return [found["value"] for found in _on_texts(record)]


def _budgets(summary: Summary) -> list[float]:
    return sorted({cell["keep"] for cell in summary["cells"]}, reverse=True)


def _methods(summary: Summary) -> Iterator[tuple[str, dict[float, list[Record]]]]:
    """Each method with its cells by budget, most kept first."""
    for method in dict.fromkeys(cell["method"] for cell in summary["cells"]):
        own = [cell for cell in summary["cells"] if cell["method"] == method]
        yield method, {part: [c for c in own if c["keep"] == part] for part in _budgets(summary)}


def _score(record: Record, task: str, metric: str) -> dict[str, Any]:
    return record["tasks"]["models"][0]["scores"][task][metric]


def _accuracy(records: list[Record], task: str, metric: str) -> str:
    scores = [_score(record, task, metric) for record in records]
    errors = [s["stderr"] for s in scores if s["stderr"] is not None]
    return f"{mean(s['value'] for s in scores):.4f}" + (f" ± {mean(errors):.4f}" if errors else "")


def span(values: list[float]) -> str:
    """Format the mean over seeds, with minimum and maximum if there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"
