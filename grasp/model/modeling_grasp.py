"""Decoders whose layers differ in width: FFN channels, query heads and KV heads.

This file travels with every pruned checkpoint and needs only torch, transformers (5.17 or later)
and huggingface_hub. A class is derived from any stock family on demand: the stock class is built,
then the linear layers of its FFNs and attentions get the sizes that config.json names. Parameter
names, rope, caches, attention backends and gradient checkpointing are those of the stock family.

Sizes are in `per_layer_config` (keys intermediate_size, num_attention_heads, num_key_value_heads),
or in `per_layer_text_config` of a model that also sees images.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

PREFIX = "grasp_"  # of our model types
WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
# the linear layers of a gated FFN: gate and up, or both in one; then down
FFN_FORMS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("input_linear", "output_linear"),
)
# the linear layers of grouped-query attention: q, k and v, or all in one; then the output
ATTENTION_FORMS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("qkv_proj", "o_proj"),
)
# what modules call the numbers that they do not read from their weights
QUERY_HEADS = ("num_heads", "num_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")


def parts_of(layer: nn.Module, forms: tuple[Any, ...]) -> list[tuple[Any, tuple[str, ...]]]:
    """The direct children of a decoder layer that have the linear layers of a form, with names.

    The experts of a mixture lie deeper.
    """
    found = []
    for child in layer.children():
        form = next((f for f in forms if _has(child, f)), None)
        if form:
            found.append((child, form))
    return found


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(module._modules.get(name) is not None for name in names)


def say_channels(ffn: Any, channels: int) -> None:
    """Set the width that an FFN does not read from its weights."""
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = channels


def say_heads(attention: Any, heads: int, kv_heads: int) -> None:
    """Set the head counts that an attention does not read from its weights."""
    for names, count in ((QUERY_HEADS, heads), (KV_HEADS, kv_heads)):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, count)
    if hasattr(attention, "config"):  # Phi-3 reads query heads from it
        attention.config = LayerConfig(
            attention.config, num_attention_heads=heads, num_key_value_heads=kv_heads
        )


class LayerConfig:
    """The config of one layer's modules: its own values, all else from the model's config."""

    def __init__(self, config: Any, **own: Any) -> None:
        vars(self).update(own, shared=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying asks for these before there is a config
            raise AttributeError(name)
        return getattr(self.shared, name)


class PerLayerConfig:
    """Mixin for a family's config. Its own checks are about the widths before pruning."""

    def as_built(self: Any) -> Any:
        """The config of the stock model, in the widths before pruning."""
        overrides = (vars(self).get("_heterogeneity_spec") or _Nothing).per_layer_overrides
        whole = copy.copy(self)
        vars(whole).pop("_heterogeneity_spec", None)
        own = {  # of families whose layers differ by themselves
            index: {
                k: v
                for k, v in values.items()
                if k not in WIDTHS or (k != "intermediate_size" and index in self.whole("kv"))
            }
            for index, values in overrides.items()
        }
        if any(own.values()):
            whole.per_layer_config = own
        return whole

    def whole(self: Any, part: str) -> list[int]:
        """The layers whose `part`, "ffn" or "kv", has no units of ours."""
        return list((getattr(self, "whole_layers", None) or {}).get(part, ()))

    def layer_widths(self: Any, index: int) -> dict[str, int]:
        """What was pruned in a layer, by the names of WIDTHS."""
        if self.get_text_config() is not self:
            found = getattr(self, "per_layer_text_config", None) or {}
            return dict({int(layer): own for layer, own in found.items()}.get(index, {}))
        own = self.per_layer_config[index]
        kept = [] if index in self.whole("ffn") else [WIDTHS[0]]
        kept += [] if index in self.whole("kv") else WIDTHS[1:]
        return {name: getattr(own, name) for name in kept}

    def validate_widths(self: Any) -> None:
        """Raise ValueError for query heads that cannot share the KV heads of their layer."""
        for index in range(self.get_text_config().num_hidden_layers):
            widths = self.layer_widths(index)
            heads, kv_heads = (widths.get(name) for name in WIDTHS[1:])
            if heads and kv_heads and heads % kv_heads:
                raise ValueError(
                    f"layer {index}: {heads} query heads cannot share {kv_heads} KV heads evenly"
                )


class _Nothing:
    per_layer_overrides: Mapping[int, Any] = {}


class PerLayerWidths(PreTrainedModel):
    """Mixin for a family's models: the stock model, then each layer in its own widths."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        whole = config.as_built()
        if whole._attn_implementation == "vllm" and self._is_stateful:
            raise ValueError(
                f"vLLM's Transformers backend keeps no states of {type(self).__name__} from one "
                "token to the next, only keys and values: its answers would be wrong"
            )
        super().__init__(whole, *args, **kwargs)
        config._attn_implementation = whole._attn_implementation
        decoder: Any = self.get_decoder()
        for module in (self, decoder):  # rotary_emb keeps its own: dynamic rope reads it
            if module.config is whole:
                module.config = config
        for index, layer in enumerate(decoder.layers):
            resize(layer, config.layer_widths(index))
            if not config.is_heterogeneous:
                continue
            own = config.per_layer_config[index]
            shared = {name: getattr(own, name) for name in config.per_layer_attributes}
            for module in layer.modules():  # shared, so that set_attn_implementation reaches it
                if hasattr(module, "config"):
                    module.config = LayerConfig(config, **shared)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: buffers are filled by the stock family, not skipped as in unknown code."""
        return False


