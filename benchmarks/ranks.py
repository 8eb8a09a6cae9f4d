"""Tokens per second while gates learn: ranks of torchrun against one process without it.

    python -m benchmarks.ranks [--case smollm2-135m] [--ranks 2] [--shard none] [--out JSON]

A model with random weights takes steps on the same tokens: one of SmolLM2-135M's shape in fp32, or
eight layers of Llama-2-7B's in bf16, on a GPU if there is one. Runs of one process and of N ranks,
a thread each, alternate. The best step of each counts, since other work on the machine makes steps
slower, never faster. CPU seconds are of all ranks together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
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
from grasp.model.load import pick_device, processor
from grasp.model.sharding import load_sharded
from grasp.model.units import UnitSpace

STEPS = 3  # timed, in each run


@dataclass(frozen=True)
class Case:
    """The shape of a Llama, and the blocks of a step."""

    shape: dict[str, Any]
    dtype: torch.dtype
    blocks: int
    seq_len: int
    at_once: int  # blocks, on a rank


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA2 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,  # of 32
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
CASES = {
    "smollm2-135m": Case(SMOLLM2, torch.float32, blocks=4, seq_len=128, at_once=1),
    "llama-2-7b": Case(LLAMA2, torch.bfloat16, blocks=4, seq_len=2048, at_once=4),
    "tiny": Case(TINY, torch.float32, blocks=4, seq_len=16, at_once=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", choices=CASES, default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2, help="of torchrun, on this machine")
    parser.add_argument("--shard", choices=("none", "full"), default="none")
    parser.add_argument("--rounds", type=int, default=3)
    torchrun.main(
        parser,
        compare=lambda asked: compare(asked.case, asked.ranks, asked.shard, asked.rounds),
        of_rank=lambda asked: _steps(asked.rank_of, CASES[asked.case], asked.shard),
    )


def compare(case: str, ranks: int, shard: str, rounds: int) -> dict[str, Any]:
    """The steps of one process and of ranks, in turns, and the ratios of the best."""
    own = CASES[case]
    steps: dict[str, list[dict[str, float]]] = {"one_process": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **own.shape)
        AutoModelForCausalLM.from_config(config, dtype=own.dtype).save_pretrained(folder)
        arguments = "benchmarks.ranks", folder, f"--case={case}"
        for _ in range(rounds):
            steps["one_process"] += _slowest([torchrun.in_one_process(*arguments)])
            steps["torchrun"] += _slowest(torchrun.on_ranks(ranks, *arguments, f"--shard={shard}"))
    best, least = (
        {how: min(step[of] for step in found) for how, found in steps.items()}
        for of in ("seconds", "cpu_seconds")
    )
    tokens = own.blocks * own.seq_len
    return {
        "command": f"python -m benchmarks.ranks --case {case} --ranks {ranks} --shard {shard} "
        f"--rounds {rounds}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor(torch.device(pick_device("auto"))),
        "cpus": os.cpu_count(),
        "tokens_a_step": tokens,
        "steps": steps,
        "tokens_per_second": {how: round(tokens / best[how], 1) for how in best},
        "ratio": round(best["one_process"] / best["torchrun"], 3),
        "ratio_by_cpu_time": round(ranks * least["one_process"] / least["torchrun"], 3),
    }


def _slowest(ranks: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Seconds of the slowest rank, and CPU seconds of all, for each step."""
    return [
        {"seconds": max(wall for wall, _ in each), "cpu_seconds": sum(cpu for _, cpu in each)}
        for each in zip(*(rank["steps"] for rank in ranks), strict=True)
    ]


def _steps(folder: Path, case: Case, shard: str) -> dict[str, Any]:
    """Wall and CPU seconds of each step on this rank."""
    device = pick_device("auto")
    model: Any
    if shard == "full":
        model = load_sharded(folder, "full", None, device)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=device)
        model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (case.blocks, case.seq_len), generator=generator)
    batch, zero = Batch(ids.to(device)), torch.zeros((), device=device)
    space = UnitSpace.of(model)
    theta = torch.ones(space.size, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([theta])
    found = []
    with gated(model, space) as gates:
        step = Step(model, gates, theta, lambda z, _: z.clone(), optimizer, case.at_once)
        for _ in range(STEPS + 1):
            distributed.everywhere(None)  # all start together
            wall, cpu = time.perf_counter(), time.process_time()
            float(step(batch, zero))  # waits for a GPU
            found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"steps": found[1:]}


if __name__ == "__main__":
    main()
