"""Describe a model from its `config.json` or GGUF header alone, without weights or torch.

A table holds the structure of the supported families, enough to count every parameter exactly. Any
other `model_type` is built on torch's meta device and read by structure, like a loaded model. This
is slower, and raises GraspError with the reason if the structure does not fit.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from grasp.errors import GraspError, reason
from grasp.model.source import quantisation, read_config, read_json, resolve
from grasp.model.stored import has_own_head
from grasp.model.units import LayerUnits, UnitSpace, why_whole

SWITCHES = ("attention_bias", "mlp_bias")  # config keys; together: biases in all projections
LONG_ARRAY = 4096  # longer arrays are the tokenizer's; the model's have one item per layer


@dataclass(frozen=True)
class Family:
    """The structure of a family. A bias is True, False or the config key that switches it on."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    fused_qkv: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # if the config has none; None: hidden_size / heads
    norms: int = 2  # per layer, each of the hidden size
    geglu: bool = False
    softcap: bool = False  # on attention scores
    tied: bool = False  # embeddings, if the config does not say
    gguf: str = "llama"  # llama.cpp's architecture for equal widths

    @property
    def carries_biases(self) -> bool:
        """Whether its config can give every projection a bias."""
        return (self.qkv_bias, self.mlp_bias) == SWITCHES

    @property
    def deci_lacks(self) -> str | None:
        """The operation that llama.cpp's per-layer architecture lacks; None if it has all."""
        return "GeGLU" if self.geglu else "norms on q and k" if self.qk_norm else None


