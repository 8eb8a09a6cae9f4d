"""Which layouts a result can have, and so what to advise: the one place that decides it.

A result is saved as a class of transformers (uniform layout) or as one of ours (per-layer), so a
layout is open where there is a class that computes the model with every width a budget allows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from grasp.budget.budget import Budget, Layout
from grasp.errors import GraspError, reason
from grasp.model.header import FAMILIES, Header, from_config


def check_layout(header: Header, budget: Budget, *, biased: bool = False) -> None:
    """Raises GraspError if some widths that `budget` allows have no class to be saved as.

    `biased`: the result has biases in all projections. The error names a layout that would do, or
    says that none does. Families that are not in the table are built on torch's meta device.
    """
    why = lacks(header, budget, biased=biased)
    if why is None:
        return
    (other,) = {*get_args(Layout)} - {budget.layout}
    others = lacks(header, replace(budget, layout=other), biased=biased)
    if others is None:
        raise GraspError(f"--layout {budget.layout}: {why}: use --layout {other}")
    raise GraspError(
        f"{header.family} cannot be pruned in either layout: {budget.layout}: {why}; {other}: "
        f"{others}"
    )


def lacks(header: Header, budget: Budget, *, biased: bool = False) -> str | None:
    """What is in the way of the budget's layout; None where nothing is."""
    if budget.layout == "per-layer":
        if header.family in FAMILIES:
            return None
        return f"{header.family} has no class with per-layer widths ({', '.join(FAMILIES)} have)"
    layers = header.space.layers
    if len({*layers}) > 1:
        return "its layers differ in width"
    group_size = layers[0].group_size
    counts = range(budget.kv_multiple, layers[0].kv_groups + 1, budget.kv_multiple)
    heads = [group_size * groups for groups in counts]
    if header.family in FAMILIES:
        return _heads_lack(header, heads, biased)
    return None if header.config is None else _class_lacks(header, budget, heads)


def _heads_lack(header: Header, heads: list[int], biased: bool) -> str | None:
    """What the config class of a family in the table has against some counts of query heads."""
    layer, hidden = header.space.layers[0], header.space.hidden_size
    biased = biased or layer.channel_bias > 0 or layer.group_bias > 0
    awkward = [n for n in heads if hidden % n]
    # Mistral's is the same decoder as Llama's, without the rule and without biases
    if not awkward or not header.facts.heads_divide or (header.family == "llama" and not biased):
        return None
    others = " (a --kv-multiple may avoid such counts)"
    if header.family == "llama":
        others = " and Mistral's, which has no such rule, has no biases"
    return (
        f"{header.family}'s class wants query heads that divide the hidden size {hidden}, which "
        f"{awkward[-1]} does not{others}"
    )


def _class_lacks(header: Header, budget: Budget, heads: list[int]) -> str | None:
    """What the class of a family that is not in the table has against the budget's widths."""
    from transformers import AutoConfig

    assert header.config is not None
    layers = header.space.layers
    config: dict[str, Any] = {**header.config, "head_dim": layers[0].head_dim}
    least = replace(layers[0], ffn=budget.ffn_multiple, kv_groups=budget.kv_multiple)
    try:
        for count in heads:
            AutoConfig.for_model(**config | _widths(count, layers[0].group_size))
        few = _widths(heads[0], layers[0].group_size) | {"intermediate_size": least.ffn}
        made = from_config(config | few).space.layers
    except Exception as error:  # whatever rule a foreign class has
        return f"{header.family} does not accept all widths ({reason(error)})"
    if made != (least,) * len(layers):
        return f"{header.family}'s class does not take the widths that its config names"
    return None


def _widths(heads: int, group_size: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": heads // group_size}
