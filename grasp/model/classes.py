"""Choose the class, from transformers or grasp, that computes a decoder of given widths.

Layers of different widths need a class of modeling_grasp.py; equal widths need a stock class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from grasp.errors import GraspError, reason
from grasp.model.header import from_config
from grasp.model.load import move
from grasp.model.modeling_grasp import FAMILIES
from grasp.model.units import LayerUnits, UnitSpace

# Config keys that a class or save_pretrained sets itself.
_WRITTEN_ANEW = (
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "per_layer_config",
    "serialize_explicit_per_layer_config",
    "transformers_version",
)


def config_of(config: Mapping[str, Any], space: UnitSpace) -> tuple[PreTrainedConfig, str | None]:
    """The config of a class that supports the widths of `space`, and a note.

    `config` is the content of the model's config.json. The note says why the class is not the
    model's own; None if it is. Raises GraspError with the reason if no class supports the widths.
    """
    family = config["model_type"].removeprefix("grasp_")  # a pruned model may be pruned again
    own = {k: v for k, v in config.items() if k not in _WRITTEN_ANEW}
    values = own | {"head_dim": space.layers[0].head_dim}
    widths = [_widths(layer) for layer in space.layers]
    if all(layer == widths[0] for layer in widths):
        values |= widths[0]
        if family == "llama" and values["hidden_size"] % values["num_attention_heads"]:
            return _mistral_config(values)
        try:
            return CONFIG_MAPPING[family](**values), None
        except Exception as error:  # its rule on head counts may raise anything
            raise GraspError(
                f"its class refuses layers of {values['num_attention_heads']} query heads "
                f"({reason(error.__cause__ or error)})"
            ) from None

    if family not in FAMILIES:
        if from_config(config).space.layers == space.layers:  # nothing was cut
            return CONFIG_MAPPING[family](**own), None
        raise GraspError(f"{family} has no class with per-layer widths")
    classes = FAMILIES[family]
    config_class: Any = classes[0]
    auto_names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    auto_map = {a: f"modeling_grasp.{c.__name__}" for a, c in zip(auto_names, classes, strict=True)}
    return (
        config_class(
            **values,
            per_layer_config=dict(enumerate(widths)),
            serialize_explicit_per_layer_config=True,  # all three widths of every layer
            auto_map=auto_map,
        ),
        None,
    )


def without_weights(model: PreTrainedModel, space: UnitSpace) -> tuple[PreTrainedModel, str | None]:
    """`model` in the widths of `space`, as the class that will load it, and `config_of`'s note.

    Parameters are on the meta device, buffers are real.
    """
    config, note = config_of(model.config.to_dict(), space)
    implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        target = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    target.generation_config = model.generation_config
    return target, note


def as_saved(model: PreTrainedModel, space: UnitSpace) -> tuple[PreTrainedModel, str | None]:
    """The model as the class that will load it, ready to run, and `config_of`'s note.

    It shares the weights of `model`, which already have the widths of `space`.
    """
    target, note = without_weights(model, space)
    target.load_state_dict(model.state_dict(), assign=True)
    target.tie_weights()
    return move(target, str(model.device)).train(model.training), note


def _widths(layer: LayerUnits) -> dict[str, int]:
    return {
        "intermediate_size": layer.ffn,
        "num_attention_heads": layer.kv_groups * layer.group_size,
        "num_key_value_heads": layer.kv_groups,
    }


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
