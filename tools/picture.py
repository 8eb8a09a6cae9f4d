"""Draw docs/img/before_after.svg from the committed figures: `python tools/picture.py`.

Widths, size and speed are those of `make demo` (results/demo.json). Perplexity is the mean of three
seeds that were calibrated on both texts (`blocks` of smollm2_keep50_two_texts.json).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PICTURE = ROOT / "docs/img/before_after.svg"
DENSE, PRUNED, INK = "#c9ced6", "#2f6fde", "#1f2328"
WIDTH, HEIGHT = 860, 400


def figures() -> dict[str, Any]:
    """What the picture shows, as committed."""
    demo, two_texts = (
        json.loads((RESULTS / name).read_text())
        for name in ("demo.json", "smollm2_keep50_two_texts.json")
    )
    mean, dense = two_texts["blocks"]["mean"], two_texts["blocks"]["rows"][0]["dense"]
    speed = demo["tokens_per_second"]
    params = demo["params"]
    return {
        "widths": list(zip(demo["widths"]["before"], demo["widths"]["after"], strict=True)),
        "bars": [
            _bar("parameters", params["total_before"], params["total_after"], "{:,}"),
            _speed("prefill, tokens/s", speed["prefill 1 x 128"]),
            _speed("decode, tokens/s", speed["decode 1 x 128"]),
            *(
                _bar(f"perplexity, {name}", dense[text], mean[text], "{:.2f}")
                for name, text in (("WikiText-2", "wiki.test.raw"), ("Brown", "brown.test.txt"))
            ),
        ],
    }


class Bar(NamedTuple):
    name: str
    before: float
    after: float
    ratio: float
    form: str  # how its values are written


def _bar(name: str, before: float, after: float, form: str) -> Bar:
    return Bar(name, before, after, after / before, form)


def _speed(name: str, row: dict[str, float]) -> Bar:
    """Its ratio was taken pair by pair, which is not the ratio of the medians."""
    return Bar(name, row["dense"], row["pruned"], row["speed_up"], "{:.0f}")


def draw(found: dict[str, Any]) -> str:
    """The picture as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img">',
        "<title>SmolLM2-135M at half of its prunable parameters, before and after</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(20, 28, "SmolLM2-135M, half of its prunable parameters", 16, "bold"),
        f'<rect x="560" y="17" width="12" height="12" fill="{DENSE}"/>' + _text(577, 28, "before"),
        f'<rect x="650" y="17" width="12" height="12" fill="{PRUNED}"/>' + _text(667, 28, "after"),
        *_layers(found["widths"]),
        *_bars(found["bars"]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _layers(widths: list[tuple[list[int], list[int]]]) -> list[str]:
    """A bar per layer for its FFN channels, and a dot per KV group."""
    parts = [_text(20, 58, "layer"), _text(60, 58, "FFN channels"), _text(330, 58, "KV groups")]
    for index, ((ffn, kv), (ffn_after, kv_after)) in enumerate(widths):
        y = 68 + 10.6 * index
        parts.append(_text(44, y + 8, str(index), 9, anchor="end"))
        parts += _rects(60, y, 250, 8, ffn_after / ffn)
        for group in range(kv):
            fill = PRUNED if group < kv_after else DENSE
            parts.append(
                f'<circle cx="{336 + 14 * group}" cy="{y + 4:.1f}" r="3.6" fill="{fill}"/>'
            )
    return parts


def _bars(bars: list[Bar]) -> list[str]:
    """Two bars per figure, on a scale of its own."""
    parts = []
    for index, (name, before, after, ratio, form) in enumerate(bars):
        y, most = 58 + 68 * index, max(before, after)
        parts.append(_text(440, y, f"{name}: × {ratio:.2f}", 12, "bold"))
        for row, (value, fill) in enumerate(((before, DENSE), (after, PRUNED))):
            length, top = 290 * value / most, y + 8 + 19 * row
            parts.append(
                f'<rect x="440" y="{top}" width="{length:.1f}" height="15" fill="{fill}"/>'
            )
            parts.append(_text(446 + length, top + 12, form.format(value)))
    return parts


def _rects(x: float, y: float, width: float, height: float, part: float) -> list[str]:
    return [
        f'<rect x="{x}" y="{y:.1f}" width="{length:.1f}" height="{height}" fill="{fill}"/>'
        for length, fill in ((width, DENSE), (width * part, PRUNED))
    ]


def _text(
    x: float, y: float, text: str, size: int = 12, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{INK}">{text}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(figures()), encoding="utf-8")
