"""Which layouts a result can have, and so what to advise: the one place that decides it.

A result is saved as a class of transformers (uniform layout) or as one of ours (per-layer), so a
layout is open where there is a class that computes the model with every width a budget allows.
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
    """Raises GraspError if some widths that `budget` allows have no class to be saved as.

    `biased`: the result has biases in all projections. The error names what would do, if anything.
    A stock class is asked itself, which takes transformers and torch: for the uniform layout only.
    """
    why = lacks(header, budget, biased=biased)
    if why is None:
        return
    fixes = _fixes(header, budget, biased)
    fix = f"use {' or '.join(fixes)}" if fixes else "grasp cannot prune this model"
    raise GraspError(f"--layout {budget.layout} is not open to {header.family}: {why}: {fix}")


def _fixes(header: Header, budget: Budget, biased: bool) -> list[str]:
    """Options that would do: the other layout and multiples of KV groups, or else both at once."""
    (other,) = {*get_args(Layout)} - {budget.layout}
    groups = header.space.layers[0].kv_groups
    multiples = [m for m in range(budget.kv_multiple + 1, groups + 1) if groups % m == 0]

    def open_to(**changed: Any) -> bool:
        with suppress(GraspError):  # a budget that these multiples cannot meet
            asked = replace(budget, **changed)
            asked.limit(header.space)
            return lacks(header, asked, biased=biased) is None
        return False

    fixes = [f"--layout {other}"] if open_to(layout=other) else []
    fixes += [f"--kv-multiple {m}" for m in multiples if open_to(kv_multiple=m)][:1]
    return (
        fixes
        or [
            f"--layout {other} --kv-multiple {m}"
            for m in multiples
            if open_to(layout=other, kv_multiple=m)
        ][:1]
    )


def lacks(header: Header, budget: Budget, *, biased: bool = False) -> str | None:
    """What is in the way of the budget's layout; None where nothing is."""
    if budget.layout == "per-layer":
        if header.family in FAMILIES:
            return None
        return f"no class has its layers in widths of their own ({', '.join(FAMILIES)} have one)"
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
            return "its class does not take the widths that its config names"
    return None
