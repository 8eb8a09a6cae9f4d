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
from grasp.model.units import LayerUnits, UnitSpace


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
    groups = max(layer.kv_groups for layer in header.space.layers)
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
        if header.family in FAMILIES or header.config is None:  # GGUF: known only after loading
            return None
        return _our_class_lacks(header.config, header.space, budget)
    if not header.space.is_uniform:
        return "its layers differ in width"
    if header.config is None:
        return None
    return _class_lacks(header.config, header.space, budget, biased)


def _our_class_lacks(config: Mapping[str, Any], space: UnitSpace, budget: Budget) -> str | None:
    """Why no class has widths of their own in its layers; None if it computes those of `budget`."""
    from grasp.model.classes import per_layer_config  # imports transformers: seconds

    pruned = least(space, budget, first_only=True)
    try:
        made = per_layer_config(config, pruned)
        found = from_config(made.to_dict()).space
    except GraspError as error:
        return str(error)
    if found.layers != pruned.layers:
        return "its class does not get the widths that its config names"
    return None


def _class_lacks(
    config: Mapping[str, Any], space: UnitSpace, budget: Budget, biased: bool
) -> str | None:
    """Why the stock class refuses a width that the budget allows; None if it accepts all."""
    from grasp.model.classes import config_of  # imports transformers: seconds

    if biased:
        config = {**config, **dict.fromkeys(SWITCHES, True)}
    groups = max(layer.kv_groups for layer in space.layers)
    choices = [groups]
    if "kv" in budget.prunes(space):
        choices = [*range(budget.kv_multiple, groups + 1, budget.kv_multiple)]
    whole = [(layer.ffn, layer.kv_groups) for layer in space.layers]
    try:
        for n in choices:
            tried = space.resized([(ffn, n if own else 0) for ffn, own in whole])
            config_of(config, tried, stock_only=True)
        config_of(config, least(space, budget), stock_only=True)
    except GraspError as error:
        return str(error)
    return None


def least(space: UnitSpace, budget: Budget, *, first_only: bool = False) -> UnitSpace:
    """The smallest widths that `budget` allows, in all layers or only in the first of each kind."""
    prunes, widths, experts = budget.prunes(space), [], []
    seen: set[LayerUnits] = set()
    protected = budget.protected(len(space.layers))
    for index, layer in enumerate(space.layers):
        channels = min(layer.ffn, budget.ffn_multiple) if "ffn" in prunes else layer.ffn
        groups = min(layer.kv_groups, budget.kv_multiple) if "kv" in prunes else layer.kv_groups
        whole = index in protected or (first_only and layer in seen)
        widths.append((layer.ffn, layer.kv_groups) if whole else (channels, groups))
        can_go = "experts" in prunes and not whole
        experts.append(layer.experts_per_token if can_go and layer.experts else layer.experts)
        if not whole:
            seen.add(layer)
    return space.resized(widths, experts)
