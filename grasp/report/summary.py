"""The layer table, its plot, and the model card, all from one record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp.checkpoint.record import Record

if TYPE_CHECKING:  # slow to import, and `grasp show` does not need it
    from matplotlib.figure import Figure


KINDS = ("FFN channels", "KV groups", "experts")  # in the order of `Record.widths`


def kept_units(record: Record) -> dict[str, list[tuple[int, int]]]:
    """Return (kept, before) of every layer for each kind of unit that the model has."""
    sides = [
        [(*layer, *[0] * (len(KINDS) - len(layer))) for layer in record.widths[side]]
        for side in ("after", "before")
    ]
    by_kind = zip(KINDS, *(zip(*layers, strict=True) for layers in sides), strict=True)
    found = {kind: list(zip(kept, of, strict=True)) for kind, kept, of in by_kind}
    return {kind: layers for kind, layers in found.items() if any(of for _, of in layers)}


def layer_rows(record: Record) -> list[list[str]]:
    """Return the layer, and `kept / before` for each kind of unit that the model has."""
    kinds = kept_units(record).values()
    return [
        [str(index), *(f"{kept} / {of}" for kept, of in layer)]
        for index, layer in enumerate(zip(*kinds, strict=True))
    ]


def size_rows(record: Record) -> list[tuple[str, str, str, str]]:
    """Return (name, dense, pruned, ratio) for parameters, KV cache and perplexity."""
    params, cache = record.params, record.kv_cache_bytes_per_token
    pairs = [
        ("prunable parameters", params["prunable_before"], params["prunable_after"]),
        ("all parameters", params["total_before"], params["total_after"]),
        ("KV cache, bytes per token (16 bit)", cache["before"], cache["after"]),
    ]
    # attention of other kinds may keep no keys
    rows = [(what, f"{a:,}", f"{b:,}", f"{b / a:.2%}") for what, a, b in pairs if a]
    if sparsity := record.sparsity:
        a, b, of = (sparsity[k] for k in ("zeros_before", "zeros_after", "weights"))
        rows.append(
            (f"zeros in linears, {sparsity['pattern']}", f"{a:,}", f"{b:,}", f"{b / of:.2%}")
        )
    for what, a, b in perplexity_pairs(record):
        rows.append((what, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f} x"))
    return rows


def perplexity_pairs(record: Record) -> list[tuple[str, float, float]]:
    """Return (name, dense, pruned) for the perplexity on each text; names differ if several."""
    pairs = record.perplexities
    return [
        (f"perplexity, {b['data']}" if len(pairs) > 1 else "perplexity", a["value"], b["value"])
        for a, b in pairs
    ]


def measured_on(record: Record) -> str:
    """Describe in one line how the perplexities were measured; empty if they were not."""
    results = [pruned for _, pruned in record.perplexities]
    return how_measured(*results) if results else ""


def how_measured(first: dict[str, Any], *others: dict[str, Any]) -> str:
    """Describe in one line how perplexities (as `Perplexity.to_json` gives them) were measured.

    Several differ in nothing but their text.
    """
    texts = [
        f"{found['data']}{f', split {split}' if (split := found['split']) else ''}, "
        f"{found['windows']} windows"
        for found in (first, *others)
    ]
    bos = "a BOS before each window" if first["bos"] else "no BOS"
    return (
        f"Perplexity: {'; '.join(texts)}{';' * bool(others)} of {first['seq_len']} tokens without "
        f"overlap, {bos}, fp32, checkpoint re-read from disk."
    )


def recovered(record: Record) -> str:
    """Say how the checkpoint was recovered, a sentence for each run; empty if it was not."""
    return " ".join(map(_recovered, record.recovery or ()))


def _recovered(run: dict[str, Any]) -> str:
    rank, texts = run["recipe"]["lora_rank"], run["perplexity_before"]
    before = ", ".join(f"{found['value']:.2f} on {found['data']}" for found in texts)
    return (
        f"Recovered by distillation on {run['tokens']:,} tokens of {run['text']['name']} from "
        f"{run['teacher']} ({f'LoRA of rank {rank}, merged' if rank else 'all weights'}): loss on "
        f"held-out blocks {run['before']:.3f} -> {run['after']:.3f}"
        f"{f'; perplexity before it {before}' if before else ''}."
    )


def weight_bytes(record: Record) -> tuple[int, int]:
    """Return the bytes of the weights (dense, pruned), both in the checkpoint's dtype."""
    params, after = record.params, record.results["weight_bytes"]
    return after * params["total_before"] // params["total_after"], after


