"""Refit against a plain least-squares solution, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, tiny_model

from grasp.budget.projection import Mask
from grasp.compress import refit as refit_module
from grasp.compress.fold import fold_mask
from grasp.compress.refit import refit, solve
from grasp.errors import GraspError
from grasp.model.units import UnitSpace, decoder_layers

BLOCKS = torch.randint(3, 250, (16, 24), generator=torch.Generator().manual_seed(3))


def half(model, seed=0):
    space = UnitSpace.of(model)
    keep = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) < 0.5
    for _, ffn, kv in space.segments():
        keep[ffn.start] = keep[kv.start] = True
    return Mask(space, keep)


def module_inputs(model, module):
    seen = []
    see = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with see, torch.no_grad():
        model(input_ids=BLOCKS)
    return torch.cat(seen)


def test_solve_is_ridge_regression():
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(-2, 2, 12, dtype=torch.float64)
    linear = torch.nn.Linear(12, 5, bias=False).double()
    kept = torch.tensor([0, 3, 4, 9, 11])
    before = linear.weight.detach().clone()
    solve(linear.requires_grad_(False), kept, x.T @ x)
    # one more row a channel: sqrt(ridge) * norm of the channel; its target keeps the weight
    part = x[:, kept]
    rows = torch.diag((refit_module.RIDGE * part.square().sum(0)).sqrt())
    want = torch.linalg.lstsq(
        torch.cat([part, rows]), torch.cat([x @ before.T, rows @ before[:, kept].T])
    ).solution.T
    torch.testing.assert_close(linear.weight[:, kept], want)
    dropped = torch.ones(12, dtype=torch.bool)
    dropped[kept] = False
    assert (linear.weight[:, dropped] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_module_is_fitted_to_the_dense_one_on_the_pruned_prefix(family, monkeypatch):
    """Without a ridge the normal equations hold: the error is orthogonal to what is kept."""
    monkeypatch.setattr(refit_module, "RIDGE", 1e-9)
    dense = tiny_model(family)
    model = copy.deepcopy(dense)
    mask = half(model)
    refit(model, mask, BLOCKS)
    for before, after, (ffn, _) in zip(
        decoder_layers(dense), decoder_layers(model), mask.layers(), strict=True
    ):
        for old, new in (
            (before.ffn.down, after.ffn.down),
            (before.attention.out, after.attention.out),
        ):
            x = module_inputs(model, new).double()
            error = x @ (new.weight - old.weight).double().T
            kept = new.weight.any(0)
            correlation = x[:, kept].T @ error / x[:, kept].norm(dim=0)[:, None] / error.norm()
            assert correlation.abs().max() < 1e-3
        assert torch.equal(after.ffn.down.weight.any(0).nonzero().flatten(), ffn)


def test_it_keeps_nothing_but_units_kept_and_helps():
    dense = tiny_model("llama")
    cut, refitted = copy.deepcopy(dense), copy.deepcopy(dense)
    mask = half(dense)
    steps = []
    refit(refitted, mask, BLOCKS, progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with torch.no_grad():
        whole = refitted(input_ids=BLOCKS).logits
        fold_mask(cut, mask)
        fold_mask(refitted, mask)
        want, plain, ours = (m(input_ids=BLOCKS).logits for m in (dense, cut, refitted))
    torch.testing.assert_close(ours, whole)  # what was dropped was 0 already
    assert (ours - want).norm() < 0.8 * (plain - want).norm()


def test_it_takes_no_more_text_than_it_needs(monkeypatch):
    few, all_of = (tiny_model("llama") for _ in range(2))
    mask = half(few)
    widest = max(layer.ffn for layer in mask.space.layers)
    monkeypatch.setattr(refit_module, "TOKENS_PER_CHANNEL", 2 * BLOCKS.shape[1] / widest)
    refit(few, mask, BLOCKS)
    refit(all_of, mask, BLOCKS[:2])
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


def test_singular_and_broken_gram_matrices():
    linear = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
    kept = torch.arange(3)
    solve(linear, kept, torch.zeros(6, 6))
    assert linear.weight.isfinite().all()
    with pytest.raises(GraspError, match="no solution: use more `samples`"):
        solve(linear, kept, torch.eye(6) - 2 * torch.ones(6, 6))  # no Gram matrix at all
    with pytest.raises(GraspError, match="not finite: use `dtype='fp32'`"):
        solve(linear, kept, torch.full((6, 6), torch.nan))
