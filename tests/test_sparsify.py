"""Sparse weights: exact patterns, each method against its plain form, and whole runs."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from functools import partial

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import grasp
from benchmarks import sparse_lora, sparsity
from grasp.budget.pattern import Pattern
from grasp.checkpoint import verify
from grasp.config import SparsifyConfig
from grasp.errors import GraspError
from grasp.journal import Journal
from grasp.sparsity import methods
from grasp.sparsity.blocks import linears_of, sparsify_blocks
from grasp.sparsity.methods import (
    by_magnitude,
    by_sparsegpt,
    by_wanda,
    by_wanda_plus_plus,
    step_sizes,
)
from grasp.sparsity.sparsegpt import DAMPING, sparsegpt

BLOCKS = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(3))
PATTERNS = ("2:4", "4:8", "1:4", "0.5", "0.3")
METHODS = {
    "magnitude": by_magnitude,
    "wanda": by_wanda,
    "sparsegpt": by_sparsegpt,
    "wanda++": partial(by_wanda_plus_plus, rounds=1, lr=1e-2),
}


def sparsified(dense, method, pattern="2:4", seed=0):
    """A sparse copy of `dense`, and the error of each block."""
    model = copy.deepcopy(dense)
    errors = sparsify_blocks(
        model, Pattern.parse(pattern), method, BLOCKS, seed=seed, stage=lambda name: Journal()
    )
    return model, errors


def correlated(tokens, inputs, seed=0):
    """Inputs that share a few directions and differ in size: fp32 [tokens, inputs]."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 8, generator=draw) @ torch.randn(8, inputs, generator=draw)
    sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=draw)]
    return (shared + torch.randn(tokens, inputs, generator=draw)) * sizes


# --- patterns ---


@given(st.data())
@settings(max_examples=60)
def test_the_mask_drops_the_lowest_of_each_group(data):
    group = data.draw(st.sampled_from([2, 4, 8]))
    kept, rows, groups = (data.draw(st.integers(1, n)) for n in (group - 1, 3, 4))
    scores = torch.tensor(  # few values, so that there are ties
        data.draw(st.lists(st.integers(0, 3), min_size=(n := rows * groups * group), max_size=n))
    )
    scores = scores.view(rows, -1).float()
    pattern = Pattern.parse(f"{kept}:{group}")
    mask = pattern.keep(scores)
    for row, keep in zip(scores.view(-1, group), mask.view(-1, group), strict=True):
        assert keep.sum() == kept
        assert row[keep].min() >= row[~keep].max()
    assert pattern.holds((scores + 1) * mask)
    mask.view(-1, group)[-1] = True
    assert not pattern.holds((scores + 1) * mask)


@given(st.integers(1, 99), st.integers(2, 40), st.integers(1, 39))
@settings(max_examples=60)
def test_a_part_of_each_row_is_exact_whole_or_in_pieces(percent, width, cut):
    pattern = Pattern.parse(str(percent / 100))
    scores = torch.rand(3, width)
    zeros = int(Fraction(percent, 100) * width)
    assert (pattern.keep(scores).sum(1) == width - zeros).all()
    cut = min(cut, width - 1)
    pieces = [pattern.keep(scores[:, :cut]), pattern.keep(scores[:, cut:], cut)]
    assert (torch.cat(pieces, 1).sum(1) == width - zeros).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("half", "must be N:M, as 2:4, or a part of each row"),
        ("2:", "must be N:M, as 2:4, or a part of each row"),
        ("2:x", "must be N:M, as 2:4, or a part of each row"),
        ("1:0", "must be N:M, as 2:4, or a part of each row"),
    ]
    + [
        (text, "must be N:M (with|or a part between)")
        for text in ("4:2", "4:4", "0:4", "-1:4", "0", "1", "1.5", "-0.5")
    ],
)
def test_what_is_no_pattern(text, reason):
    with pytest.raises(GraspError, match=f"`pattern` .*{reason}"):
        Pattern.parse(text)


