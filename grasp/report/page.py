"""report.html: one self-contained page beside a checkpoint, without scripts or network."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from grasp.checkpoint.record import Record
from grasp.report.summary import (
    calibrated_on,
    how_made,
    how_to_run,
    layer_figure,
    measured_on,
    perplexity_pairs,
    recorded,
    recovered,
    size_rows,
    weight_bytes,
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #667085; --line: #e4e7ec; --page: #fff;
  --accent: #2f6f9f; --other: #c3c9d2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #344054; --page: #14181f; --accent: #6fb1e0;
    --other: #475467 }
}
body { margin: 0 auto; max-width: 58rem; padding: 2.5rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem }
.soft { color: var(--soft); font-size: .9rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  margin: 1.6rem 0 }
.tile, figure { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem }
.tile b { display: block; font-size: 1.5rem }
.bar { height: .4rem; border-radius: .2rem; background: var(--line); margin-top: .6rem }
.bar i { display: block; height: 100%; border-radius: .2rem; background: var(--accent) }
figure { margin: 0; background: #fff }
figure svg { width: 100%; height: auto; display: block }
figcaption { color: #667085; font-size: .9rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
td, th { padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  text-align: left; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: normal }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .6rem 1rem;
  align-items: center; font-size: .92rem }
.bars .bar { margin: .15rem 0; height: .55rem; background: none }
.bars .bar + .bar i { background: var(--other) }
pre { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto;
  font-size: .88rem }
"""


def report_page(record: Record, records: Sequence[dict[str, Any]]) -> str:
    """Return the page of a checkpoint, from its grasp.json and the records of its log.jsonl."""
    title = f"{Path(record.model).name}, pruned to {record.kept_part:.2%}"
    recipe = dict(record.recipe)
    recipe |= {f"budget, {key}": value for key, value in recipe.pop("budget").items()}
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
<p class="soft">{escape(how_made(record))}</p>
<div class="tiles">{"".join(_tile(*row) for row in size_rows(record))}</div>
<p class="soft">{escape(measured_on(record))}</p>
{_quality(record)}
<h2>Size and speed</h2>
{_bars(record)}
{"".join(_recorded(*found) for found in recorded(record))}
<h2>Kept units</h2>
<figure>{_svg(layer_figure(record))}</figure>
{_learning(records)}
<h2>Use it</h2>
{"".join(_code(where, code) for where, _, code in how_to_run(record))}
<h2>Recipe</h2>
<p class="soft">{escape(calibrated_on(record))} {escape(recovered(record))}</p>
<table>{"".join(_row(key, value) for key, value in sorted(recipe.items()))}</table>
<h2>Software</h2>
<table>{"".join(_row(key, value) for key, value in record.versions.items())}</table>
</html>
"""


def _tile(what: str, dense: str, pruned: str, ratio: str) -> str:
    """Return a figure next to the dense model's, with a bar if their ratio is a percentage."""
    share = f'<div class="bar"><i style="width: {ratio}"></i></div>' if ratio.endswith("%") else ""
    return (
        f'<div class="tile"><span class="soft">{escape(what)}</span><b>{pruned}</b>'
        f'<span class="soft">dense {dense} · {ratio}</span>{share}</div>'
    )


def _bars(record: Record) -> str:
    """Return pairs of bars, pruned above dense: bytes, and tokens per second if recorded."""
    cache = record.kv_cache_bytes_per_token
    dense, pruned = weight_bytes(record)
    bars = [
        _pair("weights", pruned, dense, "bytes"),
    ]
    if cache["before"]:  # attention of other kinds may keep no keys
        bars.append(_pair("KV cache per token", cache["after"], cache["before"], "bytes"))
    speed = record.results.get("speed")
    if speed and len(speed["models"]) > 1:
        for phase in ("prefill", "decode"):
            for case in speed["cases"]:
                shape = f"{phase}, {case['batch_size']} x {case['prompt_len']}"
                ours, theirs = case[phase]["tokens_per_second"]
                bars.append(_pair(shape, ours, theirs, "tokens/s"))
    return f"""<div class="bars">{"".join(bars)}</div>
<p class="soft">Blue: pruned; grey: dense.</p>"""


def _quality(record: Record) -> str:
    """Return pairs of bars, pruned above dense: perplexity on each evaluation text."""
    bars = [
        _pair(what, pruned, dense, "", digits=2) for what, dense, pruned in perplexity_pairs(record)
    ]
    if not bars:
        return ""
    return f"""<h2>Quality</h2>
<div class="bars">{"".join(bars)}</div>
<p class="soft">Blue: pruned; grey: dense. A shorter bar is better.</p>"""


def _pair(what: str, pruned: float, dense: float, unit: str, digits: int = 0) -> str:
    widths = [100 * value / max(pruned, dense) for value in (pruned, dense)]
    bars = "".join(f'<div class="bar"><i style="width: {w:.2f}%"></i></div>' for w in widths)
    return (
        f"<span>{escape(what)}</span><div>{bars}</div>"
        f'<span>{pruned:,.{digits}f} {unit}<br><span class="soft">dense {dense:,.{digits}f} · '
        f"{pruned / dense:.2f} x</span></span>"
    )


def _recorded(title: str, found: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in found["head"])
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in found["rows"]
    )
    return f"""<h2>{title}</h2>
<table><tr>{head}</tr>{rows}</table>
<p class="soft">{escape(found["measured_on"])}</p>
"""


def _code(where: str, code: str) -> str:
    return f'<p class="soft">{escape(where)}:</p><pre>{escape(code)}</pre>'


def _row(key: str, value: Any) -> str:
    return f'<tr><td class="soft">{escape(key)}</td><td>{escape(str(value))}</td></tr>'


def _learning(records: Sequence[dict[str, Any]]) -> str:
    """Plot the losses of learning and calibration, and the kept cost with its limit."""
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        # a stage logs notes, too; after an interruption a step may be there twice: the last counts
        if record.get("stage") in ("learn", "calibrate", "recover") and "step" in record:
            stages.setdefault(record["stage"], {})[record["step"]] = record
    if not stages:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, (name, steps) in zip(
        figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True
    ):
        x = sorted(steps)
        loss = [steps[step]["loss"] for step in x]
        window = max(1, len(x) // 20)
        sums = [0.0, *accumulate(loss)]
        ends = [(max(0, i - window), i) for i in range(1, len(sums))]
        smooth = [(sums[b] - sums[a]) / (b - a) for a, b in ends]
        axes.plot(x, loss, color="#c9d3de", linewidth=0.8)
        axes.plot(x, smooth, color="#2f6f9f", linewidth=1.6, label="loss")
        axes.set(title=name, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        if "cost" in steps[x[0]]:
            kept = axes.twinx()
            kept.plot(
                x, [100 * steps[s]["limit"] / steps[s]["of"] for s in x], ":", color="#667085"
            )
            kept.plot(x, [100 * steps[s]["cost"] / steps[s]["of"] for s in x], color="#c7822b")
            kept.set(ylim=(0, 105), ylabel="kept, %")
            kept.spines["top"].set_visible(False)
    return f"""<h2>Learning</h2>
<figure>{_svg(figure)}<figcaption>Grey: loss of each step. Blue: its moving average. Orange: cost of
the kept units, which never exceeds the budget (dotted).</figcaption></figure>"""


def _svg(figure: Any) -> str:
    """Return the figure as an SVG element with real text; equal figures give equal bytes."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "grasp", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
