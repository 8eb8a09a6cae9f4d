"""Measure whether the errors of quantisation and pruning add up or amplify each other.

    python -m benchmarks.quantisation DIR --against MODEL --text FILE [--types q8_0,q5_0,q4_0]

The gguf package converts every matrix of both models to one of llama.cpp's types and back;
perplexity is computed in fp32. If the errors only add up in the loss, quantisation multiplies both
perplexities by the same factor. `excess` is the ratio of the two factors, pruned over dense: 1 if
the errors only add up. Rows whose length is not a multiple of a type's block stay as they are, so
prune with --ffn-multiple 32. A model from a GGUF file already contains the error of its type.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from grasp.data.corpus import read_corpus
from grasp.evaluate.perplexity import perplexity
from grasp.model.load import load_model, pick_device
from grasp.report.summary import how_measured, markdown_table


@torch.no_grad()
def through(model: PreTrainedModel, kind: GGMLQuantizationType) -> PreTrainedModel:
    """A copy of an fp32 model whose matrices have been quantised and dequantised."""
    model = copy.deepcopy(model)
    block, _ = GGML_QUANT_SIZES[kind]
    for weight in model.parameters():
        if weight.dim() == 2 and weight.shape[1] % block == 0:
            values = dequantize(quantize(weight.cpu().numpy(), kind), kind)
            weight.copy_(torch.from_numpy(values))
    return model


def measure(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of each model as it is and through each type."""
    result: dict[str, Any] = {"models": names, "perplexity": {}}
    kinds = options.types.split(",")
    for name in names:
        device = pick_device(options.device)
        model, tokenizer = load_model(name, dtype=torch.float32, device=device)
        corpus = read_corpus(options.text, tokenizer, split="test")
        found = {}
        for kind in ["fp32", *kinds]:
            taken = model if kind == "fp32" else through(model, GGMLQuantizationType[kind.upper()])
            measured = perplexity(taken, corpus, seq_len=options.seq_len, windows=options.windows)
            found[kind] = measured.value
            settings = measured.to_json()
            result["evaluation"] = {k: settings[k] for k in settings if k not in ("value", "nll")}
            print(f"{name}, {kind}: {measured.value:.2f}", flush=True)
        result["perplexity"][name] = found
    return result


def table(result: dict[str, Any]) -> str:
    pruned, dense = (result["perplexity"][name] for name in result["models"])
    rows = []
    for kind in dense:
        factors = [found[kind] / found["fp32"] for found in (dense, pruned)]
        cells = [f"{dense[kind]:.2f}", f"{pruned[kind]:.2f}", *(f"{f:.4f}" for f in factors)]
        rows.append([kind, *cells, f"{factors[1] / factors[0]:.4f}"])
    head = ["type", "dense", "pruned", "dense, × fp32", "pruned, × fp32", "excess"]
    how = how_measured(result["evaluation"])
    return f"{markdown_table(head, rows)}\n\n{how} Quantised in memory."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="pruned checkpoint")
    parser.add_argument("--against", required=True, help="the dense model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--types", default="q8_0,q5_0,q4_0")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(argv)
    result = measure([options.model, options.against], options)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