# --- methods ---


@pytest.mark.parametrize("pattern", ["2:4", "0.3"])
@pytest.mark.parametrize("method", METHODS)
def test_every_linear_has_the_pattern_and_nothing_else_changes(method, pattern):
    dense = tiny_model("qwen2")
    sparse, _ = sparsified(dense, METHODS[method], pattern)
    linears = linears_of(sparse)
    assert len(linears) == 7 * 3
    for linear in linears.values():
        rows = linear.weight.unflatten(1, (-1, Pattern.parse(pattern).group or linear.in_features))
        zeros = (rows == 0).sum(-1)
        assert (zeros == int(Pattern.parse(pattern).zeros * rows.shape[-1])).all()
        assert not linear.weight.requires_grad
    before, after = dense.state_dict(), sparse.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in linears}


def test_wanda_plus_plus_without_gradients_and_steps_is_wanda():
    dense = tiny_model("llama")
    alone = partial(by_wanda_plus_plus, rounds=0, lr=1.0, alpha=0.0)
    ours, plain = (sparsified(dense, method)[0].state_dict() for method in (alone, by_wanda))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_papers_on_the_sparse_prefix(family):
    """The last layer by hand: its inputs, and gradients of its output's norm sample by sample."""
    dense = tiny_model(family)
    alpha = 3.0
    method = partial(by_wanda_plus_plus, rounds=0, lr=1.0, alpha=alpha)
    sparse, _ = sparsified(dense, method)
    mixed = copy.deepcopy(sparse)  # sparse but for its last layer
    mixed.model.layers[-1].load_state_dict(dense.model.layers[-1].state_dict())
    last = mixed.model.layers[-1]
    linears = {n: m for n, m in last.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs, squares, outputs = {n: [] for n in linears}, dict.fromkeys(linears, 0), []
    for name, linear in linears.items():
        linear.weight.requires_grad_()
        linear.register_forward_hook(lambda m, x, y, name=name: inputs[name].append(x[0][0]))
    last.register_forward_hook(lambda m, x, y: outputs.append(y))
    for block in BLOCKS:
        mixed(block[None])
        last.zero_grad()
        outputs.pop().norm().backward()
        squares = {n: squares[n] + m.weight.grad**2 for n, m in linears.items()}
    for name, linear in linears.items():
        x = torch.stack(inputs[name]).detach()
        norms = x.square().sum(1).mean(0).sqrt()
        score = (alpha * (squares[name] / len(BLOCKS)).sqrt() + norms) * linear.weight.abs()
        want = Pattern.parse("2:4").keep(score.detach())
        found = sparse.model.layers[-1].get_submodule(name).weight != 0
        assert (want == found).float().mean() > 0.999  # near-ties may fall either way


def test_regional_optimisation_brings_outputs_closer_and_weights_back():
    dense = tiny_model("llama")
    scored, before = sparsified(dense, partial(by_wanda_plus_plus, rounds=0, lr=1.0))
    optimised, after = sparsified(dense, partial(by_wanda_plus_plus, rounds=3, lr=0.1))
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True))
    name = "model.layers.0.mlp.down_proj.weight"
    masks = [model.get_parameter(name) != 0 for model in (scored, optimised)]
    assert 0 < (masks[0] != masks[1]).float().mean() < 0.2
    other, _ = sparsified(dense, partial(by_wanda_plus_plus, rounds=3, lr=0.1, drawn=4), seed=1)
    assert not torch.equal(other.get_parameter(name), optimised.get_parameter(name))


