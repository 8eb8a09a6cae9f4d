"""Perplexity as papers report it, together with every setting that affects the number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp.data.corpus import Corpus, read_corpus
from grasp.data.reading import find_source
from grasp.distributed import in_order
from grasp.errors import GraspError
from grasp.journal import Progress
from grasp.model.load import (
    ShardMode,
    check_launched,
    load_model,
    longest,
    packed_errors,
    pick_device,
)
from grasp.model.sharding import free, is_sharded

DEFAULT_SEQ_LEN = 2048
LOGIT_ROWS = 1024  # rows of logits upcast to fp32 at a time
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, in nats per token, and how it was measured."""

    value: float
    nll: float
    tokens: int  # predictions scored: windows * (seq_len - 1)
    windows: int
    windows_available: int
    seq_len: int
    bos: bool
    dtype: str  # of the arithmetic, not of the stored weights
    data: str
    split: str | None
    sha256: str  # of the text
    notes: tuple[str, ...] = ()  # on the text, for the user

    def __str__(self) -> str:
        data = f"{self.data}, split {self.split}" if self.split else self.data
        windows = f"{self.windows:,} windows"
        if self.windows < self.windows_available:
            windows = f"the first {self.windows:,} of {self.windows_available:,} windows"
        bos = "BOS before each" if self.bos else "no BOS"
        return (
            f"perplexity {self.value:.2f} on {data}: sequence length {self.seq_len}, {windows}, "
            f"{bos}, {self.dtype} model, fp32 loss"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: Any,
    corpus: Corpus,
    *,
    seq_len: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    bos: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal LM of transformers, in fp32, on its current device.

    Stored weights do not change: a narrower one is cast to fp32 while its module runs. The result
    equals the result of an fp32 model, for the extra memory of one matrix.

    The corpus is cut from its beginning into windows of `seq_len` tokens; a shorter rest is left
    out. Each window is scored on its own: seq_len - 1 predictions. `windows` limits the number of
    windows. With `bos`, a window is a BOS and seq_len - 1 tokens of the corpus, so the length stays
    the same. The loss is summed in fp64. `seq_len` None means 2048, or the model's limit if that is
    less.

    Raises GraspError if the length exceeds the model's limit, the text is too short, token ids are
    outside the model's vocabulary, or the loss is not finite.
    """
    if batch_size < 1:
        raise GraspError(f"`batch_size` must be at least 1, got {batch_size}")
    inputs, available = _windows(model, corpus, seq_len, windows, bos)
    count, length = inputs.shape
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        with _in_fp32(model):
            batches = inputs.split(batch_size)
            of_batches = in_order(lambda batch: _nll(model, batch.to(model.device)), batches)
            for done, nll in enumerate(of_batches, 1):
                total += nll
                windows_done = min(done * batch_size, count)
                if not torch.isfinite(total):
                    raise GraspError(
                        f"the loss is {total.item()} after window {windows_done} of {count}: "
                        "the weights are damaged, or overflow in fp32: download it again"
                    )
                if progress:
                    progress(windows_done, count)
    finally:
        model.train(was_training)
    tokens = count * (length - 1)
    mean = total.item() / tokens
    return Perplexity(
        value=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        tokens=tokens,
        windows=count,
        windows_available=available,
        seq_len=length,
        bos=bos,
        dtype="float32",
        data=corpus.name,
        split=corpus.split,
        sha256=corpus.sha256,
        notes=corpus.notes,
    )


def evaluate_text(model: str, text: str, **how: Any) -> Perplexity:
    """Measure the perplexity of a model on a text, both named as on the command line.

    `how`: the options of `evaluate_texts`.
    """
    return evaluate_texts(model, [text], **how)[0]


def evaluate_texts(
    model: str,
    texts: Sequence[str],
    *,
    text_field: str = "text",
    seq_len: int | None = None,
    windows: int | None = None,
    bos: bool = False,
    batch_size: int = 1,
    device: str = "auto",
    trust_remote_code: bool = False,
    shard: ShardMode = "none",
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Measure the perplexity of a model on each text, all named as on the command line.

    Ranks share the windows; with `shard`, they hold the weights in parts too.
    """
    check_launched(shard)
    for name in texts:
        find_source(name, "test")  # a mistyped name fails before the model is read
    loaded, tokenizer = load_model(
        model,
        dtype=None,
        device=pick_device(device),
        trust_remote_code=trust_remote_code,
        shard=shard,
    )
    found = []
    for name in texts:
        corpus = read_corpus(name, tokenizer, text_field=text_field, split="test")
        with packed_errors(model, loaded):
            measured = perplexity(
                loaded,
                corpus,
                seq_len=seq_len,
                windows=windows,
                batch_size=batch_size,
                bos=bos,
                progress=progress,
            )
        found.append(measured)
    if is_sharded(loaded):
        free(loaded)
    return found


def _windows(
    model: Any, corpus: Corpus, seq_len: int | None, windows: int | None, bos: bool
) -> tuple[Tensor, int]:
    """Return input ids int64 [windows, seq_len], and the number of windows in the whole corpus."""
    limit = longest(model)
    length = min(DEFAULT_SEQ_LEN, limit) if seq_len is None else seq_len
    if not 2 <= length <= limit:
        raise GraspError(f"`seq_len` must be between 2 and {limit} for this model, got {length}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if corpus.tokens and int(corpus.ids.max()) >= vocabulary:
        raise GraspError(
            f"token {int(corpus.ids.max())} of {corpus.name} is not in the model's vocabulary of "
            f"{vocabulary}: use the tokenizer that belongs to the model"
        )
    if windows is not None and windows < 1:
        raise GraspError(f"`windows` must be at least 1, got {windows}")
    step = length - bos
    available = corpus.tokens // step
    if available < (windows or 1):
        raise GraspError(
            f"too little text: {corpus.name} has {corpus.tokens:,} tokens, {available:,} windows "
            f"of {length}; {windows or 1} need {(windows or 1) * step:,} tokens: "
            "use fewer `windows`, a shorter `seq_len` (of prune: `eval_windows`, "
            "`eval_seq_len`) or more text"
        )
    count = min(available, windows or available)
    inputs = corpus.ids[: count * step].view(count, step)
    if bos:
        token = model.config.bos_token_id
        if token is None:
            raise GraspError("`bos` needs a BOS token, which this model has not: leave it out")
        inputs = F.pad(inputs, (1, 0), value=token)
    return inputs, available


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Make every module compute in fp32: its own narrower weights are cast while it runs."""
    held: dict[nn.Module, dict[nn.Parameter, Tensor]] = {}

    def widen(module: nn.Module, _: Any) -> None:  # what a sharded layer holds, it holds only now
        own = [w for w in module.parameters(recurse=False) if w.dtype in NARROW]
        held[module] = {weight: weight.data for weight in own}
        for weight in own:
            weight.data = weight.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for weight, data in held.pop(module, {}).items():
            weight.data = data

    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(widen))
            stack.enter_context(module.register_forward_hook(restore, always_call=True))
        yield


@torch.inference_mode()
def _nll(model: Any, ids: Tensor) -> Tensor:
    """Summed negative log-likelihood of ids[:, 1:], an fp64 scalar on the CPU."""
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    # in slices: an fp32 copy of all [tokens, vocabulary] would fill a GPU
    parts = [
        F.cross_entropy(rows.float(), wanted, reduction="none").double().sum()
        for rows, wanted in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.stack(parts).sum().cpu()
