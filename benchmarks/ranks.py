"""Tokens per second while gates learn: two ranks against one, each with one thread.

    python -m benchmarks.ranks [--rounds 3] [--shard none] [--out JSON]

A model of SmolLM2-135M's shape with random weights takes steps of four blocks of 128 tokens, in
fp32 on a CPU. Runs of one rank and of two alternate. The best step of each counts, since other
work on the machine makes steps slower, never faster. CPU seconds are of all ranks together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import torchrun
from grasp import distributed
from grasp.gates.gating import gated
from grasp.gates.objective import Batch
from grasp.gates.training import Step
from grasp.model.load import processor
from grasp.model.sharding import load_sharded
from grasp.model.units import UnitSpace

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
BLOCKS, SEQ_LEN = 4, 128
STEPS = 3  # timed, in each run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard", choices=("none", "full"), default="none")
    torchrun.main(
        parser,
        compare=lambda asked: compare(asked.rounds, asked.shard),
        of_rank=lambda asked: _steps(asked.rank_of, asked.shard),
    )


def compare(rounds: int, shard: str) -> dict[str, Any]:
    """The steps of one rank and of two, in turns, and the ratios of the best."""
    steps: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SMOLLM2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for _ in range(rounds):
            steps[1] += _run(1, folder, "none")
            steps[2] += _run(2, folder, shard)
    best, least = (
        {ranks: min(step[of] for step in found) for ranks, found in steps.items()}
        for of in ("seconds", "cpu_seconds")
    )
    return {
        "command": f"python -m benchmarks.ranks --rounds {rounds} --shard {shard}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "tokens_a_step": BLOCKS * SEQ_LEN,
        "steps": steps,
        "tokens_per_second": {n: round(BLOCKS * SEQ_LEN / best[n], 1) for n in best},
        "ratio": round(best[1] / best[2], 3),
        "ratio_by_cpu_time": round(2 * least[1] / least[2], 3),
    }


def _run(ranks: int, folder: str, shard: str) -> list[dict[str, float]]:
    """Seconds of the slowest rank, and CPU seconds of all, for each step."""
    found = torchrun.on_ranks(ranks, "benchmarks.ranks", folder, f"--shard={shard}")
    return [
        {"seconds": max(wall for wall, _ in each), "cpu_seconds": sum(cpu for _, cpu in each)}
        for each in zip(*(rank["steps"] for rank in found), strict=True)
    ]


def _steps(folder: Path, shard: str) -> dict[str, Any]:
    """Wall and CPU seconds of each step on this rank."""
    model: Any
    if shard == "full":
        model = load_sharded(folder, "full", None, "cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randint(3, 500, (BLOCKS, SEQ_LEN), generator=generator))
    space = UnitSpace.of(model)
    theta = torch.ones(space.size, requires_grad=True)
    found = []
    with gated(model, space) as gates:
        step = Step(model, gates, theta, lambda z, _: z.clone(), torch.optim.AdamW([theta]), 1)
        for _ in range(STEPS + 1):
            distributed.everywhere(None)  # all start together
            wall, cpu = time.perf_counter(), time.process_time()
            step(batch, torch.zeros(()))
            found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"steps": found[1:]}


if __name__ == "__main__":
    main()
