"""Run a decoder layer by layer: the inputs and keyword arguments of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel


class _Stop(Exception):
    """Ends a forward pass early, when the rest is not needed."""


def inputs_of(
    module: nn.Module, run: Callable[[Tensor], Any], items: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Yield the input of `module` when `run` gets each of `items`; the pass stops there."""
    seen: list[Tensor] = []

    def stop(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    with module.register_forward_pre_hook(stop):
        for item in items:
            with suppress(_Stop):
                run(item)
            yield seen.pop()


@torch.no_grad()
def first_hidden(model: PreTrainedModel, blocks: Tensor, device: str | None = None) -> Tensor:
    """The input of the first layer: [samples, seq_len, hidden] in the model's dtype.

    blocks: int64 [samples, seq_len], run one by one. It lies on `device`, or on the model's own.
    """
    hidden = torch.empty(0)
    entering = inputs_of(model.get_decoder().layers[0], _forward(model), blocks.split(1))
    for index, x in enumerate(entering):
        if not index:
            hidden = x.new_empty(len(blocks), *x.shape[1:], device=device)
        hidden[index] = x[0]
    return hidden


@torch.no_grad()
def layer_options(model: PreTrainedModel, block: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments that each decoder layer gets: masks, positions, rotations.

    block: int64 [1, seq_len]; the arguments are the same for every block of this length.
    """
    options: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for layer in model.get_decoder().layers:
            stack.enter_context(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: options.append(kwargs), with_kwargs=True
                )
            )
        _forward(model)(block)
    return options


def runner(layer: nn.Module, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A decoder layer as a function of hidden states [samples, seq_len, hidden]."""
    return lambda x: output_of(layer(x, **options))


def fp32_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a layer, with its floating tensors in fp32."""
    wide: dict[str, Any] = tree_map_only(Tensor, _fp32, options)
    return wide


def _fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def output_of(output: Any) -> Tensor:
    """The hidden states in a module's output, which is a tuple in some families."""
    return output[0] if isinstance(output, tuple) else output


def _forward(model: PreTrainedModel) -> Callable[[Tensor], Any]:
    return lambda ids: model(input_ids=ids.to(model.device), use_cache=False)
