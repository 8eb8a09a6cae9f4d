"""Read a GGUF file as a plain model of its family, with dequantised weights."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grasp.errors import GraspError


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers read a GGUF file in half the time, and without its own progress bar.

    It parses the whole file once each for config, weights and tokenizer, and builds the table of
    tensor names once per module. The bar ignores transformers' switch, so stderr is captured.
    """
    gguf: Any = importlib.import_module("gguf")
    slow = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.cache(f) for f in slow)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = slow


@_parsed_once()
def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a file, dequantised to `dtype`, and its tokenizer. Raises GraspError."""
    _check_rope(file)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **options
    )
    # A model loaded from GGUF refuses save_pretrained: give its weights to a plain one.
    model_class = type(packed)
    values = packed.config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = [model_class.__name__]
    config = type(packed.config).from_dict(values)
    model = model_class.from_pretrained(
        None,
        config=config,
        state_dict=packed.state_dict(),
        dtype=dtype,
        attn_implementation="sdpa",
    )
    model.generation_config = GenerationConfig.from_model_config(config)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for name in ("bos_token", "eos_token", "pad_token"):  # 5.14 uses the EOS as BOS
        token_id = getattr(config, f"{name}_id")
        if isinstance(token_id, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    return model, tokenizer


def _check_rope(file: Path) -> None:
    """Raise GraspError for scaled rotary positions, which transformers ignores in GGUF."""
    reader = importlib.import_module("gguf").GGUFReader(str(file))
    kinds = [
        bytes(field.parts[-1]).decode()
        for name, field in reader.fields.items()
        if name.endswith(".rope.scaling.type")
    ]
    factors = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    if set(kinds) - {"none"} or any((f != 1).any() for f in factors):
        raise GraspError(
            f"{file} scales its rotary positions, which cannot be read from GGUF: name the Hugging "
            "Face folder of this model instead"
        )