@pytest.mark.parametrize("factor", [16.0, 1 / 16])
def test_a_step_follows_the_scale_of_the_weights(factor):
    """The same model in other units, up_proj times a factor and down_proj over it."""
    dense, scaled = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for layer in scaled.model.layers:
            layer.mlp.up_proj.weight *= factor
            layer.mlp.down_proj.weight /= factor
    # gradients of a weight and its norm scale apart, so the choice is by norms alone
    method = partial(by_wanda_plus_plus, rounds=3, lr=0.03, alpha=0.0)
    (first, errors), (second, same) = (sparsified(model, method) for model in (dense, scaled))
    assert same == pytest.approx(errors, rel=2e-3)
    ups = [model.model.layers[0].mlp.up_proj.weight for model in (first, second)]
    assert ((ups[0] != 0) == (ups[1] != 0)).float().mean() > 0.99
    change = (ups[1] / factor - ups[0]).norm() / ups[0].norm()
    assert change < 0.01


@pytest.mark.parametrize(
    ("inputs", "scale", "step"),
    [(4096, 0.02, 3e-6), (11008, 0.02, 2e-6), (576, 0.19, 8e-5), (1536, 0.19, 5e-5)],
)
def test_one_rate_suits_the_shapes_of_a_7b_and_of_a_135m(inputs, scale, step):
    """In a 7B an `lr` of 1e-3 is the published 3e-7, within a factor of two."""
    weight = torch.randn(8, inputs, generator=torch.Generator().manual_seed(0)) * scale
    (found,) = step_sizes([weight], SparsifyConfig.lr)
    assert found == pytest.approx(step, rel=0.1)
    published = 3e-7 if scale == 0.02 else step / 10
    assert step_sizes([weight], 1e-3)[0] == pytest.approx(published, rel=0.5)
    # against it: signs that all agree with the input's move the output by `lr` of its size
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(1))
    moved, output = found * x.abs().sum(), (weight @ x).square().mean().sqrt()
    assert moved < 2 * SparsifyConfig.lr * output


def test_a_learning_rate_too_large():
    with pytest.raises(GraspError, match=r"not finite in decoder block 0: .* a smaller `lr`"):
        sparsified(tiny_model("llama"), partial(by_wanda_plus_plus, rounds=1, lr=1e30))


# --- SparseGPT ---


def obs(weight, gram, pattern):
    """Optimal brain surgery in fp64, an inverse for every column, one group at a time."""
    weight, gram = weight.double().clone(), gram.double()
    gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(len(gram))]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j, inverse in enumerate(inverses):
        if j % pattern.group == 0:
            here = slice(j, j + pattern.group)
            cost = torch.stack([i[0, 0] for i in inverses[here]])
            keep[:, here] = pattern.keep(weight[:, here].square() / cost)
        error = weight[:, j] * ~keep[:, j] / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        weight[:, j] *= keep[:, j]
    return weight