def recorded(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """Return (title, table) for each result that `record` has stored: tasks and speed."""
    titles = {"zero_shot": "Zero-shot tasks", "speed": "Speed"}
    results = record.results
    return [(title, results[name]) for name, title in titles.items() if name in results]


def model_card(record: Record) -> str:
    """Return README.md of a checkpoint, with the front matter that model hubs read."""
    recipe = record.recipe
    table = markdown_table(("", "dense", "pruned", ""), size_rows(record))
    layers = markdown_table(("layer", *kept_units(record)), layer_rows(record))
    settings = "\n".join(f"- {key}: `{value}`" for key, value in recipe.items())
    measured = "".join(
        f"## {title}\n\n{markdown_table(found['head'], found['rows'])}\n\n"
        f"{found['measured_on']}\n\n"
        for title, found in recorded(record)
    )
    use = "\n\n".join(
        f"{where}:\n\n```{language}\n{code}\n```" for where, language, code in how_to_run(record)
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [grasp, pruned]
---
# {Path(record.model).name}, pruned to {record.kept_part:.2%}

{how_made(record)}

{table}

{measured_on(record)}

{measured}## Use

{use}

## Kept units

![kept widths of every layer](layers.png)

{layers}

The indices of all kept units are in `grasp.json`.

## Recipe

{calibrated_on(record)}

{settings}
{recovery_recipe(record)}"""


def recovery_recipe(record: Record) -> str:
    """The section of a model card on recovery; empty if there was none."""
    if not record.recovery:
        return ""
    settings = "\n".join(
        f"- {key}: `{value}`" for key, value in record.recovery[-1]["recipe"].items()
    )
    return f"\n## Recovery\n\n{recovered(record)}\n\n{settings}\n"


def calibrated_on(record: Record) -> str:
    """Name the calibration text, and the blocks of each of its parts, in one sentence."""
    text, recipe = record.calibration or {}, record.recipe
    each = " and ".join(f"{part['blocks']}" for part in text.get("parts", []))
    return (
        f"Calibrated on {text['name']} ({text['tokens']:,} tokens read, {recipe['samples']} blocks "
        f"of {recipe['seq_len']} tokens used{f': {each}' if each else ''})."
    )


COMPENSATED = {
    "refit": "; the remaining weights were refitted by least squares",
    "blocks": "; the remaining weights learned, layer by layer, to give the dense hidden states",
    "bias": "; added biases restore the mean output of the removed units",
    "none": "",
}


def how_made(record: Record) -> str:
    """Describe in three sentences how the checkpoint was made."""
    recipe = record.recipe
    method = "GRASPrune (arXiv 2604.19398)" if recipe["method"] == "learned" else recipe["method"]
    after = COMPENSATED[recipe["compensate"]]
    kinds = [kind for kind in KINDS if kind in kept_units(record)]
    what = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    what = what[0].upper() + what[1:]
    tuned = "The model was not fine-tuned as a whole"
    if record.recovery:
        tuned = f"The model was then recovered by distillation on {record.recovery_tokens:,} tokens"
    return (
        f"Made with grasp {record.grasp_version}. {what} were selected by "
        f"{method} and removed under a hard budget{after}. {tuned}; its weights are dense."
    )


def how_to_run(record: Record) -> list[tuple[str, str, str]]:
    """Return (where, language, code) for each runtime; a stock class does not need grasp."""
    ours = record.results["architecture"].startswith("Grasp")
    first = "import grasp  # or pass trust_remote_code=True to both calls below\n" if ours else ""
    load = f"""{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""
    serve = "vllm serve PATH"
    if ours:
        serve += "  # with grasp installed in the same environment, or --trust-remote-code"
    gguf = """grasp export PATH --to gguf --out model.gguf
llama-server -m model.gguf"""
    ways = [
        ("In transformers", "python", load),
        ("In vLLM", "sh", serve),
        ("In llama.cpp, if it supports this family", "sh", gguf),
    ]
    if ours:
        uniform = "grasp export PATH --to hf-uniform --out FOLDER"
        ways.append(("In any other runtime, as a stock model padded with zeros", "sh", uniform))
    return [*ways, ("To verify the checkpoint", "sh", "grasp verify PATH")]


def layer_figure(record: Record) -> Figure:
    """Plot the kept units of every layer as bars, kind by kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds = kept_units(record)
    figure = Figure(figsize=(8, 2.1 * len(kinds)), layout="constrained")
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, layers) in zip(rows, kinds.items(), strict=True):
        index = range(len(layers))
        kept, of = zip(*layers, strict=True)
        axes.bar(index, of, color="#e4e7ec", label="dense")
        axes.bar(index, kept, color="#2f6f9f", label="kept")
        axes.set_ylabel(title)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("layer")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table."""
    lines = [tuple(head), tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
