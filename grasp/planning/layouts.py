"""Which layouts a result can have, and so what to advise: the one place that decides it.

A result is saved as a class of transformers (uniform layout) or as one of ours (per-layer), so a
layout is open where there is a class that computes the model with every width a budget allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from grasp.budget.budget import Budget, Layout
from grasp.errors import GraspError
from grasp.model.header import FAMILIES, SWITCHES, Header, from_config


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
        return f"{header.family} has no class with per-layer widths ({', '.join(FAMILIES)} do)"
    if len({*header.space.layers}) > 1:
        return "its layers differ in width"
    if header.config is None:  # GGUF: known when it is loaded
        return None
    return _class_lacks(header.config, header, budget, biased)


def _class_lacks(
    config: Mapping[str, Any], header: Header, budget: Budget, biased: bool
) -> str | None:
    """What the stock class has against a width that the budget allows."""
    from grasp.model.classes import config_of  # and with it transformers: seconds

    if biased:
        config = {**config, **dict.fromkeys(SWITCHES, True)}
    layer, depth = header.space.layers[0], len(header.space.layers)
    choices = range(budget.kv_multiple, layer.kv_groups + 1, budget.kv_multiple)
    try:
        made = [config_of(config, header.space.resized([(layer.ffn, n)] * depth)) for n in choices]
    except GraspError as error:
        return str(error)
    if header.family not in FAMILIES:
        least, _ = made[0]
        found = from_config(least.to_dict()).space
        if found != header.space.resized([(layer.ffn, choices[0])] * depth):
            return f"{header.family}'s class does not take the widths that its config names"
    return None
