"""Fit o_proj and down_proj of a pruned layer to the dense model's hidden states.

Layers are visited in depth order, each with two inputs: what the dense layers before it give, and
what the pruned ones give. The kept columns are fitted by least squares so that the hidden states
after them are those of the dense layer on its own input. So a fit makes up for the units dropped
here and for what earlier layers have lost. It is ridge regression towards the present weights,
every token's error relative to its hidden state, dense or pruned, so that massive activations count
no more than others. The ridge is the one with the least error on held-out blocks, and a fit that
does not lower that error is dropped.

Fitting the second level of each module is from Greedy Output Approximation (Li, Dong, Lei, arXiv
2407.19126), whose target is the module's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.compress.refit import ridge_solve
from grasp.config import HELD_OUT
from grasp.errors import GraspError
from grasp.model.layerwise import first_hidden, fp32_options, inputs_of, runner
from grasp.model.load import widened
from grasp.model.places import device_of, sent
from grasp.model.units import LayerModules

RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # relative to the power of each input
TINY = torch.finfo(torch.float32).tiny


@dataclass
class Streams:
    """The two inputs of a decoder layer, [samples, seq_len, hidden].

    They lie in the host's memory; a device gets one sample at a time.
    """

    dense: Tensor  # behind the dense layers before it
    pruned: Tensor  # behind the pruned ones
    fitted: list[int]  # samples that are fitted
    held: list[int]  # samples that choose the ridge

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: Tensor) -> Streams:
        """The inputs of the first layer; blocks: int64 [samples, seq_len]."""
        dense, every = first_hidden(model, blocks, "cpu"), min(HELD_OUT, len(blocks))
        held = list(range(every - 1, len(blocks), every))
        fitted = [sample for sample in range(len(blocks)) if sample not in held]
        return cls(dense, dense.clone(), fitted, held)

    def fit(self, layer: nn.Module, options: dict[str, Any], modules: LayerModules) -> LayerFit:
        """Run the dense layer, which changes `dense` to its outputs."""
        plain = adds_up(layer, options, modules.outputs, self.dense[:1])
        run, samples = on_device(layer, options), (self.fitted, self.held)
        return LayerFit.of(run, modules.outputs, plain, self.pruned, self.dense, *samples)


def on_device(layer: nn.Module, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A decoder layer as a function of hidden states from anywhere, [samples, seq_len, hidden]."""
    run, device = runner(layer, options), device_of(layer)
    return lambda x: run(sent(x, device))


