"""Write a Hugging Face tokenizer as the vocabulary of a GGUF file.

llama.cpp has two tokenizers for the supported models: `gpt2`, byte-level BPE, which needs the name
of the rule that splits text before merging; and `llama`, SentencePiece's BPE with byte fallback.
The choice depends on how the tokenizer works, not on the model it belongs to.
"""

from __future__ import annotations

import json
import re
from typing import Any

import gguf
from gguf import TokenType

from grasp.errors import GraspError

Spec = dict[str, Any]  # the content of tokenizer.json, or a part of it

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_LLAMA3 = rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_REST}"
_WORD, _UPPER, _LOWER = (
    r"[^\r\n\p{L}\p{N}]?",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_REST}"

# (rules that split text, whether whole words are looked up before merging) -> llama.cpp's name
SPLITS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, config: Any) -> str | None:
    """Add tokens, merges or scores, special tokens and the chat template.

    Returns a note if llama.cpp tokenizes some text differently. Raises GraspError if llama.cpp has
    no equivalent tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise GraspError(f"{type(tokenizer).__name__} has no tokenizer.json to export")
    spec: Spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = spec["model"]["type"]
    if kind != "BPE":
        raise GraspError(f"a tokenizer of type {kind} cannot be exported: grasp writes BPE")
    add_tokens = _add_sentencepiece if spec["model"]["byte_fallback"] else _add_byte_level
    note = add_tokens(writer, spec, config.vocab_size)

    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("unk_token_id", writer.add_unk_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        token = getattr(tokenizer, name)
        token = getattr(config, name, None) if token is None else token
        if isinstance(token, int) and token < config.vocab_size:
            add(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return note


def _add_byte_level(writer: gguf.GGUFWriter, spec: Spec, size: int) -> str | None:
    merges = _merges(spec)
    if not merges:
        raise GraspError("a tokenizer without merges cannot be exported: llama.cpp needs some")
    tokens, types = _tokens(spec, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(spec))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if any(step["type"] == "NFC" for step in _steps(spec["normalizer"], "normalizers")):
        return "llama.cpp does not compose letters and accents (NFC), this tokenizer does"
    return None


def _add_sentencepiece(writer: gguf.GGUFWriter, spec: Spec, size: int) -> str | None:
    """Add scores in place of merges: the first merge in tokenizer.json has the highest score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(spec)):
        ranks.setdefault("".join(pair), rank)
    tokens, types = _tokens(spec, size)
    for token, text in enumerate(tokens):
        if types[token] == TokenType.NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[token] = TokenType.BYTE
        elif text == spec["model"]["unk_token"]:
            types[token] = TokenType.UNKNOWN
        elif types[token] == TokenType.USER_DEFINED:
            tokens[token] = text.replace("▁", " ")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(text, len(ranks))) for text in tokens])
    writer.add_token_types(types)
    prefix, always = _space_prefix(spec)
    writer.add_add_space_prefix(prefix)
    if prefix and not always:
        return "llama.cpp puts a space before text that begins with one, this tokenizer does not"
    return None


def _tokens(spec: Spec, size: int) -> tuple[list[str], list[TokenType]]:
    """Return one text and type per row of the embedding; rows without a token get a placeholder."""
    tokens = [f"[PAD{token}]" for token in range(size)]
    types = [TokenType.UNUSED] * size
    for text, token in spec["model"]["vocab"].items():
        if token < size:
            tokens[token], types[token] = text, TokenType.NORMAL
    for added in spec["added_tokens"]:
        if added["id"] < size:  # some tokenizers add a padding token that the model lacks
            tokens[added["id"]] = added["content"]
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _merges(spec: Spec) -> list[list[str]]:
    """Return the merge pairs in order of rank; older files write a pair as one string."""
    return [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]


def _steps(part: Spec | None, parts: str) -> list[Spec]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a single step, in order."""
    if part is None:
        return []
    return part[parts] if part["type"] == "Sequence" else [part]


def _split(spec: Spec) -> str:
    """Return llama.cpp's name for how this byte-level tokenizer splits text. Raises GraspError."""
    normalizers = [step["type"] for step in _steps(spec["normalizer"], "normalizers")]
    steps = [_rule(step) for step in _steps(spec["pre_tokenizer"], "pretokenizers")]
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    known = SPLITS.get((tuple(steps), ignore_merges))
    if known is None or set(normalizers) - {"NFC"}:  # llama.cpp does not apply NFC itself
        raise GraspError(
            f"this tokenizer splits text by {' then '.join([*normalizers, *steps]) or 'no rule'}, "
            f"and grasp can only name to llama.cpp the rules of {', '.join(SPLITS.values())}"
        )
    return known


def _rule(step: Spec) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    pattern = step.get("pattern", {}).get("Regex")
    if step["type"] == "Split" and pattern and step["behavior"] == "Isolated":
        return pattern
    return step["type"]


def _space_prefix(spec: Spec) -> tuple[bool, bool]:
    """Return whether this SentencePiece tokenizer puts a space before text, and even a second one.

    Raises GraspError for a step that llama.cpp lacks.
    """
    prefix, always, replaced = False, True, False
    steps = _steps(spec["normalizer"], "normalizers")
    for step in steps + _steps(spec["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                replaced = True
            case {"type": "Split", "pattern": {"String": " "}} if replaced:
                pass  # Gemma: no space is left to split at
            case {
                "type": "Metaspace",
                "replacement": "▁",
                "split": False,
                "prepend_scheme": scheme,
            }:
                prefix, always = scheme != "never", False
            case _:
                raise GraspError(
                    f"this SentencePiece tokenizer has a step {step['type']} that llama.cpp lacks"
                )
    return prefix, always