def resize(layer: nn.Module, widths: Mapping[str, int]) -> None:
    """Give the FFN and attention of a decoder layer new linear layers of the sizes in `widths`."""
    channels, heads, kv_heads = (widths.get(name) for name in WIDTHS)
    if channels is not None:
        ((ffn, form),) = parts_of(layer, FFN_FORMS)
        *inputs, down = form
        for name in inputs:
            _replace(ffn, name, rows=channels if len(inputs) == 2 else 2 * channels)
        _replace(ffn, down, columns=channels)
        say_channels(ffn, channels)
    if heads is not None and kv_heads is not None:
        ((attention, form),) = parts_of(layer, ATTENTION_FORMS)
        *inputs, out = form
        rows = [n * attention.head_dim for n in (heads, kv_heads, kv_heads)]
        for name, size in zip(inputs, rows if len(inputs) == 3 else [sum(rows)], strict=True):
            _replace(attention, name, rows=size)
        _replace(attention, out, columns=rows[0])
        say_heads(attention, heads, kv_heads)


def _replace(parent: nn.Module, name: str, rows: int = 0, columns: int = 0) -> None:
    """Put a linear layer of other sizes in the place of `name`."""
    old: Any = getattr(parent, name)
    rows, columns = rows or old.out_features, columns or old.in_features
    if (rows, columns) != (old.out_features, old.in_features):
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        setattr(parent, name, nn.Linear(columns, rows, bias=old.bias is not None, **like))


class Classes(NamedTuple):
    """Our config of a family, and our classes by the Auto class that loads them."""

    config: Any
    autos: dict[Any, Any]


@functools.cache
def classes_of(model_type: str) -> Classes:
    """Derive our classes from those of a stock family. Raises KeyError if there is none."""
    stock = CONFIG_MAPPING[model_type]
    checks = {name: _checked_as_built(stock, name) for name in dir(stock) if _is_check(name)}
    config = _derived(stock, PerLayerConfig, model_type=f"{PREFIX}{model_type}", **checks)
    config = strict(config)
    models = {
        auto: mapping[stock]
        for auto, mapping in (
            (AutoModel, MODEL_MAPPING),
            (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
            (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        )
        if stock in mapping
    }
    ours = {c: _derived(c, PerLayerWidths, config_class=config) for c in {*models.values()}}
    autos: dict[Any, Any] = {AutoConfig: config}
    autos |= {auto: ours[model] for auto, model in models.items()}
    globals().update({c.__name__: c for c in autos.values()})
    if __name__ == "grasp.model.modeling_grasp":  # beside a checkpoint, auto_map does the same
        for auto, own in autos.items():
            auto.register(*((config.model_type,) if auto is AutoConfig else (config,)), own)
            # with it, save_pretrained copies this file
            own.register_for_auto_class(auto.__name__)
    return Classes(config, autos)


def _derived(stock: Any, mixin: type, **attributes: Any) -> Any:
    own = {"__module__": __name__, **attributes}
    return type(f"Grasp{stock.__name__}", (mixin, stock), own)


def _is_check(name: str) -> bool:
    return name.startswith("validate_")


def _checked_as_built(stock: Any, name: str) -> Any:
    """A family's check of its config, on the widths before pruning.

    Llama's rule, for one, that heads divide the hidden size need not hold after it.
    """

    def check(self: Any) -> None:
        getattr(stock, name)(self.as_built())

    return check


def __getattr__(name: str) -> Any:
    """Our class by name, such as GraspLlamaForCausalLM: auto_map in config.json and pickle ask."""
    stock = name.startswith("Grasp") and getattr(transformers, name.removeprefix("Grasp"), None)
    if not stock:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = stock if issubclass(stock, PreTrainedConfig) else stock.config_class
    return {c.__name__: c for c in classes_of(config.model_type).autos.values()}[name]


class _OurTypes(dict[str, Any]):
    """Finds the config class of a pruned family when transformers first asks for it by type."""

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key) or not isinstance(key, str):
            return super().__contains__(key)
        return key.startswith(PREFIX) and key.removeprefix(PREFIX) in CONFIG_MAPPING

    def __missing__(self, key: str) -> Any:
        return classes_of(key.removeprefix(PREFIX)).config


if __name__ == "grasp.model.modeling_grasp":
    CONFIG_MAPPING._extra_content = _OurTypes(CONFIG_MAPPING._extra_content)
