"""Memory modes: some layers recompute their activations in the backward pass to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grasp.config import RECOMPUTE_EVERY, MemoryMode, PruneConfig, RecoverConfig
from grasp.distributed import everywhere
from grasp.machine import free_memory, memory_errors
from grasp.model.header import Header, of_model
from grasp.model.patched import patched
from grasp.model.places import device_of
from grasp.planning.memory import MODES, USABLE, learning_memory
from grasp.planning.recovery import OPTIMISER, learned_values, saved_activations


@contextmanager
def memory_mode(
    model: PreTrainedModel, config: PruneConfig | RecoverConfig
) -> Iterator[MemoryMode]:
    """Within the context, apply `config.memory` to this instance; gives the mode, "auto" resolved.

    On out-of-memory, raises GraspError with the mode to resume with.
    """
    mode = config.memory
    if mode == "auto":  # all ranks recompute the same layers
        mode = max(everywhere(choose(model, config)), key=MODES.index)
    every = RECOMPUTE_EVERY.get(mode)
    layers = list(model.get_decoder().layers)[::every] if every else []
    recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    fix = f"run the same with `memory='low'` (now {mode}) to resume"
    with ExitStack() as stack:
        if mode != "low":
            stack.enter_context(memory_errors(config.device, fix))
        for layer in layers:
            stack.enter_context(patched(layer, partial(recomputed, layer.forward)))
        yield mode


def choose(model: PreTrainedModel, config: PruneConfig | RecoverConfig) -> MemoryMode:
    """The fastest mode that fits in free GPU memory, "low" if none does; "fast" on a CPU."""
    if model.device.type != "cuda":
        return "fast"
    gpus = [str(device_of(layer)) for layer in model.get_decoder().layers]
    free = {gpu: USABLE * free_memory(gpu) for gpu in (str(model.device), *gpus)}
    header = of_model(model)
    for mode in MODES[:-1]:
        of_layers, beside = _needed(model, header, config, mode)
        part = of_layers / len(gpus)
        if all(gpus.count(gpu) * part + beside <= free[gpu] for gpu in free):
            return mode
    return MODES[-1]


def _needed(
    model: PreTrainedModel, header: Header, config: PruneConfig | RecoverConfig, mode: MemoryMode
) -> tuple[int, int]:
    """Estimated bytes that learning takes besides the weights, which are there already.

    Those of all decoder layers together, and others.
    """
    if isinstance(config, RecoverConfig):  # weights that learn are wider than what is computed
        learned = OPTIMISER * learned_values(header, config.lora_rank)
        width = 2 if config.dtype == "bf16" else 4
        return learned, saved_activations(config, header, mode, width)
    tokens, width = config.batch_size * config.seq_len, model.dtype.itemsize
    memory = learning_memory(header, tokens, config.seq_len, width, mode, config.scales)
    return memory.activations, memory.workspace + memory.gates
