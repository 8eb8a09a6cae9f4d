"""Greedy tokens of checkpoints from vLLM, in a process of its own.

The first argument says how: JSON with `jobs` (name -> folder, prompts and options of `LLM`),
`tokens` to generate, `rounds`, and whether `grasp` may be imported. The second is the file for
what came out: name -> a list of rounds, or the error.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

asked = json.loads(Path(sys.argv[1]).read_text())
if not asked["grasp"]:
    os.environ["VLLM_PLUGINS"] = "none"
    sys.modules["grasp"] = None  # type: ignore[assignment]  # importing it fails

from vllm import LLM, SamplingParams  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each round, the tokens of each prompt and how many of it came from the prefix cache."""
    llm = LLM(
        job["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=1 << 26,
        trust_remote_code=not asked["grasp"],
        seed=0,
        **job["options"],
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    rounds = [llm.generate(prompts, GREEDY, use_tqdm=False) for _ in range(asked["rounds"])]
    return [
        {
            "tokens": [list(done.outputs[0].token_ids) for done in found],
            "cached": [done.num_cached_tokens for done in found],
        }
        for found in rounds
    ]


def send(job: dict[str, Any], pipe: Any) -> None:
    try:
        pipe.send(run(job))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")


came = {}
fork = multiprocessing.get_context("fork")  # vLLM is imported once, and fails in a child alone
for name, job in asked["jobs"].items():
    ours, theirs = fork.Pipe()
    child = fork.Process(target=send, args=(job, theirs))
    child.start()
    theirs.close()
    try:
        came[name] = ours.recv()
    except EOFError:
        came[name] = "it crashed"
    child.join()
    Path(sys.argv[2]).write_text(json.dumps(came))
