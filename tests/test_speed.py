"""grasp bench: it checks what it times and counts exactly; no test asserts a time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import xllamacpp
from families import save_brought, save_tiny, tiny_tokenizer
from gguf import GGUFReader
from test_checkpoint import UNEVEN, pruned
from test_checkpoint import save as save_pruned
from test_gguf import VOCAB, byte_level
from transformers import LlamaForCausalLM, StaticCache

import grasp
from grasp.checkpoint.export import export
from grasp.errors import GraspError
from grasp.evaluate import bench as speed
from grasp.evaluate import runtimes, serving
from grasp.evaluate.bench import Spread, _phase, bench
from grasp.model.load import load_model

FAST = dict(batch_sizes=(1, 3), prompt_lens=(5, 16), tokens=4, repetitions=3, device="cpu")
SHORT = ["--batch-sizes=1,2", "--prompt-lens=6", "--tokens=2", "--repetitions=2", "--device=cpu"]


def save(folder, widths, tokenizer, family="llama", **options):
    model, mask = pruned(family, widths, **options)
    save_pruned(model, mask, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny llama with (FFN channels, KV groups) of UNEVEN."""
    return save(tmp_path_factory.mktemp("bench") / "small[1]", UNEVEN, tiny_tokenizer())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two GGUF files: a pruned model and one as wide as it was."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, widths in {"small": UNEVEN, "dense": [(96, 4)] * 3}.items():
        made = save(folder / name, widths, byte_level(), vocab=VOCAB)
        export(made, folder / f"{name}.gguf", type="f32")
    return [str(folder / f"{name}.gguf") for name in ("small", "dense")]


# --- what it says ---


def test_two_models_in_one_run(small, tiny):
    seen = []
    result = grasp.bench(
        str(small), against=str(tiny), **FAST, progress=lambda n, of: seen.append((n, of))
    )
    assert [(c.batch_size, c.prompt_len) for c in result.cases] == [
        (1, 5),
        (1, 16),
        (3, 5),
        (3, 16),
    ]
    assert seen == [(n, 12) for n in range(1, 13)]
    for case in result.cases:
        for phase, tokens in (
            (case.prefill, case.batch_size * case.prompt_len),
            (case.decode, case.batch_size),
        ):
            ours, theirs = phase.repetitions
            assert len(ours) == len(theirs) == 3 and min(*ours, *theirs) > 0
            assert phase.tokens_per_second == tuple(tokens / s.median for s in phase.seconds)
            assert phase.speedup == Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])
    assert json.loads(json.dumps(result.to_json()))["models"][1]["model"] == str(tiny)


def test_bytes_are_those_of_the_model_and_its_cache(small, tiny):
    ours, theirs = bench(str(small), against=str(tiny), **FAST).models
    for found, folder, groups in ((ours, small, 1 + 4 + 3), (theirs, tiny, 3 * 4)):
        model, _ = load_model(folder, dtype=torch.float32)
        assert found.memory_bytes == 4 * sum(p.numel() for p in model.parameters()) + sum(
            4 * b.numel() for b in model.buffers()
        )
        assert found.disk_bytes == (folder / "model.safetensors").stat().st_size
        assert found.kv_bytes_per_token == groups * 2 * 16 * 4  # K and V, head_dim, fp32
        assert found.kv_bytes_per_token_planned == found.kv_bytes_per_token


def test_bf16_halves_weights_and_cache(tiny):
    fp32, bf16 = (bench(str(tiny), dtype=d, **FAST).models[0] for d in ("fp32", "bf16"))
    assert bf16.kv_bytes_per_token == fp32.kv_bytes_per_token / 2
    assert bf16.kv_bytes_per_token_planned == fp32.kv_bytes_per_token_planned // 2
    assert bf16.memory_bytes < 0.51 * fp32.memory_bytes and bf16.dtype == "bfloat16"