@dataclass(frozen=True)
class Sums:
    """Sums over tokens of inputs x of a linear layer, and of what a target lacks after it."""

    gram: Tensor  # x x^T, fp32 [in, in]
    missing: Tensor  # x (target - found)^T, fp32 [in, out]

    def add_(self, other: Sums) -> None:
        """Add other tokens, in place."""
        self.gram.add_(other.gram)
        self.missing.add_(other.missing)

    def fit(self, ridge: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """The change of the weight by least squares, solved in `dtype`: fp32 [in, out]."""
        gram, power = self.gram.to(dtype, copy=True), self.gram.diagonal().mean()
        return ridge_solve(gram, power, self.missing.to(dtype), ridge).float()

    def rise(self, change: Tensor) -> float:
        """By how much a change of the weight raises the squared error on these tokens."""
        return float((change * (self.gram @ change - 2 * self.missing)).sum())


def best_ridge(fitted: Sums, held: Sums) -> float | None:
    """The ridge whose fit has the least error on held-out tokens; None if no fit lowers it."""
    rises = {ridge: held.rise(fitted.fit(ridge, torch.float32)) for ridge in RIDGES}
    best = min(rises, key=rises.__getitem__)
    return best if rises[best] < 0 else None


@dataclass(frozen=True)
class LayerFit:
    """A decoder layer that is being pruned, and what the dense one makes of its own inputs."""

    run: Callable[[Tensor], Tensor]  # the layer
    ends: tuple[nn.Linear, ...]  # o_proj and down_proj
    adds_up: bool  # what these two give is added to the hidden states as it is
    pruned: Tensor  # inputs, [samples, seq_len, hidden]
    dense: Tensor  # outputs of the dense layer, like `pruned`
    targets: dict[nn.Linear, Tensor]  # hidden states after each end, like `pruned`
    fitted: Sequence[int]  # samples
    held: Sequence[int]

    @classmethod
    def of(
        cls,
        run: Callable[[Tensor], Tensor],
        ends: tuple[nn.Linear, ...],
        adds_up: bool,
        pruned: Tensor,
        dense: Tensor,
        fitted: Sequence[int],
        held: Sequence[int],
    ) -> LayerFit:
        """`run` is the layer before it is pruned; it changes `dense` to the layer's outputs."""
        targets: dict[nn.Linear, Tensor] = {}
        found = cls(run, ends, adds_up, pruned, dense, targets, fitted, held)
        with _outputs(ends) as seen:
            for index, x in enumerate(dense.split(1)):
                out = run(x)
                added, start = [own for _, own in seen], x.to(out.device)
                for place, (linear, _) in enumerate(seen, 1):
                    if linear not in targets:  # after the last end, the outputs are the target
                        last = adds_up and place == len(seen)
                        targets[linear] = dense if last else torch.empty_like(dense)
                    targets[linear][index] = found.state(start, added[:place])[0]
                seen.clear()
                x.copy_(out)
        return found

    def state(self, hidden: Tensor, added: Sequence[Tensor]) -> Tensor:
        """The hidden states after outputs of `ends`.

        Where the layer does not add these as they are, the last of them instead.
        """
        if not self.adds_up:
            return added[-1].view_as(hidden)
        for own in added:  # one after the other, as the layer rounds them
            hidden = hidden + own.view_as(hidden)  # some mixtures' FFNs see one sequence of tokens
        return hidden

    def keep(self, linear: nn.Linear, kept: Tensor) -> None:
        """Fit the columns `kept` (int64) of o_proj or down_proj in place; the others become 0.

        Raises GraspError as `ridge_solve` does, and if activations are not finite.
        """
        weight = linear.weight
        kept = kept.to(weight.device)
        columns = weight[:, kept].float()
        weight.zero_()
        weight[:, kept] = columns.to(weight.dtype)
        change = self.change(linear, kept)
        if change is not None:
            weight[:, kept] = (columns + change.T).to(weight.dtype)

    def change(self, linear: nn.Linear, kept: Tensor) -> Tensor | None:
        """What to add to the columns `kept` of o_proj or down_proj, fp32 [kept, out].

        It is fitted to all tokens; None if no fit helps on held-out ones.
        """
        fitted, held = (self._sums(linear, kept, part) for part in (self.fitted, self.held))
        ridge = best_ridge(fitted, held)
        if ridge is None:
            return None
        fitted.add_(held)
        del held  # its memory is needed for the factors
        return fitted.fit(ridge)

    def _sums(self, linear: nn.Linear, kept: Tensor, part: Sequence[int]) -> Sums:
        """Over the tokens of some samples, each token's error by `_power`."""
        gram = torch.zeros(len(kept), len(kept), device=kept.device)
        missing = torch.zeros(len(kept), linear.out_features, device=kept.device)
        with _outputs(self.ends) as seen:
            for index in part:
                h = self.pruned[index][None].to(kept.device)
                (x,) = inputs_of(linear, self.run, [h])
                own = F.linear(x, linear.weight, linear.bias)  # linear(x) would stop the pass
                target = self.targets[linear][index].to(kept.device)
                found = self.state(h, [*(out for _, out in seen), own])[0]
                seen.clear()
                power, lacking = _power(target, found)[:, None], target - found
                x = x.flatten(0, -2)[:, kept].float()
                gram.addmm_(x.T, x / power)
                missing.addmm_((x / power).T, lacking.float())
        if not (gram.isfinite().all() and missing.isfinite().all()):
            raise GraspError(
                "activations are not finite: use `dtype='fp32'` or `compensate='none'`"
            )
        return Sums(gram, missing)

    def error(self, sample: int) -> Tensor:
        """Squared error of the layer's outputs on a sample, fp32 scalar.

        A mean over tokens, by `_power`; the target is the hidden states behind the dense layer.
        """
        found = self.output(sample)[0].float()
        target = sent(self.dense[sample], found.device).float()
        return ((found - target).square().sum(1) / _power(target, found.detach())).mean()

    def output(self, sample: int) -> Tensor:
        """What the layer gives on a sample of its inputs, [1, seq_len, hidden]."""
        return self.run(self.pruned[sample][None])

    def advance(self) -> None:
        """Run the pruned layer on its inputs, in place."""
        for x in self.pruned.split(1):
            x.copy_(self.run(x))


def _power(target: Tensor, found: Tensor) -> Tensor:
    """What the error of each token is relative to: the larger square of the two, fp32 [tokens].

    With the target's alone, a few tokens that a pruned layer takes for a massive activation would
    outweigh all others.
    """
    squares = target.float().square().sum(1), found.float().square().sum(1)
    return torch.maximum(*squares).clamp(min=TINY)


def adds_up(
    layer: nn.Module, options: dict[str, Any], ends: Iterable[nn.Linear], x: Tensor
) -> bool:
    """Whether a layer adds the outputs of `ends` to its input x as they are, without a norm.

    It is run in fp32: bf16 rounds a large hidden state by as much as a layer changes it.
    """
    with widened(layer, torch.float32), _outputs(ends) as seen:
        out = on_device(layer, fp32_options(options))(x.float())
        change = out - x.to(out.device)
        rest = change - sum(own for _, own in seen)
    return bool(rest.norm() < 1e-2 * change.norm())


@contextmanager
def _outputs(linears: Iterable[nn.Linear]) -> Iterator[list[tuple[nn.Linear, Tensor]]]:
    """Linear layers with their outputs, in the order that they run."""
    seen: list[tuple[nn.Linear, Tensor]] = []
    with ExitStack() as hooks:
        for linear in linears:
            hook = linear.register_forward_hook(lambda own, _, out: seen.append((own, out)))
            hooks.enter_context(hook)
        yield seen
