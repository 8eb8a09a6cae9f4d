"""Choose the class, from transformers or grasp, that computes a decoder of given widths.

Layers of different widths need a class of modeling_grasp.py; equal widths need a stock class.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from grasp.errors import GraspError, reason
from grasp.model.experts import COUNTED, SHARED_WIDTH
from grasp.model.header import FAMILIES, from_config
from grasp.model.load import auto_class, move
from grasp.model.modeling_grasp import PREFIX, WIDTHS, classes_of
from grasp.model.places import places_of
from grasp.model.units import LayerUnits, UnitSpace

# Config keys that a class or save_pretrained sets itself.
_WRITTEN_ANEW = (
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "per_layer_config",
    "per_layer_text_config",
    "serialize_explicit_per_layer_config",
    "transformers_version",
    "whole_layers",
)


def config_of(
    config: Mapping[str, Any], space: UnitSpace, *, stock_only: bool = False
) -> tuple[PreTrainedConfig, str | None]:
    """The config of a class that supports the widths of `space`, and a note.

    `config` is the content of the model's config.json. The note says why the class is not the
    model's own; None if it is. A class of ours is the second choice, unless `stock_only`. Raises
    GraspError with the reason if no class supports the widths.
    """
    try:
        return _stock_config(config, space)
    except GraspError:
        if stock_only:
            raise
        return per_layer_config(config, space), None


def _stock_config(
    config: Mapping[str, Any], space: UnitSpace
) -> tuple[PreTrainedConfig, str | None]:
    """As `config_of`, of a class of transformers."""
    family, values = _family(config), _own(config)
    widths = _common_widths(space)
    text = values.get("text_config", values)
    text |= widths | _expert_counts(text, space)
    if {layer.kv_groups for layer in space.layers} != {0}:
        text |= _head_dim(space)
    pruned = str(config["model_type"]).startswith(PREFIX)  # its widths by layer are ours
    overrides = _overrides(config, space, WIDTHS if pruned else widths)
    if any(overrides.values()):
        values["per_layer_config"] = overrides
    if family == "llama" and values["hidden_size"] % values["num_attention_heads"]:
        made, note = _mistral_config(values)
    else:
        made, note = _accepted(CONFIG_MAPPING[family], values, widths), None
    # every width of the families in the table is known to be read from the config
    known = family in FAMILIES and space.is_uniform
    if not known and not _same(from_config(made.to_dict()).space, space):
        why = "its class does not take the widths that its config names"
        raise GraspError(why if space.is_uniform else f"{family} has one width for all layers")
    return made, note


def _accepted(config_class: Any, values: dict[str, Any], widths: dict[str, int]) -> Any:
    try:
        return config_class(**values)
    except Exception as error:  # its rule on head counts may raise anything
        heads = widths.get("num_attention_heads")
        what = f"layers of {heads} query heads" if heads else "these widths"
        raise GraspError(f"its class refuses {what} ({reason(error.__cause__ or error)})") from None


def per_layer_config(config: Mapping[str, Any], space: UnitSpace) -> PreTrainedConfig:
    """The config of our class of the model's family, each layer in its own widths.

    Raises GraspError if transformers has no language model of this family to derive it from.
    """
    family, values = _family(config), _own(config)
    if space.experts:
        raise GraspError(f"{family} has one number of experts for all layers")
    try:
        classes = classes_of(family)
    except (KeyError, ValueError):
        raise GraspError(f"{family} is not one of transformers' own families") from None
    own = [_widths(layer) for layer in space.layers]
    values["auto_map"] = {
        auto.__name__: f"modeling_grasp.{c.__name__}" for auto, c in classes.autos.items()
    }
    if "text_config" in values:
        values["per_layer_text_config"] = {str(i): widths for i, widths in enumerate(own)}
        return classes.config(**values)
    whole = {
        "ffn": [i for i, layer in enumerate(space.layers) if not layer.ffn],
        "kv": [i for i, layer in enumerate(space.layers) if not layer.kv_groups],
    }
    if any(whole.values()):
        values["whole_layers"] = whole
    overrides = _overrides(config, space, ())
    if not any("head_dim" in layer for layer in overrides.values()):
        values |= _head_dim(space)
    return classes.config(
        **values,
        per_layer_config={i: overrides.get(i, {}) | widths for i, widths in enumerate(own)},
        serialize_explicit_per_layer_config=True,  # all widths of every layer
    )


def _family(config: Mapping[str, Any]) -> str:
    return str(config["model_type"]).removeprefix(PREFIX)  # a pruned model may be pruned again


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in config.items() if k not in _WRITTEN_ANEW}


def _same(found: UnitSpace, wanted: UnitSpace) -> bool:
    """Whether layers have these widths, and what has no units is as large as it was."""
    return (found.layers, found.fixed_params) == (wanted.layers, wanted.fixed_params)


def _overrides(
    config: Mapping[str, Any], space: UnitSpace, without: Container[str]
) -> dict[int, dict[str, Any]]:
    """What the layers of a model have by themselves, by index; of their units' widths not these."""
    found = config.get("per_layer_config") or {}
    units = {index: _widths(layer) for index, layer in enumerate(space.layers)}
    return {
        int(index): {k: v for k, v in own.items() if k not in without or k not in units[int(index)]}
        for index, own in found.items()
    }


