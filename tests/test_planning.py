"""Plans from config.json and GGUF headers: exact counts, bounds that hold, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from grasp.budget.budget import Budget
from grasp.budget.projection import Mask, Projection
from grasp.config import ScaleKind
from grasp.errors import GraspError
from grasp.gates.objective import next_token_loss
from grasp.gates.scales import scale_count, scaled
from grasp.model.header import FAMILIES as HEADER_FAMILIES
from grasp.model.header import from_config, read_header
from grasp.model.modeling_grasp import classes_of
from grasp.model.units import LayerUnits, UnitSpace
from grasp.planning.memory import learning_memory
from grasp.planning.plan import obtained, params_left, plan

DEMO = "demo:smollm2-135m"
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_31_8B = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "head_dim": None,
}
QWEN3_8B = LLAMA_31_8B | {
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151936,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
PHI_4 = {
    "model_type": "phi3",
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256000,
}
GEMMA_3_1B = GEMMA_2_2B | {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 262144,
}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


def write_config(folder: Path, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# Counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_tells_what_the_model_is(tmp_path, family, tied, biased):
    model = tiny_model(family, tied=tied, **BIASES.get(family, {}) if biased else {})
    model.config.save_pretrained(tmp_path)
    header = read_header(str(tmp_path))
    assert header.space == UnitSpace.of(model)
    assert header.space.total_params == sum(p.numel() for p in model.parameters())
    assert (header.family, header.source) == (family, "config.json")
    assert header == read_header(str(tmp_path / "config.json"))


@pytest.mark.parametrize("family", HEADER_FAMILIES)
def test_a_config_with_per_layer_widths(tmp_path, family):
    classes = classes_of(family)
    config_class, model_class = classes.config, classes.autos[AutoModelForCausalLM]
    values = tiny_model(family, tied=True, layers=12).config.to_dict()
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    widths = 4 * [(8, 4, 2), (96, 8, 4), (24, 2, 1)]  # from ten layers on, keys are 00, 01, ...
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    per_layer = {i: dict(zip(names, w, strict=True)) for i, w in enumerate(widths)}
    config = config_class(
        **values, per_layer_config=per_layer, serialize_explicit_per_layer_config=True
    )
    config.save_pretrained(tmp_path)
    header = read_header(str(tmp_path))
    assert header.space == UnitSpace.of(model_class(config))
    assert header.family == family


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_31_8B, 8_030_261_248),
        (QWEN3_8B, 8_190_735_360),
        (QWEN25_7B, 7_615_616_512),
        (PHI_4, 14_659_507_200),
        (GEMMA_2_2B, 2_614_341_888),
        (GEMMA_3_1B, 999_885_952),
        (SMOLLM2, 134_515_008),
    ],
)
def test_published_models(config, params):
    assert from_config(config).space.total_params == params


def test_half_of_llama_2_7b_leaves_519_thousandths_of_all(tmp_path):
    result = plan(write_config(tmp_path, LLAMA_2_7B), keep=0.5)
    assert (result.channels, result.kv_groups) == (352_256, 1024)
    assert result.params.after.most / result.params.before == pytest.approx(0.519, abs=5e-4)
    assert result.prunable.after.most * 2 == result.prunable.before
    assert result.kv_bytes_per_token.before == 2 * 2 * 32 * 4096


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_evaluating_takes_the_weights_as_they_are_stored(tmp_path, dtype, width):
    result = plan(write_config(tmp_path, LLAMA_2_7B | {"dtype": dtype}))
    assert width < result.evaluation_memory / result.params.before < width + 0.2


def test_memory_is_told_of_what_runs(tiny):
    nothing = plan(str(tiny), method="magnitude", scale_epochs=0, compensate="none", seq_len=32)
    assert "gates learn" not in str(nothing) and "GB while evaluating" in str(nothing)
    held_out, own = (
        plan(str(tiny), seq_len=32, **text) for text in ({}, {"eval_text": ("builtin",)})
    )
    logits = 4 * 256 * (256 - 32)  # the model reads 256 tokens
    assert own.evaluation_memory - held_out.evaluation_memory == logits


@pytest.mark.parametrize(
    "option", [{"compensate": "none"}, {"method": "greedy-output-approximation"}]
)
def test_compensation_is_planned_where_it_runs(tmp_path, option):
    spec = write_config(tmp_path, LLAMA_2_7B)
    weights = 2 * 6_738_415_616
    for compensate in ("auto", "refit"):
        planned = plan(spec, compensate=compensate)
        assert 1.3 * weights < planned.compensation_memory < 1.5 * weights
        assert "GB while compensating" in str(planned)
    assert plan(spec, **option).compensation_memory is None
    assert "compensating" not in str(plan(spec, **option))


def test_a_greedy_method_is_planned_where_it_chooses(tmp_path):
    spec = write_config(tmp_path, LLAMA_2_7B)
    greedy = plan(spec, method="greedy-head-similarity", samples=128, seq_len=128)
    assert greedy.choosing_memory > 2 * 6_738_415_616 + 4 * 2 * 128 * 128 * 4096
    assert "GB while choosing" in str(greedy)
    assert plan(spec).choosing_memory is None
    assert "choosing" not in str(plan(spec))
    fisher = plan(spec, method="fisher", scale_epochs=0)  # nothing learns, and the pass is there
    assert fisher.choosing_memory > 2 * 6_738_415_616 and fisher.learning_tokens == 0


@pytest.mark.parametrize("method", ["greedy-output-approximation", "taylor"])
def test_a_gpu_too_small_to_choose_is_too_small(tmp_path, method):
    spec = write_config(tmp_path, LLAMA_2_7B)
    fits = [
        plan(spec, method=own, gpus=1, gpu_memory=24).gpus.ways[0].fits
        for own in ("learned", method)
    ]
    assert fits == [True, False]


def test_the_demo_models_gguf_header():
    header = read_header(DEMO)
    assert header.stored_bytes == 4
    assert header.space == from_config(SMOLLM2).space
    assert (header.family, header.vocab_size, header.facts.qk_norm) == ("llama", 49152, False)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def write_gguf(path: Path, model, family: str, skip: str = "nothing") -> str:
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_key_length(16)
    writer.add_token_list([f"token {i}" for i in range(5000)])
    writer.add_token_types([1] * 5000)
    writer.add_tensor("rope_freqs.weight", np.zeros(8, np.float32))
    for name, parameter in model.named_parameters():
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        if skip not in name:
            writer.add_tensor(name, parameter.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen2", True), ("qwen3", False), ("gemma3_text", True)],
)
def test_a_gguf_header_tells_what_the_model_is(tmp_path, family, tied):
    model = tiny_model(family, tied=tied, **BIASES.get(family, {}))
    header = read_header(write_gguf(tmp_path / "a.gguf", model, HEADER_FAMILIES[family].gguf))
    assert header.space == UnitSpace.of(model)
    assert (header.family, header.facts) == (family, HEADER_FAMILIES[family])


def test_another_family_is_read_by_structure(tmp_path):
    config = SMOLLM2 | {"model_type": "granite", "num_hidden_layers": 2, "vocab_size": 128}
    result = plan(write_config(tmp_path, config), keep=0.5, layout="uniform")
    assert result.source == "transformers, on the meta device"
    assert result.params.before == from_config(config | {"model_type": "llama"}).space.total_params
    assert all(r.loads for r in result.runtimes)
    per_layer = plan(str(tmp_path), keep=0.5)
    assert per_layer.params.before == result.params.before
    assert (per_layer.prunes, per_layer.whole) == (("ffn", "kv"), ())


# Bounds


@st.composite
def spaces_and_budgets(draw):
    group_size, head_dim = draw(st.sampled_from([1, 3])), draw(st.sampled_from([2, 8]))
    ffn_multiple, kv_multiple = draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 2]))
    uniform = draw(st.booleans())
    blocks = st.tuples(st.integers(1, 6), st.integers(1, 3))
    widths = draw(st.lists(blocks, min_size=1, max_size=4))
    if uniform:
        widths = [widths[0]] * len(widths)
    biases = draw(st.sampled_from([0, 2])), draw(st.sampled_from([0, 7]))
    experts = (draw(st.integers(2, 4)), 3, draw(st.integers(1, 2)), draw(st.sampled_from([0, 5])))
    experts = experts if draw(st.booleans()) else ()
    layers = tuple(
        LayerUnits(ffn * ffn_multiple, kv * kv_multiple, group_size, head_dim, *biases, *experts)
        for ffn, kv in widths
    )
    space = UnitSpace(16, layers, fixed_params=1000)
    kind = draw(st.sampled_from(["keep", "params", "kv_cache"]))
    asked = draw(st.floats(0.05, 1))
    if kind == "params":
        asked = round(asked * space.total_params)
    layout = "uniform" if uniform else "per-layer"
    budget = Budget(kind, asked, ffn_multiple, kv_multiple, layout)
    if not uniform:
        budget = replace(budget, protect_last=draw(st.integers(0, len(layers))))
    return space, budget, draw(st.integers(0, 3))


@settings(max_examples=300)
@given(spaces_and_budgets())
def test_every_mask_is_within_the_announced_range(case):
    space, budget, seed = case
    try:
        cost, kv_values = obtained(space, budget)
    except GraspError:
        return  # an impossible budget
    scores = torch.randn(space.size, generator=torch.Generator().manual_seed(seed))
    scores[: space.layers[0].ffn] += 5.0 * (seed - 1)  # also masks that keep all of one kind
    keep = Projection(space, budget, seed=seed)(scores)
    left = Mask(space, keep).pruned_space()
    assert cost.least <= left.cost <= cost.most
    assert kv_values.least <= left.kv_cache_bytes_per_token(1) // 2 <= kv_values.most
    params = params_left(space, budget, cost)
    assert params.least <= left.total_params <= params.most
    if budget.kind == "params":
        assert params.most <= budget.asked


def test_keeping_everything_changes_nothing(tmp_path):
    result = plan(str(save_tiny(tmp_path, "qwen2")), keep=1.0, seq_len=64)
    for size in (result.params, result.prunable, result.weight_bytes, result.kv_bytes_per_token):
        assert size.after == (size.before, size.before)


def test_a_kv_cache_budget_keeps_every_channel(tmp_path):
    result = plan(write_config(tmp_path, LLAMA_31_8B), kv_cache=0.25)
    assert result.kv_bytes_per_token.after.most * 4 == result.kv_bytes_per_token.before
    assert result.prunable.after.least > 0.8 * result.prunable.before


# Learning


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", get_args(ScaleKind))
def test_the_memory_estimate_is_near_what_autograd_saves(tmp_path, family, dtype, scales):
    model = tiny_model(family, hidden=128, ffn=384, layers=12, vocab=300, dtype=dtype)
    model.config.save_pretrained(tmp_path)
    ids = torch.randint(256, (2, 64))
    weights = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    with scaled(model, UnitSpace.of(model), scales) as gates:
        gates.set(torch.ones(scale_count(model, scales), requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            next_token_loss(model, ids)
    header = read_header(str(tmp_path))
    memory = learning_memory(header, ids.numel(), 64, dtype.itemsize, "fast", scales)
    whole = ids.numel() * 300 * 4 if family == "gemma2" else 0  # the log-softmax of capped logits
    measured = sum(s.nbytes() for s in saved.values()) - whole
    assert measured == pytest.approx(memory.activations, rel=0.1)
    assert memory.weights == dtype.itemsize * sum(p.numel() for p in model.parameters())


def test_tokens_and_time(tmp_path):
    spec = write_config(tmp_path, LLAMA_2_7B)
    result = plan(spec, keep=0.5, samples=100, seq_len=50, epochs=3, tokens_per_second=200)
    assert result.learning_tokens == 20_000  # three epochs of gates, one of scales
    assert result.block_tokens == 3 * 88 * 50  # without every eighth
    assert result.learning_seconds == (20_000 + 1.6 * 13_200) / 200
    assert "20,000 tokens forward and backward, 13,200 more for block reconstruction;" in str(
        result
    )
    refitted = plan(spec, samples=100, seq_len=50, compensate="refit", tokens_per_second=200)
    assert refitted.block_tokens == 0 and refitted.learning_seconds == 5 * 5000 / 200
    scales = plan(spec, samples=100, seq_len=50, method="fisher", scale_epochs=2)
    assert scales.learning_tokens == 10_000
    assert plan(spec).learning_seconds is None


# Answers


def test_runtimes_depend_on_layout_and_family(tmp_path):
    def loads(config: dict, layout: str) -> dict[str, bool]:
        result = plan(write_config(tmp_path, config), keep=0.5, layout=layout)
        return {r.name.split(",")[0] + str(n): r.loads for n, r in enumerate(result.runtimes)}

    assert list(loads(LLAMA_2_7B, "per-layer").values()) == [True] * 4 + [False] * 2
    assert list(loads(QWEN3_8B, "per-layer").values()) == [True] * 3 + [False] * 3
    assert all(loads(QWEN3_8B, "uniform").values())
    reasons = [r.why for r in plan(str(tmp_path), keep=0.5).runtimes if not r.loads]
    assert all("`layout='uniform'`" in why for why in reasons)
    granite = LLAMA_2_7B | {"model_type": "granite"}
    gguf = {r.why for r in plan(write_config(tmp_path, granite)).runtimes if r.name == "llama.cpp"}
    assert gguf == {"grasp export writes no granite"}
    factors = [1.0] * 48  # of which a stock config has one for half of hidden size / heads
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    rope |= {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096}
    phi = LLAMA_31_8B | {"model_type": "phi3", "head_dim": 128, "rope_parameters": rope}
    phi |= {"max_position_embeddings": 131072, "pad_token_id": 0}
    assert list(loads(phi, "per-layer").values()) == [True] * 3 + [False] * 3
    with pytest.raises(
        GraspError, match=r"refuses layers of 4 .*use `layout='per-layer'` or `kv_m"
    ):
        loads(phi, "uniform")


def test_a_plan_prints_and_becomes_json(tmp_path):
    spec = write_config(tmp_path, SMOLLM2)
    result = plan(spec, keep=0.5)
    text = str(result)
    assert "parameters  134,515,008 -> 81,376,128 to 81,430,848" in text
    assert "units       46,080 FFN channels, 90 KV groups, 30 layers" in text
    values = json.loads(json.dumps(result.to_json()))
    assert values["prunable"] == {
        "before": 106_168_320,
        "after": {"least": 53_029_440, "most": 53_084_160},
    }
    assert values["budget"]["kind"] == "keep"
    assert values["memory"]["total"] == result.memory.total


@pytest.mark.parametrize("source", ["config", "gguf"])
def test_a_plan_needs_no_torch(tmp_path, source):
    spec = DEMO if source == "gguf" else write_config(tmp_path, QWEN3_8B)
    program = (
        "import sys\n"
        "from grasp.planning.plan import plan\n"
        f"plan({spec!r}, keep=0.5)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "`keep` must be above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, "`keep` must be above 0 and at most 1, got 1.5"),
        ({"keep": 0.01}, "`keep` must be at least 0.099, which .*, got 0.01"),
        ({"kv_cache": 0.1}, "`kv_cache` must be at least 0.3334, .*, got 0.1"),
        ({"params": 1e6}, "`params` must be between 38,852,928 and 134,515,008 .*, got 1,000,000"),
        ({"params": 1e9}, "`params` must be .*134,515,008 .*, got 1,000,000,000"),
        ({"keep": 0.5, "params": 1e8}, "`keep` and `params` are two budgets"),
        (
            {"ffn_multiple": 100},
            "`ffn_multiple` must divide the widths of this model, 1536 among them, got 100",
        ),
        (
            {"kv_multiple": 2},
            "`kv_multiple` must divide the widths of this model, 3 among them, got 2",
        ),
        ({"dtype": "int4"}, "`dtype` of a plan must be bf16 or fp32, got 'int4'"),
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"as_published": True, "method": "fisher"}, "`as_published` sets `method` to 'learned'"),
        ({"scales": "row"}, "`scales` must be one of channel, unit, got 'row'"),
        ({"tokens_per_second": 0}, "`tokens_per_second` must be above 0, got 0"),
    ],
)
def test_impossible_plans_name_the_value_and_the_fix(tmp_path, options, message):
    with pytest.raises(GraspError, match=message) as error:
        plan(write_config(tmp_path, SMOLLM2), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config.json is not a readable config.json \(Expecting"),
        ("[]", "holds no JSON object: expected a model's config.json"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama"}', "config.json: hidden_size is None: expected a positive whole"),
        (json.dumps(SMOLLM2 | {"hidden_size": 0}), "hidden_size is 0: expected a positive whole"),
        ('{"model_type": "gpt2"}', r"GPT2LMHeadModel is not supported: it has no list of decoder"),
        ('{"model_type": "mamba"}', r"MambaMixer is neither a gated FFN nor attention with group"),
        ('{"model_type": "t5"}', r"none of llama, .*transformers cannot build it either \(Unrec"),
        ('{"model_type": "nonsense"}', r"'nonsense' is none of llama, mistral, qwen2, qwen3"),
    ],
)
def test_bad_configs(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(GraspError, match=message) as error:
        plan(str(tmp_path), keep=0.5)
    assert "\n" not in str(error.value)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(GraspError, match=r"config.json does not exist: expected a model's config"):
        plan(str(tmp_path / "config.json"), keep=0.5)
    with pytest.raises(GraspError, match=r"is not a model folder: it has no config.json"):
        plan(str(tmp_path), keep=0.5)
    with pytest.raises(GraspError, match="no such folder or file"):
        plan(str(tmp_path / "nothing"), keep=0.5)


def test_bad_gguf_files(tmp_path):
    path = tmp_path / "a.gguf"
    whole = Path(write_gguf(path, tiny_model("llama"), "llama")).read_bytes()
    for content in (b"", b"no GGUF at all", whole[:500], whole[:60_000]):
        path.write_bytes(content)
        with pytest.raises(GraspError, match=r"a.gguf is not a readable GGUF file"):
            plan(str(path), keep=0.5)
    write_gguf(path, tiny_model("llama"), "llama", skip="ffn_gate")
    with pytest.raises(
        GraspError, match=r"a.gguf \(llama\) is not supported: it has no 'blk.0.ffn"
    ):
        plan(str(path), keep=0.5)
