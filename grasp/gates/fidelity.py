"""A patched, cut or layer-by-layer model must compute what the model computes: tried on one text.

Gates put an FFN together from its linear layers, and some passes run a decoder layer by layer. A
family that computes more there would be learned and fitted for another function. So the model's
own pass over a short text is compared with that of the model with every gate and scale at 1, run
layer by layer, or cut where units were gated off before. What differs is refused by name.

On a CPU in fp32 gates and layers change no bit of the supported families. Elsewhere, and where
units are cut, sums run in another order and kernels round in other places: see `tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.config import GateSite, ScaleKind
from grasp.errors import GraspError, reason
from grasp.gates.gating import gated, unpadded
from grasp.gates.scales import scaled
from grasp.model.layerwise import first_hidden, layer_options, output_of, runner
from grasp.model.units import UnitSpace, decoder_layers

TOKENS = 64  # at most: enough to see another function, of little cost for a large model
SAFETY = 4  # a model that is refused wrongly is worse than a difference of a few roundings
LOGITS = "logits"

Outputs = dict[str, Tensor]  # of modules by their names, in the order of the pass; logits last


def tolerance(model: PreTrainedModel, depth: int) -> float:
    """The error that rounding explains behind `depth` modules, relative to the norm of an output.

    Each module rounds its output to the model's dtype and its sums in fp32, of as many terms as the
    widest layer has inputs; independent errors add up in squares. This is `SAFETY` times that:
    logits of SmolLM2-135M, 60 modules deep, differ on a CPU by up to 0.06 in bf16, 0.008 in fp16
    and 1e-5 in fp32, where 0.24, 0.03 and 1.5e-4 are tolerated.
    """
    terms = max(linear.weight.shape[1] for m in decoder_layers(model) for linear in m.linears)
    own, sums = (torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))
    return SAFETY * math.sqrt(depth) * (own + sums * math.sqrt(terms))


@torch.no_grad()
def check_gates(model: PreTrainedModel, kind: ScaleKind, site: GateSite, ids: Tensor) -> float:
    """Refuse a model that gates and scales of 1 change. Returns the relative error of its logits.

    ids: int64 [1, seq_len], of which `TOKENS` are read. Raises GraspError with the first module
    that differs by more than its `tolerance`.
    """
    ids, modules = _short(model, ids), _gated_modules(model)
    want = _outputs(model, modules, lambda: model(input_ids=ids, use_cache=False))

    def run() -> Any:
        with scaled(model, UnitSpace.of(model), kind, site):  # masked as they learn
            return model(input_ids=ids, attention_mask=unpadded(ids), use_cache=False)

    got = _tried(model, lambda: _outputs(model, modules, run), "gated")
    return _compare(
        model, want, got, "computes more than grasp knows of: with every gate at 1 it differs"
    )


@torch.no_grad()
def gated_outputs(model: PreTrainedModel, mask: Mask, ids: Tensor) -> Outputs:
    """What `check_cut` compares with: the model whose dropped units are gated off."""
    ids, modules = _short(model, ids), _gated_modules(model)
    with gated(model, mask.space) as gates:
        gates.set(mask.keep.to(model.device, torch.float32))
        return _outputs(model, modules, lambda: model(input_ids=ids, use_cache=False))


@torch.no_grad()
def check_cut(model: PreTrainedModel, want: Outputs, ids: Tensor) -> float:
    """Refuse a model that computes something else once `mask` is cut out of it.

    `want` are its `gated_outputs` before, of the same ids. Returns and raises as `check_gates`.
    """
    ids, modules = _short(model, ids), _gated_modules(model)

    def run() -> Any:
        return model(input_ids=ids, use_cache=False)

    got = _tried(model, lambda: _outputs(model, modules, run), "cut")
    return _compare(
        model, want, got, "reads more than its units: cut, not gated off, they make it differ"
    )


@torch.no_grad()
def check_layers(model: PreTrainedModel, ids: Tensor, needed_by: str) -> float:
    """Refuse a model whose decoder layers, run one by one, give something else than its own pass.

    Returns the relative error of what the last layer gives; ids and errors as `check_gates`.
    """
    ids, layers = _short(model, ids), list(model.get_decoder().layers)
    modules = _named(model, layers)
    want = _outputs(model, modules, lambda: model(input_ids=ids, use_cache=False))
    del want[LOGITS]

    def one_by_one() -> Outputs:
        hidden, given = first_hidden(model, ids), {}
        for layer, options in zip(layers, layer_options(model, ids), strict=True):
            hidden = runner(layer, options)(hidden)
            given[modules[layer]] = hidden.float().cpu()
        return given

    how = f"layer by layer, as {needed_by} runs it"
    got = _tried(model, one_by_one, how)
    return _compare(model, want, got, f"needs more than what enters it: {how}, it differs")


def _short(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return ids[:1, :TOKENS].to(model.device)


def _gated_modules(model: PreTrainedModel) -> dict[nn.Module, str]:
    return _named(model, (part for m in decoder_layers(model) for part in (m.attention, m.mlp)))


def _named(model: PreTrainedModel, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    names = {module: name for name, module in model.named_modules()}
    return {module: names[module] for module in modules}


def _outputs(
    model: PreTrainedModel, modules: dict[nn.Module, str], run: Callable[[], Any]
) -> Outputs:
    """What `modules` and `run` itself, which runs the model, give; on the CPU."""
    seen: Outputs = {}

    def see(_: nn.Module, args: Any, output: Any, name: str) -> None:
        seen[name] = output_of(output).float().cpu()

    with ExitStack() as hooks:
        for module, name in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(see, name=name)))
        seen[LOGITS] = run().logits.float().cpu()
    return seen


def _tried(model: PreTrainedModel, run: Callable[[], Outputs], how: str) -> Outputs:
    """What a way to run a model gives that its own code may have something against."""
    try:
        return run()
    except (GraspError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign model's own code may raise
        raise GraspError(
            f"{type(model).__name__} is not supported: it does not run {how} ({reason(error)})"
        ) from error


def _compare(model: PreTrainedModel, want: Outputs, got: Outputs, what: str) -> float:
    """The relative error of the last outputs; GraspError with the first that are too far apart."""
    error = 0.0
    for depth, name in enumerate(want, 1):
        if not want[name].isfinite().all():
            dtype = str(model.dtype).removeprefix("torch.")
            raise GraspError(f"the model's own {name} is not finite in {dtype}: use --dtype fp32")
        error, limit = _error(want[name], got[name]), tolerance(model, depth)
        if not error <= limit:
            kind = "" if name == LOGITS else f" ({type(model.get_submodule(name)).__name__})"
            raise GraspError(
                f"{type(model).__name__} is not supported: {name}{kind} {what} by {error:.1e} "
                f"(rounding explains {limit:.1e})"
            )
    return error


def _error(want: Tensor, got: Tensor) -> float:
    if want.shape != got.shape:
        return math.inf
    return float((got - want).norm() / want.norm().clamp(min=torch.finfo().tiny))
