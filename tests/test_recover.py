"""Recovery: distillation after pruning, resumed, refused, and never worse than its start."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, WORDS, save_tiny, tiny_mixture, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

import grasp
from grasp.checkpoint import verify
from grasp.compress import distil
from grasp.compress.lora import adapted
from grasp.config import LORA_RATE, RATE, RecoverConfig
from grasp.errors import GraspError
from grasp.gates.objective import Batch, last_hidden, loss
from grasp.journal import Journal
from grasp.model.header import of_model
from grasp.model.load import load_model
from grasp.planning.recovery import learned_values, plan_recovery, saved_activations
from grasp.report.summary import model_card, recovered
from grasp.run import folder as run
from grasp.run import recover as recovering

PRUNING = dict(samples=4, seq_len=32, epochs=1, scale_epochs=0, eval_windows=2, device="cpu")
SMALL = dict(samples=100, held_out=4, seq_len=32, accumulate=12, watch_every=3, lr=1e-3)
SMALL |= dict(eval_windows=2, device="cpu", lm_weight=0.0)
BLOCKS = torch.randint(256, (84, 24), generator=torch.Generator().manual_seed(0))
WATCHED, REST = BLOCKS[:4], BLOCKS[4:]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A text of the same words in another order."""
    draw = random.Random(1)
    file = tmp_path_factory.mktemp("other") / "other.txt"
    file.write_text(" ".join(draw.choice(WORDS) for _ in range(1200)))
    return file