def _head_dim(space: UnitSpace) -> dict[str, int]:
    """The head size, which classes compute from the number of heads if the config has none."""
    found = {layer.head_dim for layer in space.layers if layer.kv_groups}
    return {"head_dim": found.pop()} if len(found) == 1 else {}


def _common_widths(space: UnitSpace) -> dict[str, int]:
    """The widths that all layers with such units share, by their names in a config."""
    found: dict[str, set[int]] = {}
    for layer in space.layers:
        for name, width in _widths(layer).items():
            found.setdefault(name, set()).add(width)
    return {name: widths.pop() for name, widths in found.items() if len(widths) == 1}


def without_weights(
    model: PreTrainedModel, space: UnitSpace, *, stock_only: bool = False
) -> tuple[PreTrainedModel, str | None]:
    """`model` in the widths of `space`, as the class that will load it, and `config_of`'s note.

    Parameters are on the meta device, buffers are real.
    """
    config, note = config_of(model.config.to_dict(), space, stock_only=stock_only)
    implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        target = auto_class(config).from_config(config, attn_implementation=implementation)
    target.tie_weights()  # which the context has undone
    target.generation_config = model.generation_config
    return target, note


def as_saved(
    model: PreTrainedModel, space: UnitSpace, *, stock_only: bool = False
) -> tuple[PreTrainedModel, str | None]:
    """The model as the class that will load it, ready to run, and `config_of`'s note.

    It shares the weights of `model`, which already have the widths of `space`.
    """
    target, note = without_weights(model, space, stock_only=stock_only)
    target.load_state_dict(model.state_dict(), assign=True)
    target.tie_weights()
    return move(target, places_of(model)).train(model.training), note


def _expert_counts(config: Mapping[str, Any], space: UnitSpace) -> dict[str, int]:
    """The number of experts that layers with experts share, by its names in `config`."""
    counts = {layer.experts for layer in space.layers if layer.experts}
    if len(counts) != 1:
        return {}
    return dict.fromkeys((n for n in COUNTED if isinstance(config.get(n), int)), counts.pop())


def _widths(layer: LayerUnits) -> dict[str, int]:
    """The widths of a layer's units, by their names in a config; of what it has."""
    heads = (layer.heads, layer.kv_groups)
    names = (SHARED_WIDTH if layer.experts else WIDTHS[0], *WIDTHS[1:])
    widths = dict(zip(names, (layer.ffn, *heads), strict=True))
    return {name: width for name, width in widths.items() if width}


def _mistral_config(values: dict[str, Any]) -> tuple[PreTrainedConfig, str]:
    """A Mistral config for a Llama whose query heads do not divide the hidden size, and a note.

    LlamaConfig requires that they do. Mistral is the same decoder without this rule and without
    biases. Raises GraspError for a model with biases.
    """
    heads = values["num_attention_heads"]
    rule = f"{heads} query heads do not divide the hidden size {values['hidden_size']}"
    if values.pop("attention_bias", False) or values.pop("mlp_bias", False):
        raise GraspError(
            f"{rule}, which LlamaConfig demands, and no other stock class has its biases"
        )
    values.pop("pretraining_tp", None)
    config = MistralConfig(**values, sliding_window=None)
    return config, f"{rule}, which LlamaConfig demands: saved as the equivalent Mistral class"
