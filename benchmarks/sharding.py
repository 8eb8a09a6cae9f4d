"""What a rank holds with `--shard full`, against one process and against the plan.

    python -m benchmarks.sharding [--shape tinyllama-1.1b] [--ranks 4] [--out JSON]

A model with random weights in bf16 is written, and read by one process and by N CPU ranks. Each
takes the gradient of gates on a block of text, while PyTorch's allocations are counted. What one
process needs beside the weights (activations, workspace) a rank needs too, so the weights' part of
a rank's peak is the peak less that. Counted are bytes, not time: any machine gives the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import torchrun
from grasp import distributed
from grasp.config import PruneConfig
from grasp.gates.gating import gated
from grasp.gates.objective import next_token_loss
from grasp.model.header import from_config
from grasp.model.sharding import load_sharded, own_part
from grasp.model.units import UnitSpace
from grasp.planning.ranks import Gpus, spread

SEQ_LEN = 16
STEPS = 3  # the least counts: if gloo's thread is the last to let go of a tensor, nobody sees it
GATHERING = ("gloo:all_gather", "c10d::_allgather_base_", "c10d::allgather_into_tensor_coalesced_")
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--ranks", type=int, default=4)
    torchrun.main(
        parser,
        compare=lambda asked: compare(asked.shape, asked.ranks),
        of_rank=lambda asked: _peak(asked.rank_of),
    )


def compare(shape: str, ranks: int) -> dict[str, Any]:
    """Peak bytes of one process and of each of N ranks, and what the plan says."""
    config = AutoConfig.for_model("llama", **SHAPES[shape], dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        whole = torchrun.in_one_process("benchmarks.sharding", folder)
        split = torchrun.on_ranks(ranks, "benchmarks.sharding", folder)
    beside = whole["peak"] - whole["held"]
    weights = min(rank["peak"] for rank in split) - beside
    planned = PruneConfig.of(
        "model",
        seq_len=SEQ_LEN,
        eval_seq_len=SEQ_LEN,
        accumulate=ranks,
        scales="unit",
        compensate="none",
    )
    (_, full) = spread(from_config(config.to_dict()), planned, 2, Gpus(ranks, 1, 1 << 40)).ways
    return {
        "command": f"python -m benchmarks.sharding --shape {shape} --ranks {ranks}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": {"name": shape, **SHAPES[shape]},
        "tokens": SEQ_LEN,
        "one_process": whole,
        "ranks": split,
        "weights_part": {"one_process": whole["held"], "rank": weights},
        "ratio": round(weights / whole["held"], 3),
        "planned": {**asdict(full.learning), "gathered": full.gathered},
        "planned_over_measured": round((full.learning.weights + full.gathered) / weights, 3),
    }


def _peak(folder: Path) -> dict[str, int]:
    """Bytes of the weights that this rank holds, and the most that a step adds to them."""
    model: PreTrainedModel
    if distributed.ranks() > 1:
        model = load_sharded(folder, "full", None, "cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)
    ids = torch.randint(3, 500, (1, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    space = UnitSpace.of(model)

    def step() -> None:
        z = torch.ones(space.size, requires_grad=True)
        gates.set(z)
        torch.autograd.grad(next_token_loss(model, ids), z)

    with gated(model, space) as gates:
        step()
        adds = min(_most(step) for _ in range(STEPS))
    held = sum(own_part(p).nbytes for p in model.parameters())
    return {"held": held, "step": adds, "peak": held + adds}


def _most(run: Callable[[], None]) -> int:
    """The most that PyTorch held at one time of what it has allocated since the call.

    Without gloo's own copy of what it gathers: NCCL, which is for GPUs, makes none.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, most, until = 0, 0, dict.fromkeys((e.start_thread_id() for e in events), 0)
    for event in events:
        thread = event.start_thread_id()
        if event.name() in GATHERING:
            until[thread] = event.end_ns()
        elif event.name() == "[memory]" and event.start_ns() > until[thread]:
            held += event.nbytes()
            most = max(most, held)
    return most


if __name__ == "__main__":
    main()