_BIAS = ("attention_bias", "attention_bias")
_GEMMA = Family(*_BIAS, head_dim=256, geglu=True, tied=True, gguf="gemma")
FAMILIES = {
    "llama": Family(*_BIAS, "mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True, gguf="qwen2"),
    "qwen3": Family(*_BIAS, qk_norm=True, head_dim=128, gguf="qwen3"),
    "phi3": Family(fused_qkv=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4, softcap=True, gguf="gemma2"),
    "gemma3_text": replace(_GEMMA, norms=4, qk_norm=True, gguf="gemma3"),
}
# of experts, and llama.cpp's architectures for them: their weights are softmax values that sum to 1
MIXTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on length


@dataclass(frozen=True)
class Header:
    """A model as its config.json or GGUF header describes it."""

    space: UnitSpace
    family: str  # model_type, without the prefix of grasp's own classes
    facts: Family
    vocab_size: int
    source: str  # what was read
    whole: tuple[str, ...] = ()  # what stays whole in its layers, and why
    rope: str = "default"  # its type, with "partial" if only part of each head is rotated
    stored_bytes: int = 2  # per weight, if `load_model` gets no dtype
    longest: int | None = None  # sequence, in tokens, if the config says
    quantised: str | None = None  # the scheme, such as "gptq, 4 bit"
    stateful: bool = False  # some mixer keeps more than keys and values from token to token
    config: Mapping[str, Any] | None = field(default=None, repr=False)  # None for GGUF


def read_header(spec: str) -> Header:
    """Read the header of anything that `grasp.model.source.resolve` accepts, or a config.json.

    If the weights in a folder have a separate head, it is counted, whatever config.json says. For a
    hub model, whose weights may not be on disk yet, only config.json is read. Raises GraspError.
    """
    if spec.endswith(".json"):
        config, name = read_json(Path(spec)), spec
    else:
        source = resolve(spec)
        if source.kind == "gguf":
            return _from_gguf(Path(source.location))
        config, name = read_config(source), f"{source.location}: config.json"
        may_be_tied = source.kind == "folder" and config.get("tie_word_embeddings") is not False
        if may_be_tied and has_own_head(Path(source.location)):
            config["tie_word_embeddings"] = False
    if "model_type" not in config:
        raise GraspError(f"{name} names no model_type: expected the config.json of a model")
    return from_config(config)


def from_config(config: Mapping[str, Any]) -> Header:
    """The header of a config.json, with or without per-layer widths. Raises GraspError."""
    model_type = str(config.get("model_type"))
    name = model_type.removeprefix("grasp_")
    text = {**config, **(config.get("text_config") or {})}  # of a model that sees images, too
    known: dict[str, Any] = {
        "stored_bytes": 4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2,
        "longest": text.get("max_position_embeddings"),
        "quantised": quantisation(config),
        "config": config,
    }
    if name not in FAMILIES:
        return replace(_from_structure(json.dumps(config, default=str)), **known)
    family = FAMILIES[name]

    def has(switch: bool | str) -> bool:
        return bool(config.get(switch)) if isinstance(switch, str) else switch

    hidden, vocab = _size(config, "hidden_size"), _size(config, "vocab_size")
    head_dim = config.get("head_dim") or family.head_dim
    head_dim = head_dim or hidden // _size(config, "num_attention_heads")
    layers, fixed = [], 0
    # with ten layers or more, transformers writes the keys as 00, 01, ...
    overrides = {int(key): own for key, own in (config.get("per_layer_config") or {}).items()}
    for index in range(_size(config, "num_hidden_layers")):
        own = {**config, **overrides.get(index, {})}
        heads = _size(own, "num_attention_heads")
        groups = _size(own, "num_key_value_heads") if own.get("num_key_value_heads") else heads
        if heads % groups:
            raise GraspError(
                f"config.json: num_attention_heads is {heads}: expected a multiple of "
                f"num_key_value_heads, {groups}"
            )
        layer = LayerUnits(
            ffn=_size(own, "intermediate_size"),
            kv_groups=groups,
            group_size=heads // groups,
            head_dim=head_dim,
            channel_bias=2 * has(family.mlp_bias),
            group_bias=(heads // groups + 2) * head_dim * has(family.qkv_bias),
        )
        layers.append(layer)
        fixed += hidden * (family.norms + has(family.o_bias) + has(family.mlp_bias))
        fixed += 2 * head_dim * family.qk_norm
    embeddings = 1 if config.get("tie_word_embeddings", family.tied) else 2
    fixed += hidden * (embeddings * vocab + 1)  # one norm at the end
    space = UnitSpace(hidden, tuple(layers), fixed)
    return Header(space, name, family, vocab, "config.json", (), _rope(config), **known)


def of_model(model: Any) -> Header:
    """The header of a live model, on any device."""
    header = from_config(model.config.to_dict())
    return replace(header, space=UnitSpace.of(model), whole=why_whole(model))


def _rope(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise GraspError(f"config.json: the parameters of RoPE are {rope!r}: expected an object")
    rope = rope.get("full_attention", rope)  # of Gemma 3, beside that of its windows
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return kind if part == 1.0 else f"partial {kind}"


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise GraspError(f"config.json: {key} is {value!r}: expected a positive whole number")
    return value


@cache
def _from_structure(text: str) -> Header:
    """The header of a family that is not in the table. `text` is the whole config, as JSON."""
    import torch
    from transformers import AutoConfig

    import grasp.model.modeling_grasp  # noqa: F401  registers the classes of pruned models
    from grasp.model.load import auto_class

    config = json.loads(text)
    # with it, transformers would look for the library that reads quantised weights
    config.pop("quantization_config", None)
    try:
        own = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = auto_class(own).from_config(own)
    except Exception as error:  # a foreign model's code may raise anything
        raise GraspError(
            f"model_type {config['model_type']!r} is none of {', '.join(FAMILIES)}, and "
            f"transformers cannot build it either ({reason(error)})"
        ) from None
    space = UnitSpace.of(model)
    vocab = model.get_input_embeddings().weight.shape[0]
    qk_norm = any(name.endswith("q_norm.weight") for name, _ in model.named_parameters())
    own = model.config.get_text_config()
    switches = [switch if hasattr(own, switch) else False for switch in SWITCHES]
    facts = Family(qkv_bias=switches[0], mlp_bias=switches[1], qk_norm=qk_norm)
    name = config["model_type"].removeprefix("grasp_")
    how = "transformers, on the meta device"
    rope, stateful = _rope(own.to_dict()), model._is_stateful
    return Header(space, name, facts, vocab, how, why_whole(model), rope, stateful=stateful)


def _from_gguf(path: Path) -> Header:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class HeaderReader(GGUFReader):
        """Skips the tokenizer's long arrays, on which GGUFReader spends seconds."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = np.asarray(mapped)  # each slice of an np.memmap takes far longer

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                item_type, count = struct.unpack_from("<IQ", self.data.data, orig_offs)
                if count > LONG_ARRAY:
                    return self._end(orig_offs + 12, item_type, count) - orig_offs, [], [], []
            return super()._get_field_parts(orig_offs, raw_type)

        def _end(self, offset: int, item_type: int, count: int) -> int:
            """The end of an array whose first item is at `offset`."""
            scalar = self.gguf_scalar_to_np.get(GGUFValueType(item_type))
            if scalar is not None:
                return offset + count * np.dtype(scalar).itemsize
            data, read_length = self.data.data, struct.Struct("<Q").unpack_from
            for _ in range(count):
                offset += 8 + read_length(data, offset)[0]
            return offset

    try:
        reader = HeaderReader(path)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise GraspError(f"{path} is not a readable GGUF file ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items() if field.data}
    # [in, out], as in GGUF; rope_freqs holds constants that transformers computes
    shapes = {t.name: t.shape.tolist() for t in reader.tensors if not t.name.startswith("rope_")}
    family = str(fields.get("general.architecture"))
    try:
        vocab_size = shapes["token_embd.weight"][1]
        hidden = fields[f"{family}.embedding_length"]
        head_dim = fields.get(f"{family}.attention.key_length")
        head_dim = head_dim or hidden // fields[f"{family}.attention.head_count"]
        layers = tuple(
            _gguf_layer(shapes, f"blk.{index}", head_dim)
            for index in range(fields[f"{family}.block_count"])
        )
    except KeyError as error:
        raise GraspError(
            f"{path.name} ({family}) is not supported: it has no {error}, and a decoder with gated "
            "FFNs and q, k, v, o projections is expected"
        ) from None
    total = sum(map(prod, shapes.values()))
    space = UnitSpace(hidden, layers, total - UnitSpace(hidden, layers, 0).total_params)
    names = {facts.gguf: name for name, facts in reversed(FAMILIES.items())}
    name = names.get(family, family)
    facts = FAMILIES.get(name, Family())
    return Header(space, name, facts, vocab_size, "GGUF header", stored_bytes=4)  # dequantised


def _gguf_layer(shapes: Mapping[str, list[int]], block: str, head_dim: int) -> LayerUnits:
    q, k, v = (f"{block}.attn_{n}" for n in "qkv")
    gate, up = f"{block}.ffn_gate", f"{block}.ffn_up"
    kv_groups = shapes[f"{k}.weight"][1] // head_dim
    group_size = shapes[f"{q}.weight"][1] // head_dim // kv_groups
    widths = {q: group_size * head_dim, k: head_dim, v: head_dim}
    return LayerUnits(
        ffn=shapes[f"{gate}.weight"][1],
        kv_groups=kv_groups,
        group_size=group_size,
        head_dim=head_dim,
        channel_bias=sum(f"{name}.bias" in shapes for name in (gate, up)),
        group_bias=sum(width for name, width in widths.items() if f"{name}.bias" in shapes),
    )