def test_the_cache_is_measured_and_not_planned(tmp_path):
    """A sliding window keeps fewer tokens than its config would say alone."""
    folder = save_tiny(tmp_path / "model", "mistral", sliding_window=8)
    found = bench(str(folder), **FAST | {"prompt_lens": (64,)}).models[0]
    assert found.kv_bytes_per_token < found.kv_bytes_per_token_planned / 2


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "deepseek v3"])
def test_caches_of_other_kinds(name, tmp_path):
    """Layers with states have no keys, and a latent cache is not what the config says."""
    folder = str(save_brought(tmp_path / "model", name))
    result = bench(folder, against=folder, **FAST)
    rows = {row[0]: row for row in result.rows()}
    assert rows["KV cache per token"][-1] == "100.00%"
    assert ("by its config" in rows) == all(m.kv_bytes_per_token_planned for m in result.models)


def test_speed_up_is_taken_pair_by_pair():
    """A slow minute that hits both leaves the ratio as it is."""
    phase = _phase([[1.0, 10.0, 1.0], [2.0, 20.0, 2.0]], tokens=6)
    assert phase.speedup == Spread(2.0, 2.0, 2.0) and phase.tokens_per_second == (6.0, 3.0)
    assert _phase([[1.0]], tokens=1).speedup is None


def test_models_take_turns(tiny, monkeypatch):
    """The first of a pair in one repetition is the second in the next, after a warm-up each."""
    order, run = [], runtimes.Transformers._run

    def noted(self, ids, tokens):
        order.append(self.model.order)
        return run(self, ids, tokens)

    def named(*arguments, **options):
        model, tokenizer = load_model(*arguments, **options)
        model.order = next(names)
        return model, tokenizer

    names = iter("ab")
    monkeypatch.setattr(runtimes, "load_model", named)
    monkeypatch.setattr(runtimes.Transformers, "_run", noted)
    bench(str(tiny), against=str(tiny), **FAST | {"batch_sizes": (1,), "prompt_lens": (4,)})
    assert "".join(order) == "ab" + "abbaab"


# --- what it computes ---


def test_decode_is_greedy_and_cached(tiny, monkeypatch):
    """The tokens are those of generate, one a step, after one pass over the prompt."""
    steps, forward = [], LlamaForCausalLM.forward

    def noted(self, ids, **options):
        out = forward(self, ids, **options)
        steps.append((ids, out.logits.shape))
        return out

    runner = runtimes.Transformers(str(tiny), "fp32", "cpu", False)
    ids = torch.arange(3, 23).view(2, 10)
    expected = runner.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=6,
        max_new_tokens=6
    )  # fmt: skip
    monkeypatch.setattr(LlamaForCausalLM, "forward", noted)
    runner.run(ids, 6)
    assert [shape for _, shape in steps] == 7 * [(2, 1, 256)]
    assert torch.equal(torch.cat([found for found, _ in steps], dim=1), expected)


