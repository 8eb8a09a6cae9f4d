"""Check on a short text that a gated, cut or layer-by-layer model still computes the same.

Gates rebuild an FFN from its linear layers, and some passes run a decoder layer by layer. If a
family computes more there, gates and fits would be learned for another function. So the model's own
pass is compared with two others: one with every gate and scale at 1, one layer by layer. A cut
model is compared with the model whose dropped units are gated off. GraspError names the first
module that differs.

On a CPU in fp32, gates and layers change no bit of the supported families. Elsewhere, and after a
cut, sums run in another order and kernels round in other places: see `tolerance`. So gates and cuts
are compared layer by layer, each on the same inputs: a model may turn one rounding into another
massive activation, and with that into other outputs of all later layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

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

TOKENS = 64  # at most: enough to detect another function, and cheap for a large model
GATED = 4  # roundings in a row: a norm that applies scales rounds elsewhere, as all after it do
CUT = 1
SAFETY = 4  # refusing a good model is worse than accepting a few roundings more
CUT_DIFFERS = "reads more than its units: cut, not gated off, they make it differ"

T = TypeVar("T")
Outputs = dict[str, Tensor]  # by module name, in the order of the pass; fp32 on the CPU


class Passed(NamedTuple):
    """The hidden states that entered a module, and what it gave, fp32 on the CPU."""

    hidden: Tensor
    output: Tensor


Passes = dict[str, Passed]  # by module name, in the order of the pass


def tolerance(model: PreTrainedModel, depth: int) -> float:
    """The error that rounding explains after `depth` steps, relative to the norm of an output.

    Each rounds its output to the model's dtype, and its sums to fp32; a sum has as many terms as
    the widest layer has inputs. Independent errors add up in squares. The tolerance is `SAFETY`
    times that.
    """
    layers = decoder_layers(model)
    terms = [linear.weight.shape[1] for m in layers for linear in m.linears]
    terms += [n for m in layers if m.routed for n in (m.hidden_size or 0, m.routed.width)]
    own, sums = (torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))
    return SAFETY * math.sqrt(depth) * (own + sums * math.sqrt(max(terms)))


@torch.no_grad()
def check_gates(model: PreTrainedModel, kind: ScaleKind, site: GateSite, ids: Tensor) -> float:
    """Check that gates and scales of 1 leave a model unchanged, layer by layer.

    ids: int64 [1, seq_len], of which the first `TOKENS` are used. Returns the largest relative
    error of an output. Raises GraspError with the first module that differs by more than its
    `tolerance`.
    """
    ids = _short(model, ids)
    want = _passed(model, lambda: model(input_ids=ids, use_cache=False))

    def run() -> Any:
        with scaled(model, UnitSpace.of(model), kind, site):  # with the mask of training
            return model(input_ids=ids, attention_mask=unpadded(ids), use_cache=False)

    what = "computes more than grasp knows of: with every gate at 1 it differs"
    return _compare(model, want, run, GATED, "gated", what)


@torch.no_grad()
def gated_passes(model: PreTrainedModel, mask: Mask, ids: Tensor) -> Passes:
    """What passes through the model with its dropped units gated off, for `check_cut`."""
    ids = _short(model, ids)
    with gated(model, mask.space) as gates:
        gates.set(mask.keep.to(model.device, torch.float32))
        return _passed(model, lambda: model(input_ids=ids, use_cache=False))


@torch.no_grad()
def check_cut(model: PreTrainedModel, want: Passes, ids: Tensor) -> float:
    """Check that a cut model computes the same as with its dropped units gated off.

    `want`: the `gated_passes` before the cut, for the same ids. Returns and raises as
    `check_gates`.
    """
    ids = _short(model, ids)

    def run() -> Any:
        return model(input_ids=ids, use_cache=False)

    return _compare(model, want, run, CUT, "cut", CUT_DIFFERS)


@torch.no_grad()
def check_cut_layer(model: PreTrainedModel, index: int, want: Tensor, got: Tensor) -> None:
    """Check that a decoder layer gives the same cut as with its dropped units at zero.

    Raises as `check_gates`.
    """
    (name,) = _named(model, [model.get_decoder().layers[index]]).values()
    _check(model, name, CUT, want.float().cpu(), got.float().cpu(), CUT_DIFFERS)


@torch.no_grad()
def check_layers(model: PreTrainedModel, ids: Tensor, needed_by: str, fix: str = "") -> float:
    """Check that decoder layers, run one by one, give the same outputs as the model's own pass.

    All but the hidden states comes from another text, which it must not depend on. Returns the
    relative error of the last layer's output; ids and errors as in `check_gates`. `fix` ends the
    error's line.
    """
    ids, layers = _short(model, ids), list(model.get_decoder().layers)
    modules = _named(model, layers)
    want = _passed(model, lambda: model(input_ids=ids, use_cache=False))

    def one_by_one() -> Outputs:
        hidden, given = first_hidden(model, ids), {}
        for layer, options in zip(layers, layer_options(model, ids.flip(1)), strict=True):
            hidden = runner(layer, options)(hidden)
            given[modules[layer]] = hidden.float().cpu()
        return given

    how = f"layer by layer, as {needed_by} runs it"
    try:
        got, what = _tried(model, one_by_one, how), "needs more than what enters it"
        error = 0.0
        for depth, (name, found) in enumerate(got.items(), 1):
            error = _check(
                model, name, depth, want[name].output, found, f"{what}: {how}, it differs"
            )
        return error
    except GraspError as error:
        raise GraspError(f"{error}{fix}") from error


def _short(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return ids[:1, :TOKENS].to(model.device)


def _gated_modules(model: PreTrainedModel) -> dict[nn.Module, str]:
    """Attentions, FFNs and mixtures, in the order that they run, and each layer after its own."""
    found: list[nn.Module] = []
    for layer, m in zip(model.get_decoder().layers, decoder_layers(model), strict=True):
        found += [part.module for part in reversed(m.parts)]
        found += [m.routed.block] if m.routed else []
        found += [layer]
    return _named(model, found)


def _named(model: PreTrainedModel, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    names = {module: name for name, module in model.named_modules()}
    return {module: names[module] for module in modules}


def _passed(model: PreTrainedModel, run: Callable[[], Any], like: Passes | None = None) -> Passes:
    """What passes through attentions, FFNs, mixtures and layers while `run` runs the model.

    With `like`, the hidden states in it enter each layer, whatever the layers before it gave.
    """
    modules, layers = _gated_modules(model), set(model.get_decoder().layers)
    entered: dict[str, Tensor] = {}
    found: Passes = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = modules[module]
        own = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        entered[name] = hidden = like[name].hidden if like and module in layers else own
        args = tuple(hidden if x is own else x for x in args)
        return args, {key: hidden if x is own else x for key, x in kwargs.items()}

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        name = modules[module]
        found[name] = Passed(entered[name], output_of(output).float().cpu())

    with ExitStack() as hooks:
        for module in modules:  # before the hooks of others, which may change what enters
            own = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            hooks.enter_context(own)
            hooks.enter_context(module.register_forward_hook(leave))
        run()
    return {name: found[name] for name in modules.values() if name in found}


def _tried(model: PreTrainedModel, run: Callable[[], T], how: str) -> T:
    """Call `run`, and raise GraspError if the model's own code fails."""
    try:
        return run()
    except (GraspError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a foreign model's code may raise anything
        raise GraspError(
            f"{type(model).__name__} is not supported: it does not run {how} ({reason(error)})"
        ) from error


def _compare(
    model: PreTrainedModel, want: Passes, run: Callable[[], Any], depth: int, how: str, what: str
) -> float:
    """The largest error of a pass in which each layer gets what it got before. Raises GraspError.

    `depth` is that of `tolerance`; `how` and `what` say, in the error, how `run` runs the model and
    what a module does.
    """
    got = _tried(model, lambda: _passed(model, run, want), how)
    return max(
        _check(model, name, depth, own.output, got[name].output, what) for name, own in want.items()
    )


def _check(
    model: PreTrainedModel, name: str, depth: int, want: Tensor, got: Tensor, what: str
) -> float:
    """The relative error of an output. Raises GraspError if it is above `tolerance`."""
    if not want.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        fix = "the weights are damaged: download them again"
        fix = fix if model.dtype == torch.float32 else "use `dtype='fp32'`"
        raise GraspError(f"the model's own {name} values are not finite in {dtype}: {fix}")
    error, limit = _error(want, got), tolerance(model, depth)
    if not error <= limit:
        kind = type(model.get_submodule(name)).__name__
        raise GraspError(
            f"{type(model).__name__} is not supported: {name} ({kind}) {what} by {error:.1e} "
            f"(rounding explains {limit:.1e})"
        )
    return error


def _error(want: Tensor, got: Tensor) -> float:
    if want.shape != got.shape:
        return math.inf
    return float((got - want).norm() / want.norm().clamp(min=torch.finfo().tiny))
