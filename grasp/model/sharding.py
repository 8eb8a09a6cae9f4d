"""Weights that no rank holds whole: PyTorch's FSDP2, a decoder layer per group, frozen.

Matrices are sharded by their rows: those of decoder layers, the embedding and the head. Norms and
biases are on every rank, and so are gates and scales. A layer's matrices are gathered when the
layer is called, so what runs through `layer(...)` sees plain tensors there: gates, scales,
checkpointing.

The embedding and the head may share a weight, which FSDP2 would keep gathered from the one to the
other, so they have no group: each is a DTensor, gathered while its module runs.

What changes weights gets one layer at a time, as a plain model of one layer (`one_layer`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from grasp import distributed
from grasp.errors import GraspError
from grasp.model.load import ShardMode, check_names, usual_attention
from grasp.model.stored import Stored, has_own_head, stored_tensors

_TEMPLATES: WeakKeyDictionary[PreTrainedModel, _Template] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Template:
    """A model without weights, before it was sharded, and its decoder layers."""

    model: PreTrainedModel
    layers: list[nn.Module]


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether `load_sharded` has made this model."""
    return model in _TEMPLATES


def load_sharded(
    folder: Path, mode: ShardMode, dtype: torch.dtype | None, device: str, **options: Any
) -> PreTrainedModel:
    """Load a model of which each rank reads its rows only; `dtype` None means as stored.

    "full" splits the rows over all ranks, "node" over those of each machine. Raises GraspError.
    """
    from torch.distributed.fsdp import fully_shard

    config = AutoConfig.from_pretrained(folder, **options)
    if has_own_head(folder):
        config.tie_word_embeddings = False
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, **options
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.set_attn_implementation(usual_attention(model))
    model.tie_weights()  # which the context has undone
    model.requires_grad_(False)
    decoder = model.get_decoder()
    template = copy.deepcopy(model)
    _TEMPLATES[model] = _Template(template, list(template.get_decoder().layers))
    mesh = _mesh(mode, torch.device(device).type)
    if config.get_text_config() is not config or any(p.dim() > 2 for p in decoder.parameters()):
        raise GraspError(
            f"{folder} is no plain decoder, and `shard` splits nothing else: use `shard='none'`"
        )
    _shard_ends(model, mesh)
    matrices = {p for p in decoder.layers.parameters() if p.dim() == 2}
    others = {*model.parameters()} - matrices
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)
    fully_shard(decoder, mesh=mesh, ignored_params=others)  # the root: layers share its streams
    # gathers the next layer while one runs, and never holds a third, as FSDP2 does left to itself
    for layer, following in pairwise(decoder.layers):
        layer.set_modules_to_forward_prefetch([following])
    decoder._set_unshard_async_op(True)
    _read(model, folder, torch.device(device))
    return model


def _shard_ends(model: PreTrainedModel, mesh: Any) -> None:
    """Split the embedding and the head by their rows, and gather each while its module runs."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    parts: dict[Tensor, nn.Parameter] = {}  # a shared weight stays shared
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        weight = module.weight
        if weight not in parts:
            part = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            parts[weight] = nn.Parameter(part, requires_grad=False)
        module.weight = parts[weight]
        _gather_in_calls(module)


def _gather_in_calls(module: nn.Module) -> None:
    """Between calls, `module` holds its part of the weight only."""
    held: list[nn.Parameter] = []

    def gather(module: Any, _: Any) -> None:
        held.append(module.weight)
        module.weight = nn.Parameter(whole(module.weight), requires_grad=False)

    def part(module: Any, *_: Any) -> None:
        module.weight = held.pop()

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(part, always_call=True)


def _mesh(mode: ShardMode, device: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if mode == "full":
        return init_device_mesh(device, (distributed.ranks(),))
    own = distributed.local_ranks()
    sizes = distributed.ranks() // own, own
    return init_device_mesh(device, sizes, mesh_dim_names=("machines", "ranks"))


def _read(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Give each parameter and buffer its stored values, or this rank's rows of them."""
    stored, tensors = stored_tensors(folder), model.state_dict()
    own = tensors.keys() & {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    unused = model._keys_to_ignore_on_load_unexpected or []
    known = tensors.keys() | {n for n in stored if any(re.search(key, n) for key in unused)}
    fix = ", or use `shard='none'`"
    check_names(folder, own - stored.keys(), stored.keys() - known, fix)
    values = {name: _values(tensors[name], name, stored[name], device) for name in own}
    model.load_state_dict(values, assign=True, strict=False)
    model.tie_weights()
    model.requires_grad_(False)


def _values(tensor: Tensor, name: str, stored: Stored, device: torch.device) -> Tensor:
    from torch.distributed.tensor import DTensor

    with safe_open(stored.file, framework="pt") as file:
        rows = file.get_slice(name)
        if not isinstance(tensor, DTensor):
            return rows[:].to(device, tensor.dtype, copy=True)
        mesh, of = tensor.device_mesh, len(tensor)
        dim = next(i for i, p in enumerate(tensor.placements) if p.is_shard())
        each = -(-of // mesh.size(dim))  # the last ranks may have fewer, or none
        first = min(mesh.get_local_rank(dim) * each, of)
        own = rows[first : min(first + each, of)].to(device, tensor.dtype, copy=True)
    return DTensor.from_local(
        own,
        mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def free(model: PreTrainedModel) -> None:
    """Give up the shards of a model, even if references to it remain."""
    for parameter in model.parameters():
        own_part(parameter).untyped_storage().resize_(0)


def own_part(parameter: Tensor) -> Tensor:
    """The values of a parameter that this rank holds."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def whole(parameter: Tensor) -> Tensor:
    """All values of a parameter; if it is sharded, gathered by all ranks at once."""
    full: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full


@torch.no_grad()
def one_layer(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """A decoder layer as a plain model of one layer, with weights of its own; on all ranks at once.

    Its embeddings and head have no weights. It is valid until the next call.
    """
    template = _TEMPLATES[model]
    layer: Any = copy.deepcopy(template.layers[index])
    own: Any = model.get_decoder().layers[index]
    values = {
        name: p.clone() if own_part(p) is p else whole(p) for name, p in own.named_parameters()
    }
    layer.load_state_dict(values, assign=True, strict=False)
    layer.to(next(own.parameters()).device)  # its buffers
    template.model.get_decoder().layers = nn.ModuleList([layer])
    return template.model.eval().requires_grad_(False)


def whole_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Each decoder layer with weights of its own, valid until the next; on all ranks at once."""
    for index in range(len(model.get_decoder().layers)):
        yield one_layer(model, index).get_decoder().layers[0]
