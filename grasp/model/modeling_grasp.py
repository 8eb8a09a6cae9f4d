"""Decoders whose layers differ in width: FFN channels, query heads and KV heads.

This file travels with every pruned checkpoint and needs only torch, transformers (5.14 or later)
and huggingface_hub. Parameter names, rope, caches, attention backends and gradient checkpointing
are those of the stock family; only the shapes differ from layer to layer, as `per_layer_config` in
config.json says (keys intermediate_size, num_attention_heads, num_key_value_heads).
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

# model types of transformers whose layers read every width from the config they are built with
STOCK = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")


class PerLayerConfig:
    """Mixin for a family's config: its checks, adapted to per-layer widths."""

    def validate_architecture(self: Any) -> None:
        # Replaces Llama's rule that heads divide the hidden size: head_dim is explicit here.
        for i, layer in enumerate(self.per_layer_config or ()):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {i}: {layer.num_attention_heads} query heads cannot share "
                    f"{layer.num_key_value_heads} KV heads evenly"
                )

    def validate_rope(self: Any) -> None:
        # Rules on long rope divide the hidden size by the number of heads before pruning.
        whole = copy.copy(self)
        vars(whole).pop("_heterogeneity_spec", None)
        super(PerLayerConfig, whole).validate_rope()  # type: ignore[misc]


class LayerConfig:
    """The config of one layer's modules: its own widths, all else from the model's config."""

    def __init__(self, config: Any, **widths: int) -> None:
        vars(self).update(widths, shared=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying asks for these before there is a config
            raise AttributeError(name)
        return getattr(self.shared, name)


class PerLayerWidths(PreTrainedModel):
    """Mixin for a family's Model and ForCausalLM: each layer is built from its own config."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        # The global config raises for a width that varies; a layer's config has one.
        hollow = copy.copy(config.per_layer_config[0])
        hollow.num_hidden_layers = 0
        super().__init__(hollow)  # everything but the layers
        config._attn_implementation = hollow._attn_implementation
        decoder: Any = self.base_model
        self.config = decoder.config = config  # rotary_emb keeps its own: dynamic rope reads it
        decoder.layers = nn.ModuleList()
        for i, own in enumerate(config.per_layer_config):
            layer = self.layer_class(own, i)
            # shared, so that set_attn_implementation reaches it; Phi-3 reads query heads from it
            shared = LayerConfig(config, num_attention_heads=own.num_attention_heads)
            module: Any
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config = shared
            decoder.layers.append(layer)
        self.post_init()


def _classes(model_type: str) -> tuple[Any, Any, Any]:
    """Derive our config, decoder and language model from those of a stock family."""
    config_class = CONFIG_MAPPING[model_type]
    model_class: Any = MODEL_MAPPING[config_class]
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    family = causal_class.__name__.removesuffix("ForCausalLM")

    def derived(suffix: str, *bases: type, **attributes: Any) -> Any:
        return type(f"Grasp{family}{suffix}", bases, {"__module__": __name__, **attributes})

    our_config = strict(
        derived("Config", PerLayerConfig, config_class, model_type=f"grasp_{model_type}")
    )
    ours = {
        "config_class": our_config,
        "layer_class": getattr(sys.modules[causal_class.__module__], f"{family}DecoderLayer"),
    }
    return (
        our_config,
        derived("Model", PerLayerWidths, model_class, **ours),
        derived("ForCausalLM", PerLayerWidths, causal_class, **ours),
    )


# stock model_type -> our config, decoder and language model
FAMILIES = {model_type: _classes(model_type) for model_type in STOCK}
# auto_map in config.json and pickle look them up by name
globals().update({c.__name__: c for classes in FAMILIES.values() for c in classes})

# For the copy beside a checkpoint, auto_map in config.json does the same.
if __name__ == "grasp.model.modeling_grasp":
    for config_class, model_class, causal_class in FAMILIES.values():
        AutoConfig.register(config_class.model_type, config_class)
        AutoModel.register(config_class, model_class)
        AutoModelForCausalLM.register(config_class, causal_class)
        # With these, save_pretrained copies this file and names it in auto_map.
        config_class.register_for_auto_class("AutoConfig")
        model_class.register_for_auto_class("AutoModel")
        causal_class.register_for_auto_class("AutoModelForCausalLM")
