"""The probe: what a model computed when it was saved, for comparison with the model read back.

This file stands alone: `grasp verify` also runs its source in a process without grasp.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

# In a folder of its own: some runtimes read every *.safetensors beside config.json as weights.
PROBE = Path("verify", "probe.safetensors")
PROBE_TOKENS = 32
# In escapes: this source is an argument of a process, and some locales know only ASCII.
TEXT = (
    "The na\u00efve caf\u00e9 in \u6771\u4eac costs 3.14 \u20ac:\n    def f(x): return x**2  # <s>"
)


@dataclass(frozen=True)
class Probe:
    """Token ids and their logits, a text and its tokens, and where they were computed."""

    input_ids: Tensor  # int64 [1, 32]
    logits: Tensor  # [1, 32, vocabulary] in the model's dtype, on the CPU
    text: str  # empty in a checkpoint of an older release
    text_ids: list[int]
    environment: dict[str, str]  # torch, transformers, device, processor, threads

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokenizer: Any, environment: dict[str, str], seed: int = 0) -> Probe:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, PROBE_TOKENS)
        vocabulary = model.config.get_text_config().vocab_size
        input_ids = torch.randint(vocabulary, shape, generator=generator)
        logits = model(input_ids.to(model.device), use_cache=False).logits.cpu().contiguous()
        return cls(input_ids, logits, TEXT, tokenizer(TEXT).input_ids, environment)

    @classmethod
    def read(cls, folder: Path) -> Probe:
        tensors = load_file(folder / PROBE)
        with safe_open(folder / PROBE, framework="pt") as file:
            metadata = file.metadata()
        text, text_ids = metadata.pop("text", ""), tensors.get("text_ids", torch.tensor([]))
        return cls(tensors["input_ids"], tensors["logits"], text, text_ids.tolist(), metadata)

    def write(self, folder: Path) -> None:
        (folder / PROBE).parent.mkdir()
        tensors = {"input_ids": self.input_ids, "logits": self.logits}
        tensors["text_ids"] = torch.tensor(self.text_ids)
        save_file(tensors, folder / PROBE, metadata={**self.environment, "text": self.text})

    def compare(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Compare a model and tokenizer read from disk with the probe; return plain values."""
        with torch.no_grad():
            logits = model(self.input_ids.to(model.device), use_cache=False).logits.cpu()
        error = (logits.float() - self.logits.float()).abs().max() / self.logits.float().abs().max()
        widths = [_widths(layer) for layer in model.get_decoder().layers]
        return {
            "class": f"{type(model).__module__.split('.')[-1]}.{type(model).__name__}",
            "device": model.device.type,
            "dtype": str(self.logits.dtype),
            "finite": all(values.isfinite().all() for values in (logits, self.logits)),
            "bit_equal": torch.equal(logits, self.logits),
            "difference": error.item(),
            "ffn": [channels for channels, _, _ in widths],
            "kv": [groups for _, groups, _ in widths],
            "experts": [experts for _, _, experts in widths],
            "parameters": sum(p.numel() for p in model.parameters()),
            "same_tokens": not self.text or tokenizer(self.text).input_ids == self.text_ids,
            "environment": self.environment,
        }


def _widths(layer: Any) -> tuple[int, int, int]:
    """(FFN channels, KV groups, routed experts) of a decoder layer, by shapes; 0: none.

    In a mixture the FFN is the shared expert.
    """
    channels = groups = experts = 0
    children = list(layer.children())
    for child in layer.children():
        routed = getattr(child._modules.get("experts"), "down_proj", None)
        if isinstance(routed, Tensor):
            experts = routed.shape[0]
            children += child.children()
    for child in children:
        shapes = {name: m.weight.shape for name, m in child._modules.items() if _has_matrix(m)}
        for name in shapes.keys() & {"down_proj", "w2", "output_linear"}:
            channels = shapes[name][1]
        if hasattr(child, "head_dim") and shapes.keys() & {"k_proj", "qkv_proj"}:
            out = shapes.get("o_proj") or shapes["out_proj"]
            both = shapes["qkv_proj"][0] - out[1] if "qkv_proj" in shapes else None
            keys = shapes["k_proj"][0] if both is None else both // 2
            groups = keys // child.head_dim
    return channels, groups, experts


def _has_matrix(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2


def load_and_compare(folder: str, way: str) -> dict[str, Any]:
    """Load `folder` as a user does; return `Probe.compare`, and greedy tokens by either path."""
    if way == "grasp":
        import grasp  # noqa: F401
    else:
        sys.modules["grasp"] = None  # type: ignore[assignment]  # importing it fails
    probe = Probe.read(Path(folder))
    torch.set_num_threads(int(probe.environment["threads"]))  # the order of sums depends on it

    remote = way == "remote"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    sees = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    sees = sees or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model, loading = auto.from_pretrained(
        folder,
        dtype=probe.logits.dtype,
        use_safetensors=True,
        trust_remote_code=remote,
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            return {"error": f"{problem}: {sorted(loading[problem])}"}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())  # in fp32, below
    fits = torch.cuda.is_available() and needed < torch.cuda.mem_get_info()[0]
    model.to(probe.environment["device"] if fits else "cpu").eval()
    found = probe.compare(model, tokenizer)
    # In fp32: in bf16 the two round differently, so near-ties may give different tokens.
    model.float()
    first = probe.input_ids[:, :8].to(model.device)
    for name, use_cache in (("cached", True), ("uncached", False)):
        with torch.no_grad():
            found[name] = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=False,
                max_new_tokens=16,
                min_new_tokens=16,
                use_cache=use_cache,
            )[0].tolist()
    return found


def main() -> None:
    """`python probe.py FOLDER WAY RESULT`: write the result of `load_and_compare` as JSON."""
    folder, way, result = sys.argv[1:]
    try:
        found = load_and_compare(folder, way)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
