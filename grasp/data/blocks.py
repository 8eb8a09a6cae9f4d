"""Blocks of tokens for learning, and held-out blocks for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp.data.corpus import Corpus
from grasp.errors import GraspError

HELD_OUT_BLOCKS = 64


def token_blocks(corpus: Corpus, *, seq_len: int, samples: int, seed: int) -> Tensor:
    """`samples` non-overlapping blocks of a corpus, chosen by seed: int64 [samples, seq_len].

    The corpus is cut from its beginning into blocks of `seq_len` tokens (a shorter remainder is
    left out). Blocks are drawn without replacement, never those of `held_out_text`. Raises
    GraspError if there are too few.
    """
    if seq_len < 2:
        raise GraspError(f"`seq_len` must be at least 2, got {seq_len}")
    if samples < 1:
        raise GraspError(f"`samples` must be at least 1, got {samples}")
    available = corpus.tokens // seq_len
    if samples > available:
        fix = (
            f"use `samples={available}`, a shorter `seq_len`"
            if available
            else "use a shorter `seq_len`"
        )
        raise GraspError(
            f"too little text: {corpus.name} has {corpus.tokens:,} tokens, {available:,} blocks of "
            f"{seq_len}; `samples={samples}` needs {samples * seq_len:,} tokens: {fix} or more text"
        )
    blocks, held_out = _held_out(corpus, seq_len, samples)
    rest = blocks[len(held_out) :]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return rest[order[:samples]]


def held_out_text(corpus: Corpus, *, seq_len: int, samples: int) -> Corpus | None:
    """Up to 64 blocks for evaluation, which `token_blocks` never draws; the same for every seed.

    None if the samples need the whole corpus.
    """
    _, held_out = _held_out(corpus, seq_len, samples)
    if not len(held_out):
        return None
    return Corpus.of_ids(f"{corpus.name}, held-out blocks", held_out.flatten())


def _held_out(corpus: Corpus, seq_len: int, samples: int) -> tuple[Tensor, Tensor]:
    """All blocks of the corpus in a fixed order, and the held-out ones, which come first."""
    available = corpus.tokens // seq_len
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
    blocks = corpus.ids[: available * seq_len].view(available, seq_len)[order]
    return blocks, blocks[: max(0, min(HELD_OUT_BLOCKS, available - samples))]
