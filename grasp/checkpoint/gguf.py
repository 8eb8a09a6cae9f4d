"""Write a model as one GGUF file, for llama.cpp and tools based on it.

Layers of different widths are written as `deci`, the only architecture of llama.cpp that accepts
query heads, KV heads and FFN channels per layer. Layers of equal widths are written as the family's
own architecture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.gguf_vocabulary import add_vocabulary
from grasp.errors import GraspError
from grasp.machine import check_room
from grasp.model.header import FAMILIES, MIXTURES, STATIC_ROPE
from grasp.model.units import UnitSpace, decoder_layers

FILE_TYPES = gguf.LlamaFileType.__members__  # MOSTLY_Q4_K_M and the like

# These rotate neighbouring values of a head as pairs (transformers pairs the first half with the
# second, so the rows of q and k are reordered), and read rope factors and every bias.
LLAMA_LIKE = ("llama", "deci")
GEMMA = ("gemma", "gemma2", "gemma3")  # their norms scale by 1 + weight
SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6}  # the last layer of a period attends to all tokens
LARGEST = {"gemma2": 46, "gemma3": 62}


def write_gguf(
    model: PreTrainedModel,
    tokenizer: Any,
    file: Path,
    *,
    type: str,
    progress: Callable[[int, int], None],
) -> tuple[str, str | None]:
    """Write the whole file; return its architecture and a note.

    `type` is the type of the matrices; norms and biases stay fp32. Matrices are converted one at a
    time. Raises GraspError if llama.cpp has no architecture, rope or tokenizer that computes the
    same as the model.
    """
    space = UnitSpace.of(model)
    architecture = _architecture(model, space)
    writer = gguf.GGUFWriter(file, architecture)
    notes = [_add_config(writer, model, space)]
    writer.add_file_type(FILE_TYPES["ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes.append(add_vocabulary(writer, tokenizer, model.config))

    kinds, needed, odd = [], 0, 0
    for name, tensor in _tensors(model, space, architecture):
        kind = _tensor_type(tensor, Ggml[type.upper()])
        size = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind)))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, kind)
        kinds.append(kind)
        needed += size
        odd += tensor.dim() > 1 and kind != Ggml[type.upper()]
    if odd:
        notes.append(f"{odd} matrices stay f16: their rows are no multiple of 32, as {type} needs")
    # numpy's own error does not name the reason
    check_room(file, "file needs", needed, "choose another `out` or `type`")

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors = zip(_tensors(model, space, architecture), kinds, strict=True)
        for done, ((name, tensor), kind) in enumerate(tensors, start=1):
            writer.write_tensor_data(_packed(name, tensor, kind))
            progress(done, len(kinds))
        for opened in writer.fout or ():
            opened.flush()
            os.fsync(opened.fileno())
    finally:
        writer.close()
    return architecture, "; ".join(filter(None, notes)) or None


def _architecture(model: PreTrainedModel, space: UnitSpace) -> str:
    """Return the llama.cpp architecture that computes the same as the model. Raises GraspError."""
    config: Any = model.config
    name = config.model_type.removeprefix("grasp_")
    if name not in (*FAMILIES, *MIXTURES):
        written = ", ".join((*FAMILIES, *MIXTURES))
        raise GraspError(f"{name} cannot be exported to GGUF by grasp: it writes {written}")
    own = MIXTURES[name] if name in MIXTURES else FAMILIES[name].gguf
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in (("gelu_pytorch_tanh",) if own in GEMMA else ("silu", "swish")):
        raise GraspError(
            f"hidden_act {activation} cannot be exported: llama.cpp computes another one for "
            f"{name}, whatever the file says"
        )
    rope = _check_rope(model, space, name)
    uniform = all(layer == space.layers[0] for layer in space.layers)
    if uniform and (own in LLAMA_LIKE or rope == "default"):  # only those read rope factors
        if own in GEMMA:
            _check_gemma(config, space, own)
        if name in MIXTURES and not getattr(config, "norm_topk_prob", True):
            raise GraspError(
                f"norm_topk_prob False cannot be exported: llama.cpp computes {name} with True"
            )
        return own
    lacks = "experts" if name in MIXTURES else FAMILIES[name].deci_lacks
    if lacks:
        why = f"rope_type {rope}" if uniform else "widths that differ by layer"
        fix = "" if uniform else ": prune with `layout='uniform'`"
        raise GraspError(
            f"{name} with {why} cannot be exported: that requires llama.cpp's architecture deci, "
            f"which has no {lacks}{fix}"
        )
    return "deci"


def _check_rope(model: PreTrainedModel, space: UnitSpace, name: str) -> str:
    """Return the type of the rotary positions. Raises GraspError if llama.cpp lacks it."""
    kind: str = _rope(model)["rope_type"]
    if kind not in STATIC_ROPE:
        raise GraspError(
            f"rope_type {kind} cannot be exported: llama.cpp computes one of "
            f"{', '.join(STATIC_ROPE)} for {name}"
        )
    rotated = 2 * len(_inv_freq(model))
    if rotated != space.layers[0].head_dim:
        raise GraspError(
            f"{rotated} of {space.layers[0].head_dim} values of a head are "
            "rotated: llama.cpp rotates all of them"
        )
    return kind


def _check_gemma(config: Any, space: UnitSpace, architecture: str) -> None:
    """Check values that llama.cpp hard-codes for Gemma. Source: its src/models/gemma*.cpp."""
    computed: dict[str, Any] = {"tie_word_embeddings": True}
    if architecture != "gemma":
        period = SLIDING_PERIOD[architecture]
        kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
        computed["layer_types"] = [kinds[i % period] for i in range(len(space.layers))]
        # llama.cpp knows the largest models by their layers and divides by the remaining heads
        heads = space.layers[0].heads
        largest = len(space.layers) == LARGEST[architecture]
        scalar = space.hidden_size // heads if largest else space.layers[0].head_dim
        computed["query_pre_attn_scalar"] = scalar
    if architecture == "gemma3":
        sliding = config.rope_parameters["sliding_attention"]
        computed |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        computed["rope_parameters"] = {
            **config.rope_parameters,
            "sliding_attention": {**sliding, "rope_type": "default"},
        }
    for name, value in computed.items():
        if (has := getattr(config, name)) != value:
            raise GraspError(
                f"{name} {has} cannot be exported: llama.cpp computes {architecture} with {value}"
            )


def _inv_freq(model: PreTrainedModel) -> Tensor:
    """Return the frequencies of full attention; Gemma 3 stores them before the sliding ones."""
    rotary: Any = model.get_decoder().rotary_emb
    return next(rotary.buffers())


def _rope(model: PreTrainedModel) -> dict[str, Any]:
    """Return the RoPE parameters of full attention; sliding layers may have their own."""
    parameters: Any = model.config.rope_parameters
    return {"rope_type": "default", **parameters.get("full_attention", parameters)}


def _add_config(writer: gguf.GGUFWriter, model: PreTrainedModel, space: UnitSpace) -> str | None:
    """Add sizes and constants; return a note if the file supports less than the model."""
    config: Any = model.config
    rows = [(layer.heads, layer.kv_groups, layer.ffn) for layer in space.layers]
    heads, kv_heads, ffn = map(list, zip(*rows, strict=True))
    if writer.arch == "deci":
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_feed_forward_length(ffn)
    else:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(kv_heads[0])
        writer.add_feed_forward_length(ffn[0] or space.layers[0].expert_width)
    if experts := space.layers[0].experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(space.layers[0].experts_per_token)
        writer.add_expert_feed_forward_length(space.layers[0].expert_width)
    head_dim = space.layers[0].head_dim
    writer.add_block_count(len(space.layers))
    writer.add_embedding_length(space.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(model)["rope_theta"])
    attention_scaling = getattr(model.get_decoder().rotary_emb, "attention_scaling", 1.0)
    if attention_scaling != 1.0:
        writer.add_rope_scaling_attn_factors(attention_scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(config.name_or_path).name or writer.arch)

    window: Any = getattr(config, "sliding_window", None)
    longest = config.max_position_embeddings
    if writer.arch in SLIDING_PERIOD:
        writer.add_sliding_window(window)
        if writer.arch == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        else:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window and window < longest:
        writer.add_context_length(window)
        return (
            f"context length {window} instead of {longest}: llama.cpp attends to all tokens here, "
            f"the model to the last {window}"
        )
    writer.add_context_length(longest)
    return None


def _tensors(
    model: PreTrainedModel, space: UnitSpace, architecture: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in GGUF, tensor) in the order of the file."""
    rope, inv_freq = _rope(model), _inv_freq(model)
    if rope["rope_type"] != "default":
        exponents = torch.arange(len(inv_freq), dtype=torch.float64) / len(inv_freq)
        unscaled = rope["rope_theta"] ** -exponents
        yield "rope_freqs.weight", (unscaled / inv_freq.double()).float()

    kinds = {kind: number for number, kind in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], len(space.layers))
    for name, tensor in _parameters(model):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None or (name.endswith("bias") and not _reads_bias(architecture, name)):
            raise GraspError(f"{name} has no place in llama.cpp's architecture {architecture}")
        if architecture in GEMMA and "norm." in name:
            tensor = tensor.float() + 1  # as transformers computes it
        if architecture in LLAMA_LIKE and (".q_proj." in name or ".k_proj." in name):
            tensor = _neighbours(tensor, space.layers[0].head_dim)
        yield target, tensor


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter, tied ones once; fused projections are split into separate ones.

    Those of experts are [experts, out, in], and named as if they were linear layers.
    """
    parts: dict[int, list[tuple[str, Tensor]]] = {}
    for m in decoder_layers(model):
        named = {"q": m.attention.q, "k": m.attention.k, "v": m.attention.v} if m.attention else {}
        named |= {"gate": m.ffn.gate, "up": m.ffn.up} if m.ffn else {}
        for name, rows in named.items():
            weight, bias = rows.linear.weight, rows.linear.bias
            parts.setdefault(id(weight), []).append((f"{name}_proj.weight", rows.weight))
            if bias is not None:
                parts.setdefault(id(bias), []).append((f"{name}_proj.bias", rows.bias))
        if m.routed:
            experts = m.routed.experts
            gate, up = experts.gate_up_proj.chunk(2, dim=1)
            parts[id(experts.gate_up_proj)] = [("gate_proj.weight", gate), ("up_proj.weight", up)]
            parts[id(experts.down_proj)] = [("down_proj.weight", experts.down_proj)]
    for name, parameter in model.named_parameters():
        if id(parameter) not in parts:
            yield name, parameter.data
            continue
        module = name.rsplit(".", 2 if name.endswith((".weight", ".bias")) else 1)[0]
        for part, tensor in parts[id(parameter)]:
            yield f"{module}.{part}", tensor.data


def _reads_bias(architecture: str, name: str) -> bool:
    attention = any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj."))
    return architecture in LLAMA_LIKE or (architecture == "qwen2" and attention)


def _neighbours(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head so that the two values of a rotated pair are neighbours.

    [heads * head_dim, ...] -> the same shape; row i of a head's first half comes before row i of
    its second half.
    """
    pairs = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _tensor_type(tensor: Tensor, asked: Ggml) -> Ggml:
    """Return the stored type: fp32 for vectors, f16 if rows do not fill whole blocks."""
    if tensor.dim() == 1:
        return Ggml.F32
    block, _ = gguf.GGML_QUANT_SIZES[asked]
    return asked if tensor.shape[-1] % block == 0 else Ggml.F16


def _packed(name: str, tensor: Tensor, kind: Ggml) -> np.ndarray:
    values = tensor.float().cpu().numpy()
    if kind == Ggml.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise GraspError(f"{name} has values that f16 cannot hold: use `type='bf16'` or f32")
    return gguf.quantize(values, kind)
