"""Estimates of the peak memory of each stage of a run, from a header alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from grasp.config import (
    RECOMPUTE_EVERY,
    TOKENS_PER_CHANNEL,
    MemoryMode,
    PlannedMemory,
    PruneConfig,
    ScaleKind,
)
from grasp.model.header import Header

MODES: tuple[PlannedMemory, ...] = get_args(PlannedMemory)  # by the memory that each needs
USABLE = 0.9  # of free memory: fragments, the runtime and the estimate's error take the rest
LOGITS_AT_ONCE = 2**25  # as in grasp_kernels.linear_cross_entropy


@dataclass(frozen=True)
class Memory:
    """Estimated peak bytes while gates learn, on top of the memory of the runtime itself.

    Assumes frozen weights without gradients, the loss in chunks, and every gate open, as in the
    first step.

    `activations` are saved for the backward pass, for all tokens of a batch. A layer saves two FFN
    widths (four with GeGLU, which is not fused), queries, keys, values and attention output in the
    model's dtype, and the input of each norm in fp32. A recomputed layer saves only its input,
    until its backward pass. Attention is flash-style, unless its scores have a softcap: then they
    are saved for all pairs of tokens. Channel scales save the tensors that they multiply, at both
    ends of all linear layers. The scales before q, k, v and the FFN are part of the norm, which
    then saves its input in the model's dtype.

    `workspace` is temporary memory of the loss or of an FFN's backward pass, whichever gives the
    higher total. `gates` are the scores and the scales trained with them, with the state of AdamW
    and of the projection.
    """

    weights: int
    activations: int
    workspace: int
    gates: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.workspace + self.gates


def learning_memory(
    header: Header, tokens: int, seq_len: int, width: int, mode: MemoryMode, scales: ScaleKind
) -> Memory:
    """Estimate for a batch of `tokens`, in sequences of `seq_len` and a dtype of `width` bytes."""
    space, facts, saved, learned = header.space, header.facts, [], header.space.size
    for layer in space.layers:
        queries, keys = layer.queries, layer.keys
        ends, norms = 0, facts.norms
        if scales == "channel":
            ends, norms = 2 * (queries + keys) + 4 * space.hidden_size, facts.norms - 2
        learned += ends
        own = width * (4 if facts.geglu else 2) * layer.ffn + 4 * norms * space.hidden_size
        # input, gate, up, product and output of each expert that a token visits: those of its
        # router, and those that it would visit if all were open
        visited = 2 * layer.experts_per_token
        own += width * visited * (4 * layer.expert_width + 3 * space.hidden_size)
        if facts.softcap:  # keys and values repeated; scores after tanh and softmax
            own += 4 * width * queries + 8 * layer.heads * seq_len
        else:  # values are a view of a fused output, all of which is kept
            own += width * (2 + facts.fused_qkv) * (queries + keys)
        saved.append(own + width * ends + 4 * (queries + keys) * facts.qk_norm)
    kept = list(saved)
    if every := RECOMPUTE_EVERY.get(mode):
        kept[::every] = [width * space.hidden_size] * len(kept[::every])
    logits = tokens * header.vocab_size * (width + 8)  # all at once, if the head caps them
    if not facts.softcap:  # one chunk, with its gradient computed in place
        held = min(tokens * header.vocab_size, max(LOGITS_AT_ONCE, header.vocab_size))
        logits = held * width
    in_loss = tokens * sum(kept), logits
    widest = 6 * max(layer.ffn for layer in space.layers) + space.hidden_size
    in_layer = (
        tokens * max(sum(kept[:index]) + own for index, own in enumerate(saved)),
        tokens * width * widest,
    )
    activations, workspace = max(in_loss, in_layer, key=sum)
    return Memory(width * space.total_params, activations, workspace, gates=40 * learned)


def compensation_memory(
    header: Header, config: PruneConfig, width: int, *, ranks: int = 1
) -> int | None:
    """Estimate of the peak bytes of refit or block reconstruction, whichever runs."""
    if config.compensation == "blocks":
        return blocks_memory(header, config.seq_len, width)
    if config.compensation == "refit":
        return refit_memory(header, config.samples, config.seq_len, width, ranks=ranks)
    return None


def refit_memory(header: Header, samples: int, seq_len: int, width: int, *, ranks: int = 1) -> int:
    """Estimate of refit's peak bytes on a GPU, in a dtype of `width` bytes.

    Assumes that nearly all of the widest FFN is kept. Counts weights, hidden states of the text,
    which `ranks` share, a Gram matrix and its rows of kept channels. In fp64: the Gram matrix of
    the kept channels, its factor twice, the right-hand side and the solutions.
    """
    space, widest = header.space, header.space.widest
    blocks = min(samples, -(-TOKENS_PER_CHANNEL * widest // seq_len))
    tokens = seq_len * -(-blocks // ranks)
    hidden = width * tokens * space.hidden_size
    return width * space.total_params + hidden + widest * (32 * widest + 24 * space.hidden_size)


def choosing_memory(header: Header, config: PruneConfig, width: int) -> int | None:
    """Estimate of the peak bytes while a one-shot method chooses, where that takes more than gates.

    Fisher's backward pass is that of gates alone. Taylor's gradients are those of all prunable
    weights, in fp32. Wanda++ has hidden states twice in fp32, a layer in fp32, and gradients of it.
    None for the other methods.
    """
    space, hidden = header.space, header.space.hidden_size
    if config.method.startswith("greedy-"):
        return greedy_memory(header, config.samples, config.seq_len, width)
    one = learning_memory(header, config.seq_len, config.seq_len, width, "fast", "unit").total
    if config.method == "taylor":
        return one + 4 * space.prunable_params
    if config.method == "wanda++":
        layer = hidden * max(layer.cost for layer in space.layers)
        states = 8 * config.samples * config.seq_len * hidden
        return width * space.total_params + states + (12 - width) * layer
    return one if config.method == "fisher" else None


def greedy_memory(header: Header, samples: int, seq_len: int, width: int) -> int:
    """Estimate of the peak bytes of the greedy methods on a GPU, in a dtype of `width` bytes.

    Three times the hidden states of the text, and what a fit takes.
    """
    hidden = 3 * width * samples * seq_len * header.space.hidden_size
    return hidden + _fit_memory(header, width)


def blocks_memory(header: Header, seq_len: int, width: int) -> int:
    """Estimate of the peak bytes on a GPU while blocks are reconstructed, in a dtype of `width`.

    A layer that loses nothing learns in fp32: its weights, the best ones, gradients, two moments.
    Of one sample it saves four FFN widths (and has the gradient of one), queries, keys, values and
    attention output, for each norm its input and output, and the error.
    """
    space, learning = header.space, 0
    for layer in space.layers:
        saved = width * (5 * layer.ffn + 3 * layer.queries + 2 * layer.keys)
        saved += space.hidden_size * (header.facts.norms * (8 + width) + 12)
        learning = max(learning, (20 - width) * space.hidden_size * layer.cost + seq_len * saved)
    return max(_fit_memory(header, width), width * space.total_params + learning)


def _fit_memory(header: Header, width: int) -> int:
    """Weights, and what a fit takes if nearly all of the widest FFN is kept.

    Of the Gram matrix: one in fp32, one in fp64 and its factor twice. Of the right-hand side: two
    in fp32, one in fp64, and the solutions.
    """
    space, widest = header.space, header.space.widest
    return width * space.total_params + widest * (28 * widest + 28 * space.hidden_size)


def evaluation_memory(header: Header, tokens: int) -> int:
    """Estimate for a window of `tokens`: stored weights, fp32 logits, the head cast to fp32."""
    weights = header.stored_bytes * header.space.total_params
    cast = header.space.hidden_size if header.stored_bytes < 4 else 0
    return weights + 4 * header.vocab_size * (tokens + cast)
