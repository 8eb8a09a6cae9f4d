"""Text sampled from the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grasp.data.corpus import Corpus
from grasp.errors import GraspError
from grasp.journal import Progress


def sample_corpus(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Corpus:
    """Text sampled from the model (`self`): samples * seq_len ids, no data needed.

    Each sample starts after a BOS, which is not part of it, and is drawn at temperature 1 from the
    whole vocabulary. An EOS is kept, and sampling continues after it, as in packed training text.
    Draws are made on the CPU from one generator, so that a seed means the same on every device.
    Raises GraspError if the tokenizer has neither BOS nor EOS.
    """
    start = next(
        (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None
    )
    if start is None:
        raise GraspError(
            "'self' needs a token to start from, and the tokenizer has neither BOS nor EOS: "
            "give text instead"
        )
    generator = torch.Generator().manual_seed(seed)
    written = []
    for first in range(0, samples, batch_size):
        rows = min(batch_size, samples - first)
        written.append(_sample(model, start, rows, seq_len, generator))
        if progress:
            progress(first + rows, samples)
    return Corpus.of_ids("self", torch.cat(written).flatten())


@torch.no_grad()
def _sample(model: Any, start: int, rows: int, seq_len: int, generator: torch.Generator) -> Tensor:
    ids = torch.full((rows, 1), start)
    columns: list[Tensor] = []
    cache = None
    for _ in range(seq_len):
        out = model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        probabilities = out.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.multinomial(probabilities, 1, generator=generator)
        columns.append(ids)
    return torch.cat(columns, dim=1)
