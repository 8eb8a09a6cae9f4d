"""Train a small mixture of experts on real text, and compare criteria on its experts.

    python -m benchmarks.experts [--folder out/experts] [--out benchmarks/results/experts.json]

A Qwen3-MoE of three layers with 32 experts each, of which a token is routed to two, learns most of
the built-in text until its loss shows that routing matters: about a minute on one core. The folder
gets the model, its tokenizer, the text that it learned, the text held out and `log.jsonl`: the loss
on text held out, the same with every token routed to random experts, the entropy of the router (1:
uniform) and the part of the tokens that each expert of each layer gets. Then `grasp compare` keeps
half of the experts by every criterion, with three seeds, which draw its blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import grasp
from benchmarks.gate_training import machine
from benchmarks.rows import RESULTS
from grasp.data.builtin import builtin_rows
from grasp.report.comparison import span
from grasp.report.summary import markdown_table

VOCABULARY, SEQ_LEN, BATCH = 1024, 128, 8
TEXT, HELD_OUT = "text.txt", "held_out.txt"
APART = 16  # every so many-th document is held out
LOOKED_AT = 32  # blocks of these, while the model learns
EXPERTS, PER_TOKEN = 32, 2
MATTERS = 2.0  # nats per token that random routing costs
BALANCE = 0.5  # weight of the loss that spreads the tokens of a layer over its experts
STEPS = 2000  # at most; the loss is looked at every EVERY steps
EVERY = 100
SAMPLES = 192  # blocks that a criterion reads
RATE, WARM_UP = 3e-3, 50
METHODS = ("learned", "reap", "fisher", "frequency", "random")
SPECIAL = ["<unk>", "<s>", "</s>"]


def train(folder: Path, *, seed: int = 0, steps: int = STEPS) -> list[dict[str, Any]]:
    """Train and save the model, until routing matters or for `steps`; return the log."""
    torch.manual_seed(seed)
    rows = builtin_rows()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(rows)
    parts = {HELD_OUT: rows[::APART], TEXT: [r for n, r in enumerate(rows) if n % APART]}
    for name, part in parts.items():
        (folder / name).write_text("\n\n".join(part), encoding="utf-8")
    held_out, text = (_blocks(tokenizer, part) for part in parts.values())
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / WARM_UP)
        batch = text[torch.randint(len(text), (BATCH,))]
        with _router_logits(model) as logits:
            loss = model(batch, labels=batch).loss
        (loss + BALANCE * sum(map(_imbalance, logits))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            log.append({"step": step, **_look(model, held_out[:LOOKED_AT])})
            if log[-1]["loss_random_routes"] - log[-1]["loss"] > MATTERS:
                break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps(line) + "\n" for line in log]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    return log


def measure(
    folder: Path, out: Path, methods: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[float]]:
    """The perplexity on the held-out text, by method and seed, of half of the experts.

    KV groups stay. `grasp.compare` makes and measures each, and writes its tables to `out`.
    """
    found = grasp.compare(
        folder,
        out,
        keep=0.5,
        methods=methods,
        seeds=seeds,
        units="ffn",
        calibration=str(folder / TEXT),
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        eval_text=(str(folder / HELD_OUT),),
        eval_seq_len=SEQ_LEN,
        device="cpu",
    )
    values: dict[str, list[float]] = {"dense": [found.summary["dense"]["perplexity"]["value"]]}
    for cell in found.summary["cells"]:
        values.setdefault(cell["method"], []).append(cell["perplexity"]["value"])
    return values


def _blocks(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> Tensor:
    """int64 [blocks, SEQ_LEN], in an order drawn at random."""
    ids = torch.tensor(tokenizer("\n\n".join(rows), verbose=False).input_ids)
    ids = ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def _model() -> Qwen3MoeForCausalLM:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.set_experts_implementation("grouped_mm")
    return model


def _tokenizer(rows: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        rows[:200],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet)
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


@torch.no_grad()
def _look(model: Any, ids: Tensor) -> dict[str, Any]:
    """Losses, router entropy and the load of each expert, on `ids` [blocks, SEQ_LEN]."""
    model.eval()
    with _router_logits(model) as logits:
        loss = model(ids, labels=ids).loss.item()
    with _random_routes(model):
        random = model(ids, labels=ids).loss.item()
    model.train()
    entropies, loads = [], []
    for own in logits:
        log_p = own.log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean().item())
        chosen = own.topk(PER_TOKEN).indices.flatten()
        loads.append((chosen.bincount(minlength=EXPERTS) / chosen.numel()).tolist())
    uniform = torch.tensor(float(EXPERTS)).log().item()
    return {
        "loss": loss,
        "loss_random_routes": random,
        "router_entropy": [entropy / uniform for entropy in entropies],
        "load": loads,
    }


@contextmanager
def _router_logits(model: Any) -> Iterator[list[Tensor]]:
    """The logits of each layer's router, [tokens, experts], in the list once the model has run."""
    logits: list[Tensor] = []

    def see(_: nn.Module, args: Any, output: Any) -> None:
        logits.append(output[0])

    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.mlp.gate.register_forward_hook(see))
        yield logits


def _imbalance(logits: Tensor) -> Tensor:
    """Switch's loss of one layer (arXiv 2101.03961): 1 if all experts get equally many tokens.

    transformers' own balances the sum over the layers, so that each may have experts without any.
    """
    chosen = logits.topk(PER_TOKEN).indices.flatten().bincount(minlength=EXPERTS)
    return EXPERTS * (chosen / chosen.sum() * logits.softmax(-1).mean(0)).sum()


@contextmanager
def _random_routes(model: Any) -> Iterator[None]:
    """Every token goes to experts drawn at random, with the weights that its own ones had."""
    generator = torch.Generator().manual_seed(0)

    def drawn(_: nn.Module, args: Any, output: Any) -> Any:
        scores, weights, index = output
        draw = torch.rand(scores.shape, generator=generator).topk(index.shape[-1]).indices
        return scores, weights, draw

    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.mlp.gate.register_forward_hook(drawn))
        yield


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/experts"))
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.json")
    parser.add_argument("--seeds", default="0,1,2", help="numbers separated by commas")
    options = parser.parse_args(argv)
    log = train(options.folder)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    with TemporaryDirectory() as out:
        found = measure(options.folder, Path(out) / "compared", METHODS, seeds)
    result = {
        "command": "python -m benchmarks.experts",
        "machine": machine("cpu"),
        "training": log,
        "keep": 0.5,
        "samples": SAMPLES,
        "seq_len": SEQ_LEN,
        "seeds": seeds,
        "perplexity": found,
    }
    if options.out.exists():  # what was added by hand stays
        result = json.loads(options.out.read_text()) | result
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [(method, span(values)) for method, values in found.items()]
    print(markdown_table(("method", "perplexity"), rows))


if __name__ == "__main__":
    main()