def test_a_cache_that_computes_something_else(refused, tiny, monkeypatch):
    forward = LlamaForCausalLM.forward

    def forgetful(self, ids, **options):
        if options.get("past_key_values"):
            options["past_key_values"].crop(-1)
        return forward(self, ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    message = refused("bench", tiny, *SHORT)
    assert message.startswith(f"{tiny} computes something else from its KV cache: relative error ")


# --- compiled ---


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])  # the last two: sliding windows
def test_a_step_is_one_graph(family, tmp_path):
    """With widths of each layer's own, from a static cache, for every token alike."""
    folder = save(tmp_path / "small", UNEVEN, tiny_tokenizer(), family=family)
    model, _ = load_model(folder, dtype=torch.float32)
    step = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(3, 23).view(2, 10)
    cache = StaticCache(model.config, max_cache_len=14)
    with torch.inference_mode():
        out = model(ids, past_key_values=cache)
        for column in ids.T[:3]:
            out = step(column[:, None], past_key_values=cache)
        with torch.compiler.set_stance("fail_on_recompile"):
            out = step(ids[:, 3:4], past_key_values=cache)
        whole = model(torch.cat([ids, ids[:, :4]], dim=1), use_cache=False)
    torch.testing.assert_close(out.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_compiled_decoding(tmp_path, monkeypatch):
    """The tokens of generate; a repetition compiles nothing; the static cache is counted whole."""
    folder = save(tmp_path / "small", [(64, 2)], tiny_tokenizer(), layers=1)
    sequences, run = [], runtimes.Transformers._run

    def noted(self, ids, tokens):
        stance = "fail_on_recompile" if sequences else "default"
        with torch.compiler.set_stance(stance):
            found = run(self, ids, tokens)
        sequences.append(found[1])
        return found

    monkeypatch.setattr(runtimes.Transformers, "_run", noted)
    result = bench(str(folder), **FAST | {"batch_sizes": (2,), "prompt_lens": (6,)}, compile=True)
    model, _ = load_model(folder, dtype=torch.float32)
    prompt = sequences[0][:, :6]
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=4,
        max_new_tokens=4
    )  # fmt: skip
    assert len(sequences) == 1 + 3 and all(torch.equal(found, expected) for found in sequences)
    assert result.models[0].kv_bytes_per_token == 2 * 2 * 16 * 4
    assert result.settings["compile"]
    assert "greedy, compiled, from the static float32 cache" in result.measured_on()


def test_no_compiler(refused, tiny, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("nothing compiled")))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-g++")}):
        message = refused("bench", tiny, *SHORT, "--compile")
    assert message.startswith(f"--compile: torch cannot compile {tiny} (InvalidCxxCompiler: ")
    assert "no-g++" in message and message.endswith(
        "g++ if that is what it lacks, or leave --compile out"
    )


# --- llama.cpp ---


def test_gguf_files_run_in_llama_cpp(files):
    result = bench(files[0], against=files[1], **FAST)
    for found, file, groups in zip(result.models, files, (1 + 4 + 3, 3 * 4), strict=True):
        assert found.runtime.startswith("llama.cpp") and found.disk_bytes > found.memory_bytes
        weights = sum(int(t.n_bytes) for t in GGUFReader(file).tensors)
        assert found.memory_bytes == weights
        assert found.kv_bytes_per_token_planned == groups * 2 * 16 * 2  # K and V, head_dim, f16
        bookkeeping = found.kv_bytes_per_token - found.kv_bytes_per_token_planned
        assert 0 <= bookkeeping < 64
    assert len(result.cases) == 4 and all(c.decode.speedup for c in result.cases)
    assert set(result.versions) == {"grasp", "xllamacpp"}


def test_llama_cpp_beside_transformers(files):
    folder = files[0].removesuffix(".gguf")
    result = bench(folder, against=files[0], **FAST | {"prompt_lens": (8,)})
    runtimes = [m.runtime.split()[0] for m in result.models]
    assert runtimes == ["torch", "llama.cpp"] and all(r in result.measured_on() for r in runtimes)


def test_llama_cpp_computes_the_whole_prompt(files, monkeypatch):
    ask = runtimes.LlamaCpp._ask

    def cached(self, path, **body):
        return ask(self, path, **body | ({"cache_prompt": True} if "prompt" in body else {}))

    monkeypatch.setattr(runtimes.LlamaCpp, "_ask", cached)
    with pytest.raises(GraspError, match=r"computed 1 prompt and 5 other tokens of .* where 16"):
        bench(files[0], **FAST | {"batch_sizes": (1,), "prompt_lens": (16,)})


def test_gguf_files_are_not_compiled(refused, files):
    message = refused("bench", files[0], "--compile")
    assert message == f"--compile is for torch, and {files[0]} runs in llama.cpp: leave it out"


