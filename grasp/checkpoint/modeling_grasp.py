"""Decoders whose layers have widths of their own: FFN channels, query heads and KV heads.

This file travels with every pruned checkpoint and needs only torch, transformers (5.14 or later)
and huggingface_hub. Parameter names, rope, caches, attention backends and gradient checkpointing
are those of the stock family; only the shapes differ from layer to layer, as `per_layer_config` in
config.json says (keys intermediate_size, num_attention_heads, num_key_value_heads).
"""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class PerLayerConfig:
    """Mixin over a family's config."""

    def validate_architecture(self: Any) -> None:
        # Replaces Llama's rule that heads divide the hidden size: head_dim is explicit here.
        for i, layer in enumerate(self.per_layer_config or ()):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {i}: {layer.num_attention_heads} query heads cannot share "
                    f"{layer.num_key_value_heads} KV heads evenly"
                )


class PerLayerWidths(PreTrainedModel):
    """Mixin over a family's Model and ForCausalLM: each layer is built from its own config."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        # The global config refuses to name a width that varies; a layer's config answers.
        hollow = copy.copy(config.per_layer_config[0])
        hollow.num_hidden_layers = 0
        super().__init__(hollow)  # everything but the layers
        config._attn_implementation = hollow._attn_implementation
        decoder: Any = self.base_model
        self.config = decoder.config = config  # rotary_emb keeps its own: dynamic rope reads it
        decoder.layers = nn.ModuleList(
            self.layer_class(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        module: Any
        for module in decoder.layers.modules():
            if hasattr(module, "config"):
                module.config = config  # shared, so that set_attn_implementation reaches it
        self.post_init()


@strict
class GraspLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = "grasp_llama"


class GraspLlamaModel(PerLayerWidths, LlamaModel):
    config_class = GraspLlamaConfig
    layer_class = LlamaDecoderLayer


class GraspLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    config_class = GraspLlamaConfig
    layer_class = LlamaDecoderLayer


@strict
class GraspMistralConfig(PerLayerConfig, MistralConfig):
    model_type = "grasp_mistral"


class GraspMistralModel(PerLayerWidths, MistralModel):
    config_class = GraspMistralConfig
    layer_class = MistralDecoderLayer


class GraspMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    config_class = GraspMistralConfig
    layer_class = MistralDecoderLayer


@strict
class GraspQwen2Config(PerLayerConfig, Qwen2Config):
    model_type = "grasp_qwen2"


class GraspQwen2Model(PerLayerWidths, Qwen2Model):
    config_class = GraspQwen2Config
    layer_class = Qwen2DecoderLayer


class GraspQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    config_class = GraspQwen2Config
    layer_class = Qwen2DecoderLayer


@strict
class GraspQwen3Config(PerLayerConfig, Qwen3Config):
    model_type = "grasp_qwen3"


class GraspQwen3Model(PerLayerWidths, Qwen3Model):
    config_class = GraspQwen3Config
    layer_class = Qwen3DecoderLayer


class GraspQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    config_class = GraspQwen3Config
    layer_class = Qwen3DecoderLayer


# stock model_type -> our config, decoder and language model
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": (GraspLlamaConfig, GraspLlamaModel, GraspLlamaForCausalLM),
    "mistral": (GraspMistralConfig, GraspMistralModel, GraspMistralForCausalLM),
    "qwen2": (GraspQwen2Config, GraspQwen2Model, GraspQwen2ForCausalLM),
    "qwen3": (GraspQwen3Config, GraspQwen3Model, GraspQwen3ForCausalLM),
}

# Beside a checkpoint, where this is a copy, auto_map in config.json does the same.
if __name__ == "grasp.checkpoint.modeling_grasp":
    for config_class, model_class, causal_class in FAMILIES.values():
        AutoConfig.register(config_class.model_type, config_class)
        AutoModel.register(config_class, model_class)
        AutoModelForCausalLM.register(config_class, causal_class)
        # With these, save_pretrained copies this file and names it in auto_map.
        config_class.register_for_auto_class("AutoConfig")
        model_class.register_for_auto_class("AutoModel")
        causal_class.register_for_auto_class("AutoModelForCausalLM")
