"""Train LoRA on a sparse checkpoint: perplexity before, after, and merged under the mask.

    python -m benchmarks.sparse_lora DIR --text FILE --eval-text FILE --steps 200

An unmerged adapter leaves the weights sparse. Merging makes them dense; merging under the mask
keeps them sparse, at a loss. Both are evaluated in fp32 on the same windows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gate_training import machine
from benchmarks.rows import RESULTS, write
from grasp.data.blocks import token_blocks
from grasp.data.corpus import read_corpus
from grasp.evaluate.perplexity import perplexity
from grasp.gates.objective import next_token_loss
from grasp.gates.training import finite_mean
from grasp.model.load import load_model, pick_device
from grasp.sparsity.blocks import linears_of


def add_lora(model: PreTrainedModel, *, rank: int, seed: int) -> Any:
    """The model with a LoRA adapter of `rank` on every linear of its decoder blocks."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    return get_peft_model(model, config)


def train(adapted: Any, blocks: Tensor, *, steps: int, lr: float) -> list[float]:
    """A step of AdamW for each of int64 [samples, seq_len], over and over; returns the losses."""
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids = blocks[step % len(blocks)].to(adapted.device)[None]
        loss = next_token_loss(adapted.get_base_model(), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(finite_mean([loss.detach()], step + 1))
    return losses


@torch.no_grad()
def merge_under_mask(adapted: Any, masks: dict[str, Tensor]) -> PreTrainedModel:
    """The adapter added to the weights and the zeros put back. masks: bool, by linears' names."""
    merged: PreTrainedModel = adapted.merge_and_unload()
    for name, linear in linears_of(merged).items():
        linear.weight *= masks[name]
    return merged


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="a checkpoint of grasp sparsify")
    parser.add_argument("--text", required=True, help="text to train on")
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--steps", type=int, default=200, help="of one block each")
    parser.add_argument("--samples", type=int, default=200, help="blocks of text")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_lora.json")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    model, tokenizer = load_model(options.folder, dtype=torch.float32, device=device)
    corpus = read_corpus(options.text, tokenizer)
    evaluation = read_corpus(options.eval_text, tokenizer, split="test")
    blocks = token_blocks(
        corpus, seq_len=options.seq_len, samples=options.samples, seed=options.seed
    )

    def score(model: Any) -> float:
        windows, length = options.eval_windows, options.eval_seq_len
        return perplexity(model, evaluation, seq_len=length, windows=windows).value

    masks = {name: linear.weight != 0 for name, linear in linears_of(model).items()}
    summary = json.loads((options.folder / "grasp.json").read_text())
    results = {
        "sparse": {key: summary["recipe"][key] for key in ("model", "method", "pattern")},
        "settings": {k: getattr(options, k) for k in ("steps", "seq_len", "rank", "lr", "seed")}
        | {"text": corpus.to_json(), "eval_text": evaluation.to_json()}
        | {"eval_windows": options.eval_windows, "eval_seq_len": options.eval_seq_len},
        "machine": machine(device),
        "before": score(model),
    }
    adapted = add_lora(model, rank=options.rank, seed=options.seed)
    results["trained_parameters"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    results["losses"] = train(adapted, blocks, steps=options.steps, lr=options.lr)
    results["unmerged"] = score(adapted.get_base_model())
    results["merged_under_mask"] = score(merge_under_mask(adapted, masks))
    write(results, options.out)
    for name in ("before", "unmerged", "merged_under_mask"):
        print(f"{name}: {results[name]:.2f}")


if __name__ == "__main__":
    main()