def test_no_llama_cpp(refused, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    message = refused("bench", files[0], "--device=cpu")
    assert message.endswith("which is not installed: pip install 'graspprune[llama-cpp]'")


def test_no_gpu_in_llama_cpp(files, monkeypatch):
    monkeypatch.setattr(speed, "pick_device", lambda device: "cuda")
    cpu = [{"type": xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU}]
    monkeypatch.setattr(xllamacpp, "get_device_info", lambda: cpu)
    with pytest.raises(GraspError, match="the installed xllamacpp sees no GPU"):
        bench(files[0], device="cuda")


def test_a_file_that_llama_cpp_does_not_take(files, tmp_path):
    whole = Path(files[0]).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(GraspError, match=r"cut\.gguf"):
        bench(str(tmp_path / "cut.gguf"), **FAST)


# --- vLLM, which tests/served runs ---


def test_no_vllm(refused, tiny):
    message = refused("bench", tiny, "--runtime=vllm", "--device=cpu")
    assert message.startswith("vLLM is not installed here: install grasp in the environment of")


def test_gguf_files_do_not_run_in_vllm(refused, files, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    message = refused("bench", files[0], "--runtime=vllm")
    assert message == f"{files[0]} runs in llama.cpp: name a folder, or leave --runtime out"


def test_both_servers_get_the_memory_that_the_larger_model_needs(small, tiny):
    room = serving.room_for([str(small), str(tiny)], "bf16", "cpu", (3, 200))
    params = sum(p.numel() for p in load_model(tiny, dtype=torch.float32)[0].parameters())
    blocks = 3 * 2 + 1  # 201 tokens in blocks of 128, and one that vLLM keeps
    assert room == (3, 201, 2 * params + blocks * 128 * 3 * 4 * 2 * 16 * 2)


# --- the command ---


def test_the_command(call, small, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)  # for a name that fits in its column
    plot = tmp_path / "speed.png"
    code, said, err = call("bench", small.name, f"--against={tiny}", *SHORT, f"--plot={plot}")
    assert (code, err) == (0, "bench: 4 of 4\n")
    for part in ("prefill 1 x 6", "decode 2 x 6", "tok/s", "66.67%", "small[1]", " x"):
        assert part in said, part
    assert "speed-up pair by pair" in said and "1 thread." in said
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_in_json(call, tiny):
    code, said, _ = call("bench", tiny, *SHORT, "--json")
    found = json.loads(said)
    assert code == 0 and found["settings"]["batch_sizes"] == [1, 2]
    assert found["cases"][0]["decode"]["speedup"] is None
    assert len(found["cases"][1]["prefill"]["repetitions"][0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-sizes=0,2"], "--batch-sizes must be at least 1, got 0,2"),
        (["--prompt-lens=-3"], "--prompt-lens must be at least 1, got -3"),
        (["--tokens=0"], "--tokens must be at least 1, got 0"),
        (["--repetitions=0"], "--repetitions must be at least 1, got 0"),
        (["--prompt-lens=250"], "--prompt-lens and --tokens must be at most 256 together for "),
        (["--plot=speed.pdf"], "--plot must name a file that ends in .png, got speed.pdf"),
        (
            ["--plot=no/speed.png"],
            "--plot no/speed.png must be in a folder that exists: make no first",
        ),
        (["--device=gpu"], "--device must be cpu, cuda, cuda:1 or auto, got 'gpu'"),
        (["--against=nowhere"], "no such folder or file: nowhere (a model on the hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(refused, tiny, options, message):
    assert message in refused("bench", tiny, "--device=cpu", *options)


def test_counts_that_are_none(refused, tiny):
    message = refused("bench", tiny, "--batch-sizes=1,two", code=2)
    assert message.endswith("expected a list of whole numbers such as 1,4, got '1,two'")


def test_memory_that_runs_out(refused, tiny, monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")

    monkeypatch.setattr(runtimes.Transformers, "run", run)
    message = refused("bench", tiny, *SHORT)
    assert message.startswith("out of memory on device cpu (CUDA out of memory. Tried to allocate ")
    assert message.endswith(
        "): lower --batch-sizes, --prompt-lens or --tokens, or use --dtype bf16"
    )
