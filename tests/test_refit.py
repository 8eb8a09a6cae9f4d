"""Refit against the normal equations, layer by layer, and its parts."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from families import FAMILIES, tiny_model

from grasp.budget.projection import Mask
from grasp.compress import refit as refit_module
from grasp.compress.fold import fold_mask
from grasp.compress.refit import RIDGES, LayerFit, Sums, best_ridge, refit, ridge_solve
from grasp.errors import GraspError
from grasp.model.layerwise import first_hidden, layer_options, runner
from grasp.model.units import UnitSpace, decoder_layers


def random_blocks(samples, length, seed=3):
    return torch.randint(3, 250, (samples, length), generator=torch.Generator().manual_seed(seed))


BLOCKS = random_blocks(16, 64)


def half(model, seed=0):
    space = UnitSpace.of(model)
    keep = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) < 0.5
    for _, ffn, kv in space.segments():
        keep[ffn.start] = keep[kv.start] = True
    return Mask(space, keep)


def passing(model, layer):
    """The input of a layer, and of o_proj and down_proj their inputs and outputs, [tokens, ...]."""
    modules, seen = decoder_layers(model)[layer], []
    hooks = [
        linear.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        for linear in (modules.attention.out, modules.ffn.down)
    ]
    decoder = model.model.layers[layer]
    hooks.append(decoder.register_forward_pre_hook(lambda _, args: seen.append(args[:1])))
    with torch.no_grad():
        model(input_ids=BLOCKS)
    for hook in hooks:
        hook.remove()
    return [[x.double().flatten(0, -2) for x in found] for found in seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_fit_leads_to_the_dense_hidden_states(family, monkeypatch):
    """Without a ridge the normal equations hold: the error is orthogonal to what is kept."""
    monkeypatch.setattr(refit_module, "best_ridge", lambda fitted, held: 1e-9)
    dense = tiny_model(family)
    model = copy.deepcopy(dense)
    mask = half(model)
    refit(model, mask, BLOCKS)
    normed = family in ("gemma2", "gemma3_text")  # a norm between these and the hidden states
    for layer, (ffn, _) in enumerate(mask.layers()):
        ((start,), *want), ((own,), *found) = passing(dense, layer), passing(model, layer)
        targets, reached = ([out for _, out in parts] for parts in (want, found))
        if not normed:
            targets, reached = (
                [*accumulate(targets, initial=start)],
                [*accumulate(reached, initial=own)],
            )
        modules = decoder_layers(model)[layer]
        for linear, (x, _), target, state in zip(
            (modules.attention.out, modules.ffn.down),
            found,
            targets[-2:],
            reached[-2:],
            strict=True,
        ):
            weight = 1 / target.square().sum(1, keepdim=True)
            x = x[:, linear.weight.any(0)]
            error = (target - state) * weight.sqrt()
            x = x * weight.sqrt()
            correlation = x.T @ error / x.norm(dim=0)[:, None] / error.norm()
            assert correlation.abs().max() < 1e-3
        assert torch.equal(modules.ffn.down.weight.any(0).nonzero().flatten(), ffn)


def test_it_keeps_nothing_but_units_kept_and_helps():
    dense = tiny_model("llama")
    cut, refitted = copy.deepcopy(dense), copy.deepcopy(dense)
    mask = half(dense)
    steps = []
    refit(refitted, mask, BLOCKS, progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    other = random_blocks(16, 64, seed=4)
    with torch.no_grad():
        whole = refitted(input_ids=other).logits
        fold_mask(cut, mask)
        fold_mask(refitted, mask)
        want, plain, ours = (m(input_ids=other).logits for m in (dense, cut, refitted))
    torch.testing.assert_close(ours, whole)  # what was dropped was 0 already
    assert (ours - want).norm() < 0.96 * (plain - want).norm()


def test_it_takes_no_more_text_than_it_needs(monkeypatch):
    few, all_of = (tiny_model("llama") for _ in range(2))
    mask = half(few)
    monkeypatch.setattr(refit_module, "TOKENS_PER_CHANNEL", 3 * BLOCKS.shape[1] / mask.space.widest)
    refit(few, mask, BLOCKS)
    refit(all_of, mask, BLOCKS[:3])
    assert torch.equal(
        few.model.layers[-1].mlp.down_proj.weight, all_of.model.layers[-1].mlp.down_proj.weight
    )


def test_keeping_everything_changes_nothing():
    dense = tiny_model("qwen2")
    model = copy.deepcopy(dense)
    space = UnitSpace.of(model)
    refit(model, Mask(space, torch.ones(space.size, dtype=torch.bool)), BLOCKS)
    for name, weight in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_singular_and_broken_matrices():
    power, missing = torch.tensor(1.0), torch.zeros(6, 4, dtype=torch.float64)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    assert not ridge_solve(zero, power, missing, 0.1).any()
    no_gram_matrix = torch.eye(6).double() - 2
    with pytest.raises(GraspError, match="no solution: use more `samples`"):
        ridge_solve(no_gram_matrix, power, missing, 0.1)
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 1e30  # their product overflows
    with pytest.raises(GraspError, match="not finite: use `dtype='fp32'`"):
        refit(model, half(model), BLOCKS)


def sums_of(x, target):
    return Sums(x.T @ x, x.T @ target)


def test_a_fit_is_kept_only_if_it_helps_on_held_out_tokens():
    g = torch.Generator().manual_seed(0)
    x, held_x = (torch.randn(200, 40, generator=g) for _ in range(2))
    weight = torch.randn(40, 8, generator=g)

    def ridge(noise):
        missing, held = (noise * torch.randn(200, 8, generator=g) for _ in range(2))
        return best_ridge(sums_of(x, x @ weight + missing), sums_of(held_x, held_x @ weight + held))

    assert ridge(0.1) == RIDGES[0]
    assert ridge(12.0) in RIDGES[1:]
    lost = torch.randn(200, 8, generator=g)
    assert best_ridge(sums_of(x, lost), sums_of(x, -lost)) is None


def test_a_massive_first_position_does_not_rule_the_fit():
    """All hidden states are off by a tenth of their size, which is a hundredfold at the first."""
    model = tiny_model("llama", layers=1)
    blocks, g = random_blocks(24, 32), torch.Generator().manual_seed(0)
    run = runner(model.model.layers[0], layer_options(model, blocks[:1])[0])
    ends = decoder_layers(model)[0].outputs
    down = ends[0]  # FFN first
    hidden, weight, changes = first_hidden(model, blocks), down.weight.clone(), []
    off = hidden.norm(dim=-1, keepdim=True) * torch.randn(hidden.shape[-1], generator=g) / 100
    for factor in (1, 100):
        size = torch.ones(32, 1).index_fill(0, torch.tensor([0]), factor)
        with torch.no_grad():
            down.weight.copy_(weight)
            samples = range(20), range(20, 24)
            fit = LayerFit.of(run, ends, (hidden + off) * size, hidden * size, *samples)
            fit.keep(down, torch.arange(96))
        changes.append(down.weight - weight)
    assert (changes[1] - changes[0]).norm() < 0.3 * changes[0].norm() != 0