@pytest.mark.parametrize("pattern", ["2:4", "3:6"])
def test_sparsegpt_is_optimal_brain_surgery(pattern):
    x, weight = correlated(400, 150), torch.randn(6, 150)  # 150: more than one batch, not whole
    gram = x.T @ x
    weight = weight[:, : 150 // (n := Pattern.parse(pattern).group) * n]
    gram = gram[: weight.shape[1], : weight.shape[1]]
    found = sparsegpt(weight, gram, Pattern.parse(pattern))
    torch.testing.assert_close(
        found, obs(weight, gram, Pattern.parse(pattern)).float(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_of_independent_inputs_is_magnitude(pattern):
    weight, pattern = torch.randn(8, 96), Pattern.parse(pattern)
    torch.testing.assert_close(
        sparsegpt(weight, torch.eye(96), pattern), weight * pattern.keep(weight.abs())
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_errors_on_correlated_inputs_are_in_order(pattern):
    x, weight, pattern = correlated(600, 192), torch.randn(64, 192), Pattern.parse(pattern)
    candidates = (
        weight * pattern.keep(weight.abs()),
        weight * pattern.keep(weight.abs() * x.norm(dim=0)),
        sparsegpt(weight, x.T @ x, pattern),
    )
    errors = [(x @ (weight - w).T).norm() for w in candidates]
    assert errors[2] < 0.9 * errors[1] and errors[1] < 0.9 * errors[0]


def test_inputs_that_are_never_active_and_hessians_that_are_none():
    x, weight = correlated(50, 32), torch.randn(4, 32)
    x[:, ::4] = 0
    sparse = sparsegpt(weight, x.T @ x, Pattern.parse("2:4"))
    assert sparse.isfinite().all() and (sparse[:, ::4] == 0).all()
    for gram in (torch.full((32, 32), torch.nan), torch.eye(32) - 2 * torch.ones(32, 32)):
        with pytest.raises(GraspError, match="no inverse: use more `samples`"):
            sparsegpt(weight, gram, Pattern.parse("2:4"))


def test_a_block_with_a_matrix_that_is_no_linear_is_refused():
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=256)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2))
    with pytest.raises(
        GraspError, match=r"MixtralForCausalLM is not supported: .* belongs to no plain nn.Linear"
    ):
        linears_of(model)


# --- whole runs ---

SMALL = dict(samples=4, seq_len=32, rounds=1, lr=1e-4, eval_windows=2, device="cpu")


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def sparse(tiny, text, tmp_path_factory):
    """A whole run that nothing interrupted."""
    return grasp.sparsify(
        tiny, tmp_path_factory.mktemp("sparse") / "out", calibration=text, **SMALL
    )


def test_the_result_is_the_same_model_with_zeros(tiny, sparse, call):
    dense, found = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny, sparse.folder))
    assert type(found) is type(dense)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tiny, sparse.folder)
    )
    assert before == after
    linears = linears_of(found)
    for linear in linears.values():
        assert ((linear.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    sparsity, results = sparse.summary["sparsity"], sparse.summary["results"]
    of = sum(linear.weight.numel() for linear in linears.values())
    assert (sparsity["zeros_before"], sparsity["zeros_after"], sparsity["weights"]) == (
        0,
        of / 2,
        of,
    )
    assert len(sparsity["errors"]) == 3 and all(0 < e < 1 for e in sparsity["errors"])
    assert json.loads((sparse.folder / "grasp.json").read_text()) == sparse.summary
    assert results["dense"]["value"] > 1 and results["dense"]["value"] != results["pruned"]["value"]
    report = verify.verify(sparse.folder)
    assert report.passed and "sparsity" in [check.name for check in report.checks]
    code, said, _ = call("show", sparse.folder)
    assert code == 0 and f"zeros in linears, 2:4: 0 -> {of // 2:,} (50.00%)" in said


def test_a_weight_that_came_back_is_found(sparse, tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = load_file(sparse.folder / file.name)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[weight == 0] = 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    check = verify.check_sparsity(tmp_path, sparse.summary["sparsity"])
    assert not check.passed and check.detail == "model.layers.1.mlp.up_proj.weight is not 2:4"
    file.write_bytes(file.read_bytes()[:100])
    assert not verify.check_sparsity(tmp_path, sparse.summary["sparsity"]).passed


def test_a_stopped_run_goes_on_behind_its_last_block(tiny, text, sparse, tmp_path, monkeypatch):
    begun = []
    prune_block = methods.by_wanda_plus_plus

    def stopped_in_the_second(block, *args, **options):
        begun.append(block)
        if len(begun) == 2:
            raise KeyboardInterrupt
        prune_block(block, *args, **options)

    monkeypatch.setattr(methods, "by_wanda_plus_plus", stopped_in_the_second)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        grasp.sparsify(tiny, out, calibration=text, **SMALL)
    assert not out.exists()
    again = grasp.sparsify(tiny, out, calibration=text, **SMALL)
    assert len(begun) == 4  # of the first block once, and of the two others
    assert weights(out) == weights(sparse.folder)
    assert again.summary["sparsity"] == sparse.summary["sparsity"]
    assert list(tmp_path.iterdir()) == [out]


def test_bf16_weights_stay_bf16(text, tmp_path):
    dense = save_tiny(tmp_path / "dense", "qwen3", dtype=torch.bfloat16)
    grasp.sparsify(dense, tmp_path / "out", calibration=text, pattern="0.3", **SMALL)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert all(Pattern.parse("0.3").holds(m.weight) for m in linears_of(found).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--pattern=half"],
            "--pattern must be N:M, as 2:4, or a part of each row, as 0.5, got 'half'",
        ),
        (["--pattern=4:2"], "--pattern must be N:M with 0 < N < M, got 4:2"),
        (["--pattern=1.5"], "--pattern must be N:M or a part between 0 and 1, got 1.5"),
        (["--pattern=3:7"], "--pattern 3:7 does not fit model.layers.0.self_attn.q_proj, whose 64"),
        (["--rounds=-1"], "--rounds must be at least 0, got -1"),
        (["--lr=0"], "--lr must be a finite number above 0, got 0.0"),
        (["--samples=900"], "too little text: words.txt has "),
        (["--seq-len=257"], "--seq-len must be at most 256 for this model, got 257"),
        (["--eval-text=none.jsonl"], "none.jsonl does not exist: expected a text, .jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(refused, tiny, text, options, message):
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = [tiny, "--out=new/out", f"--calibration={text}", *small, *options]
    assert message in refused("sparsify", *arguments)


def test_an_unknown_method(refused, tiny):
    message = refused("sparsify", tiny, "--out=out", "--method=magic", code=2)
    assert "'magic' is not one of 'wanda++', 'wanda'" in message
    with pytest.raises(GraspError, match="`method` must be one of wanda"):
        grasp.sparsify(tiny, "out", method="magic")


def test_the_command_line(call, tiny, text, tmp_path):
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    out = tmp_path / "out"
    code, said, _ = call(
        "sparsify", tiny, f"--out={out}", f"--calibration={text}", "--method=wanda", *small
    )
    assert code == 0 and "zeros in linears, 2:4" in said and "Perplexity: words.txt" in said


# --- after it ---


def test_lora_learns_beside_weights_that_stay_sparse(sparse):
    model, _ = grasp.load(sparse.folder, device="cpu")
    pattern, base = Pattern.parse("2:4"), {n: m.weight for n, m in linears_of(model).items()}
    masks = {name: weight != 0 for name, weight in base.items()}
    adapted = sparse_lora.add_lora(model, rank=4, seed=0)
    losses = sparse_lora.train(adapted, BLOCKS[:1], steps=6, lr=1e-2)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in base.items())
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert not any(pattern.holds(m.weight) for m in linears_of(plain).values())
    merged = linears_of(sparse_lora.merge_under_mask(adapted, masks))
    assert all(pattern.holds(m.weight) for m in merged.values())
    for name, linear in linears_of(plain).items():
        assert torch.equal(merged[name].weight, linear.weight * masks[name])


def test_the_benchmark_goes_on_where_it_was(tiny, text, tmp_path, capsys):
    out = tmp_path / "sparsity.json"
    options = ["--model", str(tiny), "--text", str(text), "--eval-text", str(text), "--samples=4"]
    options += ["--seq-len=32", "--eval-windows=2", "--eval-seq-len=64", "--device=cpu"]
    options += ["--out", str(out)]
    sparsity.main([*options, "--rows=wanda,wanda++/rounds=0"])
    first = json.loads(out.read_text())["rows"]
    sparsity.main([*options, "--rows=wanda,magnitude"])
    rows = json.loads(out.read_text())["rows"]
    assert rows[:2] == first and [r["row"] for r in rows[1:]] == ["wanda++/rounds=0", "magnitude"]
    assert len({r["perplexity"] for r in rows}) == 3
    assert "| 2:4 | magnitude |" in capsys.readouterr().out
    assert sparsity.row_config("wanda++/lr=0.1", SparsifyConfig("m")).lr == 0.1
