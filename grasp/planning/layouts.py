"""Decide which layouts a result can have, and which options to suggest instead.

A result is saved as a class of transformers (uniform layout) or as one of ours (per-layer). A
layout is available if such a class computes the model with every width that the budget allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

from grasp.budget.budget import Budget, Layout
from grasp.errors import GraspError
from grasp.model.header import FAMILIES, SWITCHES, Header, from_config


def check_layout(header: Header, budget: Budget, *, biased: bool = False) -> None:
    """Raise GraspError if `budget` allows widths that no class can be saved with.

    `biased`: the result has biases in all projections. The error names options that would work, if
    any. For the uniform layout the stock class itself is tried, which imports transformers.
    """
    budget = budget.for_space(header.space)
    why = lacks(header, budget, biased=biased)
    if why is None:
        return
    fixes = _fixes(header, budget, biased)
    fix = f"use {' or '.join(fixes)}" if fixes else "grasp cannot prune this model"
    raise GraspError(
        f"`layout={budget.layout!r}` is not possible for {header.family}: {why}: {fix}"
    )


def _fixes(header: Header, budget: Budget, biased: bool) -> list[str]:
    """Options that would work: the other layout, a multiple of KV groups, or only both together."""
    (other,) = {*get_args(Layout)} - {"auto", budget.layout}
    groups = header.space.layers[0].kv_groups
    multiples = [m for m in range(budget.kv_multiple + 1, groups + 1) if groups % m == 0]

    def works(**changed: Any) -> bool:
        with suppress(GraspError):  # a budget that these multiples cannot meet
            asked = replace(budget, **changed)
            asked.limit(header.space)
            return lacks(header, asked, biased=biased) is None
        return False

    fixes = [f"`layout={other!r}`"] if works(layout=other) else []
    fixes += [f"`kv_multiple={m}`" for m in multiples if works(kv_multiple=m)][:1]
    both = [m for m in multiples if not fixes and works(layout=other, kv_multiple=m)][:1]
    return fixes + [f"`layout={other!r}` with `kv_multiple={m}`" for m in both]


def lacks(header: Header, budget: Budget, *, biased: bool = False) -> str | None:
    """Why the budget's layout is not available; None if it is."""
    if budget.layout == "per-layer":
        if header.family in FAMILIES:
            return None
        return f"no class has its layers in widths of their own ({', '.join(FAMILIES)} have one)"
    if len({*header.space.layers}) > 1:
        return "its layers differ in width"
    if header.config is None:  # GGUF: known only after loading
        return None
    return _class_lacks(header.config, header, budget, biased)


def _class_lacks(
    config: Mapping[str, Any], header: Header, budget: Budget, biased: bool
) -> str | None:
    """Why the stock class refuses a width that the budget allows; None if it accepts all."""
    from grasp.model.classes import config_of  # imports transformers: seconds

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
            return "its class does not take the widths that its config names"
    return None
