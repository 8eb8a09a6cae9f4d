"""Perplexity against the definition, its windows, and its errors."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import peak_bytes

from grasp.data.corpus import Corpus
from grasp.errors import GraspError
from grasp.evaluate import perplexity as evaluate
from grasp.evaluate.perplexity import perplexity
from grasp.model.header import read_header
from grasp.model.load import load_model
from grasp.planning.memory import evaluation_memory


def corpus_of(tokens: int, seed: int = 0) -> Corpus:
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Corpus("notes", ids, sha256="ab" * 32, split="test")


@torch.no_grad()
def nll_by_definition(model, windows: list[torch.Tensor]) -> float:
    """Mean of -log p(token | the tokens before it in its window), in double precision."""
    terms = []
    for ids in windows:
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        terms += [-log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_definition(family):
    model, corpus = tiny_model(family), corpus_of(100)
    result = perplexity(model, corpus, seq_len=32)
    expected = nll_by_definition(model, list(corpus.ids[:96].view(3, 32)))
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.value == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.windows, result.tokens, result.seq_len) == (3, 3 * 31, 32)


def test_with_bos_a_window_has_one_token_of_text_less():
    model, corpus = tiny_model("llama"), corpus_of(62)
    result = perplexity(model, corpus, seq_len=32, bos=True)
    bos = torch.tensor([model.config.bos_token_id])
    windows = [torch.cat([bos, part]) for part in corpus.ids.view(2, 31)]
    assert result.nll == pytest.approx(nll_by_definition(model, windows), rel=1e-6)
    assert (result.windows, result.tokens, result.bos) == (2, 62, True)


@settings(max_examples=20)
@given(
    tokens=st.integers(2, 200),
    seq_len=st.integers(2, 64),
    windows=st.none() | st.integers(1, 5),
    batch_size=st.integers(1, 4),
)
def test_batches_and_slices_of_logits_do_not_change_the_result(
    tokens, seq_len, windows, batch_size
):
    model, corpus = tiny_model("llama", layers=1), corpus_of(tokens)
    available = tokens // seq_len
    if available < (windows or 1):
        with pytest.raises(GraspError, match=f"{tokens} tokens, {available} windows of {seq_len}"):
            perplexity(model, corpus, seq_len=seq_len, windows=windows)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LOGIT_ROWS", 7)
        result = perplexity(model, corpus, seq_len=seq_len, windows=windows, batch_size=batch_size)
    whole = perplexity(model, corpus, seq_len=seq_len, windows=windows)
    assert result.windows == min(available, windows or available)
    assert result.windows_available == available
    assert result.nll == pytest.approx(whole.nll, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_as_they_are_stored_give_what_fp32_weights_give(family, tied, tmp_path):
    """Bit for bit; a hidden size without a whole root, so that Gemma's embedding scale counts."""
    folder = save_tiny(tmp_path / "m", family, tied=tied, hidden=72, layers=2, dtype=torch.bfloat16)
    stored, whole = (load_model(folder, dtype=dtype)[0] for dtype in (None, torch.float32))
    before = copy.deepcopy(stored.state_dict())
    results = [perplexity(model, corpus_of(64), seq_len=32) for model in (stored, whole)]
    assert results[0] == results[1] and results[0].dtype == "float32"
    after = stored.state_dict()
    assert stored.dtype == torch.bfloat16 and whole.dtype == torch.float32
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_no_more_than_a_matrix_is_cast_at_a_time(tmp_path):
    folder = save_tiny(tmp_path / "m", hidden=256, vocab=16_384, dtype=torch.bfloat16)
    model, _ = load_model(folder, dtype=None)
    peak = peak_bytes(lambda: perplexity(model, corpus_of(128), seq_len=128))
    header = read_header(str(folder))
    planned = evaluation_memory(header, 128) - 2 * header.space.total_params
    assert peak == pytest.approx(planned, rel=0.1)


def test_weights_come_back_from_a_pass_that_fails(monkeypatch):
    model = tiny_model("llama", dtype=torch.bfloat16)
    monkeypatch.setattr(model.model.layers[1].mlp.act_fn, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, corpus_of(64), seq_len=32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def interrupted(_):
    raise KeyboardInterrupt


def test_the_result_states_every_setting():
    seen = []
    result = perplexity(
        tiny_model("llama"),
        corpus_of(300),
        seq_len=64,
        windows=3,
        batch_size=2,
        progress=lambda *p: seen.append(p),
    )
    assert seen == [(2, 3), (3, 3)]
    assert str(result) == (
        f"perplexity {result.value:.2f} on notes, split test: sequence length 64, "
        "the first 3 of 4 windows, no BOS, float32 model, fp32 loss"
    )
    stated = json.loads(json.dumps(result.to_json()))
    assert stated | {"value": 0, "nll": 0} == {
        "value": 0,
        "nll": 0,
        "tokens": 189,
        "windows": 3,
        "windows_available": 4,
        "seq_len": 64,
        "bos": False,
        "dtype": "float32",
        "data": "notes",
        "split": "test",
        "sha256": "ab" * 32,
        "notes": [],
    }


def test_the_default_length_is_2048_or_the_models_limit():
    assert perplexity(tiny_model("llama"), corpus_of(300)).seq_len == 256
    long = tiny_model("llama", layers=1, max_position_embeddings=4096)
    assert perplexity(long, corpus_of(3000)).seq_len == 2048


def test_the_model_comes_back_as_it_was():
    model = tiny_model("llama").train()
    perplexity(model, corpus_of(64), seq_len=32)
    assert model.training
    with pytest.raises(GraspError):
        perplexity(model, corpus_of(10), seq_len=32)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 257}, "`seq_len` must be between 2 and 256 for this model, got 257"),
        ({"seq_len": 1}, "`seq_len` must be between 2 and 256 for this model, got 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seq_len": 64, "windows": 0}, "`windows` must be at least 1, got 0"),
        (
            {"seq_len": 64, "windows": 9},
            "300 tokens, 4 windows of 64; 9 need 576 tokens: use fewer",
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(GraspError, match=message):
        perplexity(tiny_model("llama"), corpus_of(300), **options)


def test_by_name_it_reads_the_model_and_the_text(tmp_path):
    folder = save_tiny(tmp_path / "model", "mistral", dtype=torch.bfloat16)
    text = tmp_path / "notes.txt"
    text.write_text("Some words, one byte a token. " * 10)
    result = evaluate.evaluate_text(str(folder), str(text), seq_len=50, device="cpu")
    corpus = Corpus("notes.txt", torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"]), "")
    expected = perplexity(tiny_model("mistral", dtype=torch.bfloat16).float(), corpus, seq_len=50)
    assert result.nll == pytest.approx(expected.nll, rel=1e-6)
    assert (result.data, result.windows, result.dtype) == ("notes.txt", 6, "float32")


def test_a_loss_that_is_not_finite():
    model = tiny_model("llama")
    model.lm_head.weight[:] = math.nan
    with pytest.raises(
        GraspError, match=r"the loss is nan after window 1 of 2: .* download it again"
    ):
        perplexity(model, corpus_of(64), seq_len=32)


def test_the_wrong_tokenizer():
    corpus = Corpus("notes", torch.full((64,), 999), sha256="")
    with pytest.raises(GraspError, match="token 999 of notes is not in the model's vocabulary"):
        perplexity(tiny_model("llama"), corpus, seq_len=32)


def test_no_bos_to_put():
    model = tiny_model("llama", bos_token_id=None)
    with pytest.raises(GraspError, match="`bos` needs a BOS token"):
        perplexity(model, corpus_of(64), seq_len=32, bos=True)
