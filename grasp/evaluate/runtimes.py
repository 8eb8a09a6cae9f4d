"""Runtimes that are timed in this process: transformers, or llama.cpp for a .gguf file.

Each runs the same prompts through one prefill, with the head on the last token only, then decodes
greedily from its KV cache, token by token. Both check what they ran before they report a time.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor
from transformers import StaticCache

from grasp.config import Dtype
from grasp.errors import GraspError, install, reason
from grasp.model.header import read_header
from grasp.model.load import load_model, longest, packed_errors, pick_dtype, torch_dtype
from grasp.model.source import Source, resolve

open_url = build_opener(ProxyHandler({})).open  # no proxy for a local server
WARM_STEPS = 3  # at least: a compiled step becomes a CUDA graph on its second call


@dataclass(frozen=True)
class Benched:
    """One model: its runtime, and its size in bytes."""

    model: str
    runtime: str
    dtype: str  # of the weights
    disk_bytes: int  # of the files that hold the weights
    memory_bytes: int  # of the weights as loaded for computation
    kv_dtype: str
    kv_bytes_per_token: float  # of the cache itself, after the largest case
    kv_bytes_per_token_planned: int  # by config.json or the GGUF header
    cache_tokens: int | None = None  # that the KV cache has room for, if a server limits it


class Run(NamedTuple):
    """One repetition of a shape."""

    prefill: float  # seconds until every sequence of the batch has its first token
    decode: float  # seconds per step, which adds one token to each sequence


class Runner(Protocol):
    """What runs and times one model."""

    name: str
    limit: int  # tokens of a sequence
    vocabulary: int

    @property
    def packages(self) -> tuple[str, ...]: ...  # whose versions matter
    def warm_up(self, ids: Tensor, tokens: int) -> None: ...
    def run(self, ids: Tensor, tokens: int) -> Run: ...
    def cache_bytes_per_token(self) -> float: ...
    def describe(self, kv_bytes: float) -> Benched: ...


class Transformers:
    """A model in transformers, on a CPU or a GPU.

    `compiled` runs the decode step through torch.compile (with CUDA graphs on a GPU), on a static
    cache with room for the prompt and all tokens.
    """

    packages = ("torch", "transformers")

    def __init__(
        self, name: str, dtype: Dtype, device: str, trust_remote_code: bool, compiled: bool = False
    ) -> None:
        self.name, self.source = name, resolve(name)
        self.header = read_header(name)
        self.model: Any = load_model(
            name,
            dtype=torch_dtype(pick_dtype(dtype, device)),
            device=device,
            trust_remote_code=trust_remote_code,
        )[0]
        self.vocabulary = self.header.vocab_size
        self.limit = longest(self.model)
        self._cache_bytes_per_token = 0.0
        self._compiled = compiled
        self._step: Any = self.model
        if compiled:
            mode = "reduce-overhead" if self.model.device.type == "cuda" else "default"
            self._step = torch.compile(self.model, mode=mode)
        self._static: StaticCache | None = None  # for the shape that was warmed up

    @torch.inference_mode()
    def warm_up(self, ids: Tensor, tokens: int) -> None:
        """Run a shape for the first time; this compiles the decode step if `compiled`.

        Raises GraspError unless decoding from the cache gives the logits of one full pass.
        """
        if self._compiled:
            room = ids.shape[1] + tokens
            self._static = StaticCache(self.model.config, max_cache_len=room)
        try:
            with packed_errors(self.name, self.model):
                for _ in range(-(-WARM_STEPS // tokens)):
                    _, sequence, logits = self._run(ids, tokens)
        except torch._dynamo.exc.TorchDynamoException as failed:
            raise GraspError(
                f"`compile`: torch cannot compile {self.name} ({reason(failed)}): install a C++ "
                "compiler such as g++ if that is what it lacks, or leave `compile` out"
            ) from failed
        whole = self.model(sequence, use_cache=False, logits_to_keep=1).logits.float()
        error = ((logits.float() - whole).norm() / whole.norm()).item()
        # quantised weights are multiplied in 16 bit, whatever the model's dtype
        dtype = torch.float16 if self.header.quantised else self.model.dtype
        if not error <= torch.finfo(dtype).eps ** 0.5:  # not >: NaN must fail too
            raise GraspError(
                f"{self.name} computes something else from its KV cache: relative error {error:.1e}"
                " of the logits; nothing was timed (`grasp verify` tells whether it is damaged)"
            )

    @torch.inference_mode()
    def run(self, ids: Tensor, tokens: int) -> Run:
        """Time one prefill of `ids` int64 [batch, prompt], and `tokens` decode steps."""
        return self._run(ids, tokens)[0]

    def _run(self, ids: Tensor, tokens: int) -> tuple[Run, Tensor, Tensor]:
        """Return the run, its input tokens [batch, prompt + tokens], and the last logits."""
        ids = ids.to(self.model.device)
        if self._static is not None:
            self._static.reset()
        start = self._now()
        out = self.model(ids, past_key_values=self._static, use_cache=True, logits_to_keep=1)
        token = out.logits.argmax(-1)
        middle = self._now()
        cache = out.past_key_values
        held = sum(
            tensor.numel() * tensor.element_size()
            for layer in cache.layers
            if hasattr(layer, "keys")  # other layers have states, of one size for any length
            for tensor in (layer.keys, layer.values)
        )
        places = ids.shape[1] + (tokens if self._compiled else 0)
        self._cache_bytes_per_token = held / (ids.shape[0] * places)
        sequence = [ids]
        resumed = self._now()
        for _ in range(tokens):
            sequence.append(token)
            out = self._step(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits.argmax(-1)
        run = Run(middle - start, (self._now() - resumed) / tokens)
        return run, torch.cat(sequence, dim=1), out.logits

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def cache_bytes_per_token(self) -> float:
        """Return the cache bytes per token of the last run, after its prefill."""
        return self._cache_bytes_per_token

    def describe(self, kv_bytes: float) -> Benched:
        kind = str(self.model.dtype).removeprefix("torch.")
        tensors = [*self.model.parameters(), *self.model.buffers()]  # tied ones once
        return Benched(
            model=self.name,
            runtime=f"torch {version('torch')} and transformers {version('transformers')}",
            dtype=kind,
            disk_bytes=weight_files_bytes(self.source),
            memory_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            kv_dtype=kind,
            kv_bytes_per_token=kv_bytes,
            kv_bytes_per_token_planned=self.header.space.kv_cache_bytes_per_token(
                self.model.dtype.itemsize
            ),
        )


class LlamaCpp:
    """A .gguf file in llama.cpp, whose own server times prefill and decode."""

    packages = ("xllamacpp",)

    def __init__(self, name: str, device: str, batch: int, longest: int) -> None:
        self.name, self.path = name, Path(name).expanduser()
        self.header = read_header(name)
        try:
            import xllamacpp
        except ImportError:
            raise GraspError(
                f"{name} runs in llama.cpp, which is not installed: {install('llama-cpp')}"
            ) from None
        kinds = xllamacpp.ggml_backend_dev_type
        gpus = [
            found
            for found in xllamacpp.get_device_info()
            if found["type"] != kinds.GGML_BACKEND_DEVICE_TYPE_CPU
        ]
        if device != "cpu" and not gpus:
            raise GraspError(
                f"the installed xllamacpp sees no GPU for `device={device!r}`: install its build "
                "for yours, or use `device='cpu'`"
            )
        self._folder = tempfile.TemporaryDirectory()  # for saved caches, to measure them
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_parallel, params.n_ctx = batch, batch * (longest + 8)
        params.n_batch = batch * longest  # so that one decode call reads all prompts of a batch
        params.n_gpu_layers = 0 if device == "cpu" else 999
        if device != "cpu":  # a single GPU, as in torch
            params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = torch.device(device).index or 0
        threads = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = params.ui = False
        params.cache_ram_mib, params.verbosity = 0, -1
        params.slot_save_path = f"{self._folder.name}/"
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # its message holds the reason
            raise GraspError(f"llama.cpp cannot load {name}: {reason(error)}") from error
        self._meta = self._ask("/v1/models")["data"][0]["meta"]
        self._slots: list[int] = []
        self.vocabulary, self.limit = self._meta["n_vocab"], self._meta["n_ctx_train"]

    def warm_up(self, ids: Tensor, tokens: int) -> None:
        """Run a shape for the first time."""
        self.run(ids, tokens)

    def run(self, ids: Tensor, tokens: int) -> Run:
        """Time one prefill of `ids` int64 [batch, prompt], and `tokens` decode steps.

        Raises GraspError if llama.cpp took part of a prompt from a cache, or stopped early.
        """
        answers = self._ask(
            "/completion",
            prompt=ids.tolist(),
            n_predict=tokens + 1,  # the first one comes from the prefill
            temperature=0,
            ignore_eos=True,
            cache_prompt=False,
        )
        answers = answers if isinstance(answers, list) else [answers]
        timings = [answer["timings"] for answer in answers]
        for timed in timings:
            if (timed["prompt_n"], timed["predicted_n"]) != (ids.shape[1], tokens + 1):
                raise GraspError(
                    f"llama.cpp computed {timed['prompt_n']} prompt and {timed['predicted_n']} "
                    f"other tokens of {self.name} where {ids.shape[1]} and {tokens + 1} were asked "
                    "for: nothing was timed"
                )
        self._slots = [answer["id_slot"] for answer in answers]
        prefill, decode = (
            max(timed[key] for timed in timings) / 1e3 for key in ("prompt_ms", "predicted_ms")
        )
        return Run(prefill, decode / tokens)

    def cache_bytes_per_token(self) -> float:
        """Return the cache bytes per token of the last run, as saved by llama.cpp.

        They include a few bytes per cell that name its sequence.
        """
        saved = [self._ask(f"/slots/{s}?action=save", filename="slot") for s in self._slots]
        return sum(slot["n_written"] for slot in saved) / sum(slot["n_saved"] for slot in saved)

    def describe(self, kv_bytes: float) -> Benched:
        return Benched(
            model=self.name,
            runtime=f"llama.cpp (xllamacpp {version('xllamacpp')})",
            dtype=str(self._meta["ftype"]),
            disk_bytes=self.path.stat().st_size,
            memory_bytes=self._meta["size"],
            kv_dtype="float16",
            kv_bytes_per_token=kv_bytes,
            kv_bytes_per_token_planned=self.header.space.kv_cache_bytes_per_token(2),
        )

    def _ask(self, path: str, **body: Any) -> Any:
        head = {"Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        try:
            with open_url(Request(self._server.listening_address + path, data, head)) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read().decode()
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            raise GraspError(f"llama.cpp refused to run {self.name}: {said}") from None
        except OSError as error:
            raise GraspError(f"llama.cpp stopped while it ran {self.name}: {error}") from None


def weight_files_bytes(source: Source) -> int:
    """Return the bytes of the files that hold a model's weights; a hub model is on disk already."""
    location = source.location
    if source.kind == "gguf":
        return Path(location).stat().st_size
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        location = snapshot_download(
            location, allow_patterns="*.safetensors", local_files_only=True
        )
    return sum(file.stat().st_size for file in Path(location).glob("*.safetensors"))


def is_for_llama_cpp(name: str) -> bool:
    """Return whether llama.cpp runs this model: a .gguf file, except for the demo model."""
    return resolve(name).kind == "gguf" and not name.startswith("demo:")