@pytest.fixture(scope="module")
def pruned(tiny, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "DIR"
    return grasp.prune(tiny, folder, keep=0.5, calibration=text, **PRUNING).folder


@pytest.fixture(scope="module")
def result(tiny, pruned, other, tmp_path_factory):
    """A whole run that nothing interrupted."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    return grasp.recover(pruned, out, teacher=tiny, calibration=other, **SMALL)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def command(pruned, tiny, other, out, **options):
    given = dict(teacher=tiny, calibration=other, out=out) | SMALL | options
    return ["recover", pruned, *(f"--{n.replace('_', '-')}={v}" for n, v in given.items())]


# --- the loop ---


def config(**options):
    return RecoverConfig("m", "t", "text", **SMALL | dict(samples=84, seq_len=24) | options)


def pair(family="llama", **options):
    """A dense model, and the same with noise on the weights of its layers."""
    teacher = tiny_model(family, **options)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.model.layers.parameters():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return teacher, student


def learn(teacher, student, own, journal=None):
    held_out = Batch(WATCHED, last_hidden(teacher, WATCHED))
    with distil.learnable(student, own) as learned:
        return distil.distil(student, teacher, learned, REST, held_out, own, journal or Journal())


@pytest.mark.parametrize("rank", [None, 4], ids=["all", "lora"])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("phi3", False), ("gemma2", True), ("qwen3", False)]
)
def test_the_distance_falls_and_embeddings_stay(family, tied, rank):
    teacher, student = pair(family, tied=tied)
    before = copy.deepcopy(student.state_dict())
    found = learn(teacher, student, config(accumulate=2, lora_rank=rank))
    assert found.after < (0.999 if rank else 0.97) * found.before and found.best_step > 0
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = {name for name in before if "embed_tokens" in name or "lm_head" in name}
    if rank:
        kept |= {name for name, value in before.items() if value.dim() == 1}
    assert changed == before.keys() - kept
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    held_out = Batch(WATCHED, last_hidden(teacher, WATCHED))
    assert distil.distance(student, held_out, config()) == pytest.approx(found.after, rel=1e-4)


@pytest.mark.parametrize("rank", [None, 4], ids=["all", "lora"])
def test_passes_in_bf16_teach_weights_in_fp32(rank):
    teacher, student = pair()
    seen, head = [], student.model.layers[0].mlp.down_proj
    head.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    found = learn(teacher, student, config(accumulate=2, lora_rank=rank, dtype="bf16"))
    assert found.after < (0.999 if rank else 0.97) * found.before
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_adapters_merge_into_what_they_computed():
    _, model = pair()
    with torch.no_grad(), adapted(model, 3, seed=0) as learned:
        for tensor in learned.values():
            tensor += 0.1 * torch.randn(tensor.shape)
        inside = model(BLOCKS).logits
        assert len(learned) == 2 * 7 * 3
    torch.testing.assert_close(model(BLOCKS).logits, inside, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_step_is_adamw_on_the_mean_gradient():
    teacher, student = pair()
    plain = copy.deepcopy(student)
    own = config(accumulate=10, batch_size=8, warmup=0.0)
    assert own.steps == 1
    learn(teacher, student, own)
    weights = dict(plain.model.named_parameters())
    del weights["embed_tokens.weight"]
    for weight in weights.values():
        weight.requires_grad_()
    loss(plain, Batch(REST, last_hidden(teacher, REST)), 0.0).backward()
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    assert norm > 0
    for name, after in student.model.named_parameters():
        if name in weights:
            grad = weights[name].grad
            step = -1e-3 * grad / (grad.abs() + 1e-8)
            solid = grad.abs() > 1e-5
            moved = after - weights[name]
            torch.testing.assert_close(moved[solid], step[solid], rtol=2e-2, atol=1e-6)


def test_the_rate_rises_and_falls_to_zero():
    teacher, student = pair()
    rates = []

    class Rates(Journal):
        def progress(self, *args, **info):
            rates.append(optimizers[0].param_groups[0]["lr"])

    optimizers = []
    init = torch.optim.AdamW.__init__

    def keep(self, *args, **options):
        init(self, *args, **options)
        optimizers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", keep)
        learn(teacher, student, config(accumulate=2, warmup=0.1, patience=99), Rates())
    peak = rates.index(max(rates))
    assert len(rates) == 40 and peak == 3 and max(rates) == 1e-3
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(0.25e-3) and rates[-1] < 1e-5


def test_the_best_on_held_out_blocks_is_kept(monkeypatch):
    teacher, student = pair()
    looks, notes = [5.0, 4.0, 4.5, 4.25, 3.0], []
    seen = []

    def distance(model, batch, own):
        seen.append(copy.deepcopy(model.state_dict()))
        return looks[len(seen) - 1]

    class Notes(Journal):
        def note(self, text):
            notes.append(text)

    monkeypatch.setattr(distil, "distance", distance)
    found = learn(teacher, student, config(accumulate=16, watch_every=1, patience=2), Notes())
    assert found == distil.Recovery(5.0, 4.0, best_step=1, steps=3, tokens=16 * 24)
    assert len(seen) == 4 and "stopped at step 3 of 5" in notes[0]
    after = student.state_dict()
    assert all(torch.equal(after[name], seen[1][name]) for name in after)


def test_a_loss_that_is_not_finite():
    teacher, student = pair()
    with pytest.raises(GraspError, match=r"the loss is (nan|inf) at step \d: try a smaller `lr`"):
        learn(teacher, student, config(lr=1e30, warmup=0.0, patience=99))


# --- whole runs ---


def test_the_result_is_the_same_model_with_better_weights(tiny, pruned, result, call):
    (entry,), before = result.record.recovery, grasp.Record.read(pruned)
    assert entry["after"] < entry["before"]
    assert entry["tokens"] == 32 * 12 * entry["best_step"] == result.record.recovery_tokens
    assert len(entry["perplexity_before"]) == 1
    assert result.record.params == before.params and result.record.kept == before.kept
    assert json.loads((result.folder / "grasp.json").read_text()) == result.summary
    old, new = tensors(pruned), tensors(result.folder)
    assert old.keys() == new.keys()
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}
    assert verify.verify(result.folder).passed
    said = f"recovered by distillation on {entry['tokens']:,} tokens"
    for file in ("README.md", "report.html"):
        assert said in (result.folder / file).read_text()
        assert "not fine-tuned" not in (result.folder / file).read_text()
    code, shown, _ = call("show", result.folder)
    assert code == 0 and "Recovered by distillation on" in shown and "all weights" in shown


def test_a_run_that_stops_early_says_so_and_ends(tiny, pruned, other, tmp_path, call, monkeypatch):
    looks, ends = iter([5.0, 4.0, 4.5]), iter([5.0, 4.0])
    monkeypatch.setattr(distil, "distance", lambda *of: next(looks))
    monkeypatch.setattr(recovering, "distance", lambda *of: next(ends))
    options = dict(watch_every=1, patience=1)
    code, _, err = call(*command(pruned, tiny, other, tmp_path / "out", **options))
    assert code == 0 and "stopped at step 2 of 8: 1 looks" in err
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_it_goes_on_to_other_formats_and_on_from_itself(tiny, result, other, tmp_path):
    assert grasp.export(result.folder, tmp_path / "uniform", to="hf-uniform")
    options = SMALL | dict(lora_rank=2, lr=1e-3)
    again = grasp.recover(
        result.folder, tmp_path / "out", teacher=tiny, calibration=other, **options
    )
    first, second = again.record.recovery
    assert first == result.record.recovery[0] and second["recipe"]["lora_rank"] == 2
    assert again.record.recovery_tokens == first["tokens"] + second["tokens"]
    assert recovered(again.record).count("Recovered by distillation") == 2
    assert "LoRA of rank 2, merged" in model_card(again.record)
    assert again.record.params == result.record.params


@pytest.mark.parametrize("rank", [None, 2], ids=["all", "lora"])
def test_a_stopped_run_ends_in_the_same_weights(tiny, pruned, other, tmp_path, rank, monkeypatch):
    options = SMALL | dict(lora_rank=rank)
    whole = grasp.recover(pruned, tmp_path / "a", teacher=tiny, calibration=other, **options)
    one_step, taken = distil._one_step, []

    def stopped(*args):
        taken.append(args[3])
        if len(taken) in (5, 7):
            raise KeyboardInterrupt
        return one_step(*args)

    monkeypatch.setattr(distil, "_one_step", stopped)
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run, "SAVING", math.inf)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            grasp.recover(pruned, tmp_path / "b", teacher=tiny, calibration=other, **options)
        assert not (tmp_path / "b").exists()
    resumed = grasp.recover(pruned, tmp_path / "b", teacher=tiny, calibration=other, **options)
    assert len(taken) == 8 + 2  # two steps were begun twice
    watched = grasp.blocks(tiny_tokenizer(), str(other), samples=100, seq_len=32)[:4]
    for block in torch.cat(taken):
        assert not (block == watched).all(1).any()
    assert (whole.folder / "model.safetensors").read_bytes() == (
        resumed.folder / "model.safetensors"
    ).read_bytes()
    assert whole.record.recovery == resumed.record.recovery
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_no_better_is_not_written(tiny, pruned, other, tmp_path):
    with pytest.raises(GraspError, match=r"nothing is written: the loss on held-out blocks is"):
        grasp.recover(
            pruned, tmp_path / "out", teacher=tiny, calibration=other, **SMALL | dict(lr=0.3)
        )
    assert not (tmp_path / "out").exists()


def test_rounding_alone_is_no_gain(text, other, tmp_path):
    """LoRA in bf16 at a rate of next to nothing, which leaves all weights as they are."""
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    pruned = grasp.prune(dense, tmp_path / "pruned", keep=0.5, calibration=text, **PRUNING)
    options = SMALL | dict(lora_rank=2, lr=1e-12, dtype="bf16")
    with pytest.raises(GraspError, match="nothing is written: the loss on held-out") as refused:
        grasp.recover(pruned.folder, tmp_path / "out", teacher=dense, calibration=other, **options)
    before, after = re.findall(r"\d+\.\d{4}", str(refused.value))
    assert before == after


def test_tied_heads_and_bf16_stay(text, other, tmp_path):
    dense = save_tiny(tmp_path / "dense", "qwen2", tied=True, dtype=torch.bfloat16)
    pruned = grasp.prune(dense, tmp_path / "pruned", keep=0.5, calibration=text, **PRUNING)
    found = grasp.recover(
        pruned.folder, tmp_path / "out", teacher=dense, calibration=other, **SMALL
    )
    assert found.record.recovery[0]["after"] < found.record.recovery[0]["before"]
    old, new = tensors(pruned.folder), tensors(found.folder)
    assert {t.dtype for t in new.values()} == {torch.bfloat16} and "lm_head.weight" not in new
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    teacher, tokenizer = load_model(dense, dtype=torch.float32)
    watched = grasp.blocks(tokenizer, str(other), samples=100, seq_len=32)[:4]
    batch = Batch(watched, last_hidden(teacher, watched))
    again, _ = load_model(found.folder, dtype=torch.float32)  # rounded, as stored
    after = distil.distance(again, batch, config())
    assert after == pytest.approx(found.record.recovery[0]["after"], rel=1e-5)
    assert verify.verify(found.folder).passed


def test_the_text_of_the_calibration_is_noticed(tiny, pruned, text, tmp_path):
    notes = []

    def show(record):
        notes.append(record.get("text", ""))

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovering, "measure_once", stop)
        mixed = f"{text}:0.5,builtin"
        grasp.recover(pruned, tmp_path / "out", teacher=tiny, calibration=mixed, show=show, **SMALL)
    assert any(f"was pruned with {text.name}: learning from the same text" in n for n in notes)


def stop(*args):
    raise KeyboardInterrupt


# --- refused, planned ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=0), "--lr must be a finite number above 0, got 0.0"),
        (dict(warmup=2), "--warmup must be between 0 and 1, got 2.0"),
        (dict(held_out=100), "--held-out must be below --samples (100), got 100"),
        (dict(held_out=0), "--held-out must be at least 1, got 0"),
        (dict(lora_rank=0), "--lora-rank must be at least 1, got 0"),
        (dict(seq_len=257), "--seq-len must be at most 256 for this model, got 257"),
        (dict(samples=900), "too little text: other.txt has "),
        (dict(teacher="nowhere"), "no such folder or file: nowhere"),
        (dict(calibration="none.txt"), "none.txt does not exist"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(refused, tiny, pruned, other, options, message):
    assert message in refused(*command(pruned, tiny, other, "new/out", **options))


def test_adapters_need_a_linear_layer(refused, other, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    dense = folder / "dense"
    tiny_mixture("olmoe").save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    pruned = grasp.prune(dense, folder / "half", keep=0.7, calibration=text, **PRUNING).folder
    said = refused(*command(pruned, dense, other, "out", lora_rank=2))
    assert said.startswith(f"--lora-rank finds no linear layer to adapt in {pruned}")


def test_what_does_not_belong_together(refused, tiny, pruned, other, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    shuffled, small = (folder / name for name in ("shuffled", "small"))
    save_tiny(shuffled, seed=1)
    save_tiny(small, vocab=300)
    arguments = [pruned, tiny, other, "out"]
    assert "is not a grasp checkpoint: it has no grasp.json" in refused(
        *command(tiny, tiny, other, "out")
    )
    assert f"the head of {shuffled} is not that of {pruned}: give the model that" in refused(
        *command(pruned, shuffled, other, "out")
    )
    assert "--teacher must be the model that" in refused(*command(pruned, small, other, "out"))
    assert "which is no larger" in refused(*command(pruned, pruned, other, "out"))
    sparse = grasp.sparsify(
        tiny, folder / "sparse", method="magnitude", calibration=text, samples=2, seq_len=32,
        eval_windows=1, device="cpu",
    ).folder  # fmt: skip
    assert "has zeros in a pattern (2:4), which training would fill" in refused(
        *command(sparse, *arguments[1:])
    )


def test_the_command_line(call, tiny, pruned, other, tmp_path, monkeypatch):
    arguments = command(pruned, tiny, other, tmp_path / "out")
    code, said, _ = call(*arguments, "--plan")
    assert code == 0 and "8 steps" in said and "from the predictions of" in said
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(distil, "_one_step", stop)
        code, _, err = call(*arguments)
        assert code == 130 and "run the same command again to resume" in err
    code, said, _ = call(*arguments)
    assert code == 0 and "Recovered by distillation on" in said and "dense" in said


def test_defaults():
    assert RecoverConfig("m", "t", "text").lm_weight == 0.5
    assert replace(config(), lr=None).rate == RATE
    assert replace(config(), lr=None, lora_rank=8).rate == LORA_RATE
    assert config().to_json()["lr"] == 1e-3 and "memory" not in config().to_json()


@pytest.mark.parametrize("rank", [None, 4], ids=["all", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_what_learns_and_what_is_saved(family, rank):
    model = tiny_model(family, hidden=128, ffn=320, layers=2, tied=family == "llama")
    header, own = of_model(model), config(lora_rank=rank, batch_size=2, memory="fast")
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with distil.learnable(model, own) as learned:
        assert learned_values(header, rank) == sum(t.numel() for t in learned.values())
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *learned.values())}
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(BLOCKS[:2], use_cache=False)
    found = sum(size for place, size in storages.items() if place not in weights)
    logits = 8 * 2 * 48 * 256
    estimate = saved_activations(own, header, "fast", 4) - logits
    assert estimate == pytest.approx(found, rel=0.12)


def test_the_plan_of_a_recovery():
    header = of_model(tiny_model("llama"))
    own = config(samples=1000, held_out=10, epochs=2)
    planned = plan_recovery(own, header, header)
    assert planned.tokens == 2 * 990 * 24 and planned.steps == 165
    params, learned = header.space.total_params, planned.learned
    looks = 3 + math.ceil(165 / own.watch_every)  # at the start, on the way, and at both ends
    watched = looks * own.held_out * own.seq_len
    assert planned.operations == (planned.tokens * 8 + watched * 2) * params
    assert planned.state_bytes == 16 * learned
    memory = planned.memory
    assert memory.total - memory.activations == 8 * params + 16 * learned
    low = plan_recovery(replace(own, memory="low"), header, header)
    assert low.memory.activations < planned.memory.activations
    assert low.operations == planned.operations + 2 * params * planned.tokens
    assert planned.to_json()["memory"]["total"] == memory.total
    assert "165 steps" in str(planned)
