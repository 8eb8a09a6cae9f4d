"""Tiny random models, one per supported family, a tokenizer, and a record of the ops they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grasp.model.load import auto_class, cast

WORDS = ("the", "of", "a", "river", "stone", "light", "moves", "under", "every", "house", "she")
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# family -> (class prefix, what its config says beyond the sizes)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),  # biased q, k and v
    "qwen3": ("Qwen3", {}),  # RMS norms on q and k
    "phi3": ("Phi3", {"rope_parameters": PARTIAL, "sliding_window": 9, "pad_token_id": 2}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 40, "sliding_window": 9}),
    "gemma3_text": ("Gemma3", {"query_pre_attn_scalar": 40, "sliding_window": 9}),
}
# What people bring besides: name -> (config class, what it says beyond SIZES). Of the same kind as
# those above or not, each ends in a result or in one line.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEADS = {"head_dim": 8}
EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
DEEP = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 = {"hidden_size_per_layer_input": 0, "head_dim": 8, "global_head_dim": 16, **DEEP}
PER_LAYER_INPUT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_EYE = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
BROUGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, plain": ("Llama", HEADS),
    "llama, heads wider than the hidden size": ("Llama", {"head_dim": 24}),
    "llama, seven queries to a key": (
        "Llama",
        {"hidden_size": 112, "num_attention_heads": 14, **HEADS},
    ),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1, **HEADS}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, **HEADS}),
    "mistral": ("Mistral", HEADS),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEADS),
    "phi3": ("Phi3", {}),
    "gemma3": ("Gemma3Text", {"query_pre_attn_scalar": 8, **HEADS}),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 8, **HEADS}),
    "gemma4": ("Gemma4Text", {**PER_LAYER_INPUT, "head_dim": 8}),
    "gemma4, dense": ("Gemma4Text", GEMMA4),
    "gemma4, shared keys": (
        "Gemma4Text",
        {**GEMMA4, **PER_LAYER_INPUT, "num_kv_shared_layers": 2},
    ),
    "gemma4, keys as values": (
        "Gemma4Text",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", HEADS),
    "exaone4": ("Exaone4", {}),
    "ministral3": ("Ministral3", HEADS),
    "hunyuan": ("HunYuanDenseV1", HEADS),
    "vaultgemma": ("VaultGemma", HEADS),
    "glm": ("Glm", HEADS),
    "olmo": ("Olmo", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {}),
    "olmo hybrid": ("OlmoHybrid", {"layer_types": ["linear_attention", "full_attention"]}),
    "granite": ("Granite", {}),
    "granite, hybrid": (
        "GraniteMoeHybrid",
        {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, **EXPERTS},
    ),
    "starcoder2": ("Starcoder2", {}),
    "glm4": ("Glm4", HEADS),
    "seed-oss": ("SeedOss", HEADS),
    "ernie 4.5": ("Ernie4_5", {}),
    "helium": ("Helium", HEADS),
    "stablelm": ("StableLm", {}),
    "apertus": ("Apertus", {}),
    "arcee": ("Arcee", {}),
    "bitnet": ("BitNet", {}),
    "nemotron": ("Nemotron", {}),
    "nemotron-h": ("NemotronH", {"hybrid_override_pattern": "M*", **MAMBA, **HEADS}),
    "gpt-2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3-moe": ("Qwen3Moe", {"norm_topk_prob": True, **EXPERTS, **HEADS}),
    "gpt-oss": ("GptOss", {**EXPERTS, **HEADS}),
    "deepseek v3": ("DeepseekV3", {"n_routed_experts": 4, "n_group": 2, **LATENT, **EXPERTS}),
    "mamba": ("Mamba", {}),
    "falcon-h1": ("FalconH1", MAMBA),
    "falcon-h1, multipliers": ("FalconH1", {"mlp_multipliers": [0.5, 2.0], **MAMBA}),
    "qwen3-next": (
        "Qwen3Next",
        {"layer_types": ["linear_attention", "full_attention"], **EXPERTS, **LINEAR, **HEADS},
    ),
    "qwen3.5": (
        "Qwen3_5Text",
        {**LINEAR, **HEADS, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "gemma3, sees images": (
        "Gemma3",
        {
            "text_config": HEADS,
            "vision_config": EYE,
            "mm_tokens_per_image": 4,
            "image_token_index": 250,
            "boi_token_index": 251,
            "eoi_token_index": 252,
        },
    ),
    "gemma4, sees images": (
        "Gemma4",
        {
            "text_config": GEMMA4,
            "vision_config": {**EYE, **HEADS, "num_key_value_heads": 4},
            "image_token_id": 250,
            "boi_token_id": 251,
            "eoi_token_id": 252,
        },
    ),
    "mistral3, sees images": (
        "Mistral3",
        {
            "text_config": {"model_type": "ministral3", **HEADS},
            "vision_config": {"model_type": "pixtral", **EYE},
            "image_token_index": 250,
        },
    ),
    "qwen2.5-vl, sees images": (
        "Qwen2_5_VL",
        {
            "text_config": MROPE,
            "vision_config": {**QWEN_EYE, "fullatt_block_indexes": [0]},
            "image_token_id": 250,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 249,
        },
    ),
    "qwen3-vl, sees images": (
        "Qwen3VL",
        {
            "text_config": {**MROPE, **HEADS},
            "vision_config": {
                **QWEN_EYE,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 250,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 249,
        },
    ),
}
# Dense families that nothing else here names, to show that a new one needs no code.
FOUR = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
UNTRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "cwm": ("Cwm", {**FOUR, **HEADS, **PLAIN_ROPE}),
    "granite_swa": ("GraniteSWA", {**FOUR, "sliding_window": 9}),
    "hyperclovax": ("HyperCLOVAX", {**FOUR, "embedding_multiplier": 2.0}),
    "jais2": ("Jais2", FOUR),
}
# Mixtures whose experts are units: six experts in each of two layers, of which a token visits two.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, **HEADS}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 6, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 6, **HEADS}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 6}),
    "olmoe": ("Olmoe", {"num_experts": 6}),  # norms over all heads: its KV groups stay
    "gpt_oss": ("GptOss", {"num_local_experts": 6, **HEADS}),  # a value per head: they stay, too
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def tiny_model(
    family: str,
    *,
    tied: bool = False,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 256,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> PreTrainedModel:
    """A stock decoder, in eval mode, whose biases and norms are random too.

    `head_dim` times `heads` differs from `hidden` on purpose. Qwen2 has no explicit head_dim in its
    stock config; transformers reads one when it is there.
    """
    prefix, extra = FAMILIES[family]
    settings = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        "architectures": [f"{prefix}ForCausalLM"],
        **extra,
        **config,
    }
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    model = model_class(model_class.config_class(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # a bias, or a norm's weight around one
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return cast(model, dtype).eval().requires_grad_(False)


def tiny_mixture(family: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A stock mixture of experts with random weights, biases and router values, in eval mode."""
    prefix, own = MIXTURES[family]
    sizes = {**SIZES, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    tokens = {"vocab_size": 256, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    settings = getattr(transformers, f"{prefix}Config")(**sizes | tokens | own | config)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def stock_model(prefix: str, **config: Any) -> PreTrainedModel:
    """One tiny layer of any class of transformers, as its own initialisation leaves it."""
    config_class = getattr(transformers, f"{prefix}Config")
    settings = config_class(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
        **config,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(settings)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(vocab: int = 256) -> PreTrainedTokenizerFast:
    """One token per byte; any UTF-8 text survives encode and decode. `vocab` is at least 256.

    UTF-8 never uses the bytes 0xC0 and 0xC1, of which the one merge is made that llama.cpp needs,
    nor 0xFC to 0xFF, which make room for it and for the three special tokens.
    """
    byte_tokens = bytes_to_unicode()
    merge = byte_tokens[0xC0], byte_tokens[0xC1]
    tokens = [*SPECIAL_TOKENS, *(byte_tokens[byte] for byte in range(0xFC)), "".join(merge)]
    tokens += [f"<extra_{i}>" for i in range(vocab - len(tokens))]
    table = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab=table, merges=[merge], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",  # or Qwen2's tokenizer class adds one beyond the embedding on loading
    )


def ops_run(call: Callable[[], Any]) -> dict[str, int]:
    """How often each op of grasp_kernels runs in a call, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("grasp::")}


def save_tiny(folder: Path, family: str = "llama", **options: Any) -> Path:
    """Write `tiny_model(family, **options)` and its tokenizer as a local Hugging Face folder."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def brought_model(name: str, **more: Any) -> PreTrainedModel:
    """A model of `BROUGHT` or `UNTRIED` in eval mode; norms and biases are random, too."""
    prefix, settings = (BROUGHT | UNTRIED)[name]
    settings = {**settings, **more}
    tokens = {"vocab_size": 256, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    if "text_config" in settings:
        settings["text_config"] = {**tokens, **SIZES, **settings["text_config"]}
    else:
        settings = {**tokens, **SIZES, **settings}
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
        elif parameter.dim() == 2:  # logits far from equal
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def save_brought(folder: Path, name: str) -> Path:
    """Write a model of `BROUGHT` or `UNTRIED`, and a tokenizer."""
    brought_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
