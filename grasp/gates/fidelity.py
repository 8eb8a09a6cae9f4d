"""Check on a short text that a gated, cut or layer-by-layer model still computes the same.

Gates rebuild an FFN from its linear layers, and some passes run a decoder layer by layer. If a
family computes more there, gates and fits would be learned for another function. So the model's own
pass is compared with two others: one with every gate and scale at 1, one layer by layer. A cut
model is compared with the model whose dropped units are gated off. GraspError names the first
module that differs.

On a CPU in fp32, gates and layers change no bit of the supported families. Elsewhere, and after a
cut, sums run in another order and kernels round in other places: see `tolerance`.
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

TOKENS = 64  # at most: enough to detect another function, and cheap for a large model
SAFETY = 4  # refusing a good model is worse than accepting a few roundings more
LOGITS = "logits"
CUT_DIFFERS = "reads more than its units: cut, not gated off, they make it differ"

Outputs = dict[str, Tensor]  # by module name, in the order of the pass; logits last


def tolerance(model: PreTrainedModel, depth: int) -> float:
    """The error that rounding explains after `depth` modules, relative to the norm of an output.

    Each module rounds its output to the model's dtype, and its sums to fp32; a sum has as many
    terms as the widest layer has inputs. Independent errors add up in squares. The tolerance is
    `SAFETY` times that. Logits of SmolLM2-135M, 60 modules deep, differ on a CPU by up to 0.06
    in bf16, 0.008 in fp16 and 1e-5 in fp32; the tolerances are 0.24, 0.03 and 1.5e-4.
    """
    layers = decoder_layers(model)
    terms = [linear.weight.shape[1] for m in layers for linear in m.linears]
    terms += [n for m in layers if m.routed for n in (m.hidden_size or 0, m.routed.width)]
    own, sums = (torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))
    return SAFETY * math.sqrt(depth) * (own + sums * math.sqrt(max(terms)))


@torch.no_grad()
def check_gates(model: PreTrainedModel, kind: ScaleKind, site: GateSite, ids: Tensor) -> float:
    """Check that gates and scales of 1 leave a model unchanged.

    ids: int64 [1, seq_len], of which the first `TOKENS` are used. Returns the relative error of the
    logits. Raises GraspError with the first module that differs by more than its `tolerance`.
    """
    ids, modules = _short(model, ids), _gated_modules(model)
    want = _outputs(model, modules, lambda: model(input_ids=ids, use_cache=False))

    def run() -> Any:
        with scaled(model, UnitSpace.of(model), kind, site):  # with the mask of training
            return model(input_ids=ids, attention_mask=unpadded(ids), use_cache=False)

    got = _tried(model, lambda: _outputs(model, modules, run), "gated")
    return _compare(
        model, want, got, "computes more than grasp knows of: with every gate at 1 it differs"
    )


@torch.no_grad()
def gated_outputs(model: PreTrainedModel, mask: Mask, ids: Tensor) -> Outputs:
    """Outputs of the model with its dropped units gated off, for `check_cut` to compare with."""
    ids, modules = _short(model, ids), _gated_modules(model)
    with gated(model, mask.space) as gates:
        gates.set(mask.keep.to(model.device, torch.float32))
        return _outputs(model, modules, lambda: model(input_ids=ids, use_cache=False))


@torch.no_grad()
def check_cut(model: PreTrainedModel, want: Outputs, ids: Tensor) -> float:
    """Check that a cut model computes the same as with its dropped units gated off.

    `want`: the `gated_outputs` before the cut, for the same ids. Returns and raises as
    `check_gates`.
    """
    ids, modules = _short(model, ids), _gated_modules(model)

    def run() -> Any:
        return model(input_ids=ids, use_cache=False)

    got = _tried(model, lambda: _outputs(model, modules, run), "cut")
    return _compare(model, want, got, CUT_DIFFERS)


@torch.no_grad()
def check_cut_layer(model: PreTrainedModel, index: int, want: Tensor, got: Tensor) -> None:
    """Check that a decoder layer gives the same cut as with its dropped units at zero.

    Raises as `check_gates`.
    """
    (name,) = _named(model, [model.get_decoder().layers[index]]).values()
    _compare(model, {name: want.float().cpu()}, {name: got.float().cpu()}, CUT_DIFFERS)


@torch.no_grad()
def check_layers(model: PreTrainedModel, ids: Tensor, needed_by: str, fix: str = "") -> float:
    """Check that decoder layers, run one by one, give the same outputs as the model's own pass.

    All but the hidden states comes from another text, which it must not depend on. Returns the
    relative error of the last layer's output; ids and errors as in `check_gates`. `fix` ends the
    error's line.
    """
    ids, layers = _short(model, ids), list(model.get_decoder().layers)
    modules = _named(model, layers)
    want = _outputs(model, modules, lambda: model(input_ids=ids, use_cache=False))
    del want[LOGITS]

    def one_by_one() -> Outputs:
        hidden, given = first_hidden(model, ids), {}
        for layer, options in zip(layers, layer_options(model, ids.flip(1)), strict=True):
            hidden = runner(layer, options)(hidden)
            given[modules[layer]] = hidden.float().cpu()
        return given

    how = f"layer by layer, as {needed_by} runs it"
    try:
        got = _tried(model, one_by_one, how)
        return _compare(model, want, got, f"needs more than what enters it: {how}, it differs")
    except GraspError as error:
        raise GraspError(f"{error}{fix}") from error


def _short(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return ids[:1, :TOKENS].to(model.device)


def _gated_modules(model: PreTrainedModel) -> dict[nn.Module, str]:
    """Attentions, FFNs and mixtures, in the order that they run."""
    found: list[nn.Module] = []
    for m in decoder_layers(model):
        found += [part.module for part in reversed(m.parts)]
        found += [m.routed.block] if m.routed else []
    return _named(model, found)


def _named(model: PreTrainedModel, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    names = {module: name for name, module in model.named_modules()}
    return {module: names[module] for module in modules}


def _outputs(
    model: PreTrainedModel, modules: dict[nn.Module, str], run: Callable[[], Any]
) -> Outputs:
    """The outputs of `modules` while `run` runs the model, and its logits: fp32 on the CPU."""
    seen: Outputs = {}

    def see(_: nn.Module, args: Any, output: Any, name: str) -> None:
        seen[name] = output_of(output).float().cpu()

    with ExitStack() as hooks:
        for module, name in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(see, name=name)))
        seen[LOGITS] = run().logits.float().cpu()
    return seen


def _tried(model: PreTrainedModel, run: Callable[[], Outputs], how: str) -> Outputs:
    """Call `run`, and raise GraspError if the model's own code fails."""
    try:
        return run()
    except (GraspError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a foreign model's code may raise anything
        raise GraspError(
            f"{type(model).__name__} is not supported: it does not run {how} ({reason(error)})"
        ) from error


def _compare(model: PreTrainedModel, want: Outputs, got: Outputs, what: str) -> float:
    """The relative error of the last output. Raises GraspError with the first above tolerance."""
    error = 0.0
    for depth, name in enumerate(want, 1):
        if not want[name].isfinite().all():
            dtype = str(model.dtype).removeprefix("torch.")
            fix = "the weights are damaged: download them again"
            fix = fix if model.dtype == torch.float32 else "use `dtype='fp32'`"
            raise GraspError(f"the model's own {name} values are not finite in {dtype}: {fix}")
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
