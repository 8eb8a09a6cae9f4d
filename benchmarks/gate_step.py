"""Time of one gate-learning step: the published form against grasp's, on one model, in one run.

    python -m benchmarks.gate_step [--device cpu|cuda] [--small] [--out JSON]

A repetition is a short training of each, in alternating order. Ours is `grasp.select.learn_scores`
as `grasp prune` calls it, schedule included: over the first half of its steps the budget is still
shrinking, and steps are dearer. Not counted is what either does once a run: loading, our Fisher
start. Nothing is timed unless both compute the same logits and gradients under the same mask.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import published
from grasp.budget import Budget
from grasp.config import PruneConfig
from grasp.gating import GateSite, gated
from grasp.models import cast, load_model, pick_device
from grasp.projection import Projection
from grasp.select import LearnSettings, learn_scores
from grasp.training import Journal, TrainSettings
from grasp.units import UnitSpace

SLACK = 1e-3  # of relative error, for the other order of fp32 sums
QUANTILES = {"median": 0.5, "q10": 0.1, "q90": 0.9}


def compare(model: PreTrainedModel, blocks: Tensor, keep: float, repetitions: int) -> dict:
    """Seconds a step of both, blocks int64 [steps, seq_len] being one repetition."""
    config = PruneConfig("", Budget("keep", keep, ffn_multiple=1))
    settings = LearnSettings(TrainSettings(epochs=1), config.anneal, config.gate_site)
    projection = Projection(UnitSpace.of(model), config.budget, device=model.device)
    start = torch.zeros(projection.space.size, device=model.device)

    def theirs() -> None:
        with published.training(model, keep) as trainer:
            for block in blocks:
                trainer.step(block[None])

    def ours() -> None:
        learn_scores(model, projection, start, blocks, settings, Journal())

    sides = {"theirs": theirs, "ours": ours}
    for run in sides.values():  # compilers and allocators warm up
        run()
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for repetition in range(repetitions):
        for side in list(sides)[:: -1 if repetition % 2 else 1]:
            times[side].append(timed(sides[side], model.device, len(blocks)))

    wall, cpu = ({s: [pair[i] for pair in t] for s, t in times.items()} for i in (0, 1))
    return {
        clock: {
            **{side: spread(seconds) for side, seconds in measured.items()},
            "theirs/ours": spread(
                [a / b for a, b in zip(measured["theirs"], measured["ours"], strict=True)]
            ),
        }
        for clock, measured in (("wall_seconds", wall), ("process_cpu_seconds", cpu))
    }


def agreement(model: PreTrainedModel, ids: Tensor, keep: float) -> dict[str, dict[str, float]]:
    """Relative errors of both forms under one random mask, against the published form in fp32.

    Of the logits, ours with gates where grasp has them, and of the gates' gradient, ours with gates
    on K and V. Raises ValueError where ours is off by more than twice the rounding of theirs.
    """
    space, dtype = UnitSpace.of(model), model.dtype
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(0))
    mask = Projection(space, Budget("keep", keep, ffn_multiple=1))(scores)
    z = mask.float().to(model.device).requires_grad_()

    def outcome() -> dict[str, Tensor]:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        (gradient,) = torch.autograd.grad(out.loss, z)
        return {"logits": out.logits.detach().float(), "gradient": gradient}

    def theirs() -> dict[str, Tensor]:
        with published.training(model, keep):
            published.set_gates(model, space, z)
            return outcome()

    def ours(site: GateSite) -> dict[str, Tensor]:
        with gated(model, space, site) as gates:
            gates.set(z)
            return outcome()

    cast(model, torch.float32)
    exact = theirs()
    cast(model, dtype)
    at_output, at_kv = ours("output"), ours("kv")
    forms = {
        "theirs": theirs(),
        "ours": {"logits": at_output["logits"], "gradient": at_kv["gradient"]},
    }
    errors = {
        what: {
            form: ((found[what] - exact[what]).norm() / exact[what].norm()).item()
            for form, found in forms.items()
        }
        for what in exact
    }
    if not all(e["ours"] <= 2 * e["theirs"] + SLACK for e in errors.values()):
        raise ValueError(f"the two forms do not compute the same: relative errors {errors}")
    return errors


def timed(run: Callable[[], None], device: torch.device, steps: int) -> tuple[float, float]:
    """(wall, process CPU) seconds a step."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    sample = torch.tensor(values, dtype=torch.float64)
    return {name: sample.quantile(q).item() for name, q in QUANTILES.items()}


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def machine(device: str) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}, {result['dtype']}, {result['seq_len']} tokens a step, "
        f"{result['repetitions']} repetitions of {result['steps']} steps; "
        f"{result['machine']['device']}, {result['machine']['threads']} threads",
        "",
        "| clock | published, ms | grasp, ms | ratio (10 % to 90 %) |",
        "|---|---|---|---|",
    ]
    for clock in ("wall_seconds", "process_cpu_seconds"):
        row = result[clock]
        theirs, ours = (1e3 * row[side]["median"] for side in ("theirs", "ours"))
        ratio = row["theirs/ours"]
        lines.append(
            f"| {clock.removesuffix('_seconds').replace('_', ' ')} | {theirs:.1f} | {ours:.1f} "
            f"| {ratio['median']:.2f} ({ratio['q10']:.2f} to {ratio['q90']:.2f}) |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--small", action="store_true", help="a tiny random model instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="in a repetition")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)

    device = pick_device(options.device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # as `grasp prune` chooses
    if options.small:
        options.model = "tiny random llama"
        model = small_model().to(device)
        cast(model, dtype)
    else:
        model, _ = load_model(options.model, dtype=dtype, device=device)
    shape = (options.steps, options.seq_len)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)

    result = {
        "model": options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "keep": options.keep,
        "seq_len": options.seq_len,
        "steps": options.steps,
        "repetitions": options.repetitions,
        "machine": machine(device),
        "relative_error": agreement(model, blocks[:1], options.keep),
        **compare(model, blocks, options.keep, options.repetitions),
    }
    print(report(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
