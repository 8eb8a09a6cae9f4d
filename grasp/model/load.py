"""Load the MODEL of the command line: its weights and its tokenizer, on the chosen device."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grasp.distributed import join, launched, local_rank, rank, ranks
from grasp.errors import GraspError, reason
from grasp.model.source import (
    TOKENIZERS,
    Source,
    check_readable,
    hub_answers,
    quantisation,
    read_config,
    resolve,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grasp.model.places import Places

ShardMode = Literal["none", "node", "full"]
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
LOADER = "transformers.modeling_utils"
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def load(
    spec: str | os.PathLike[str],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model or pruned checkpoint and its tokenizer, in bf16 on a GPU and fp32 on a CPU."""
    device = pick_device(device)
    dtype = torch_dtype(pick_dtype("auto", device))
    return load_model(spec, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def load_model(
    spec: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None,
    device: Places = "cpu",
    trust_remote_code: bool = False,
    shard: ShardMode = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be pruned or evaluated.

    The model is frozen and in eval mode, in `dtype` (None: as stored) on `device` (see
    `pick_device` and `Places`). It uses SDPA attention, or eager if it has a softcap. A GGUF model
    is dequantised (to fp32 if `dtype` is None) and gets the plain config of its family. Other
    weights must be safetensors. A checkpoint's own code runs only with `trust_remote_code`. `shard`
    other than "none" splits the weights over ranks (see `load_sharded`). Raises GraspError.
    """
    source = resolve(spec)
    check_readable(source)
    device = pick_device(device) if isinstance(device, str) else device

    import torch

    import grasp.model.modeling_grasp  # noqa: F401  registers the classes of pruned models

    model: Any  # from_pretrained and .to lose their types in decorators
    try:
        with quiet():
            if source.kind == "gguf":
                from grasp.model.gguf import load_gguf

                model, tokenizer = load_gguf(Path(source.location), dtype or torch.float32)
            elif shard != "none":
                own = str(device)
                model, tokenizer = _load_shards(source, shard, dtype, own, trust_remote_code)
            else:
                model, tokenizer = _load_safetensors(source, dtype, device, trust_remote_code)
    except GraspError:
        raise
    except Exception as error:  # a damaged or foreign checkpoint may raise anything
        kind = None if source.kind == "gguf" else quantisation(read_config(source))
        which = f", which is quantised ({kind})" if kind else ""
        raise GraspError(f"cannot load {os.fspath(spec)}{which}: {reason(error)}") from error
    _untie_if_it_has_a_head(model)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's, rounded in a narrow dtype
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    model = model if shard != "none" else move(model, device)
    return model.eval().requires_grad_(False), tokenizer


@contextlib.contextmanager
def packed_errors(name: str, model: Any) -> Iterator[None]:
    """Turn an error of the library that runs quantised weights into one line.

    Errors of models that are not quantised pass through unchanged.
    """
    kind = quantisation(model.config.to_dict())
    try:
        yield
    except GraspError:
        raise
    except Exception as error:
        if kind is None:
            raise
        raise GraspError(
            f"{name} is quantised ({kind}), and cannot be run here: {reason(error)}"
        ) from error


def _untie_if_it_has_a_head(model: Any) -> None:
    """Set `tie_word_embeddings` to match the weights, so that saving keeps a separate head."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def auto_class(config: Any) -> Any:
    """The Auto class that loads the whole of a model: text alone, or what sees images too."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    sees = config.get_text_config() is not config and (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        or "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    )
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def longest(model: PreTrainedModel) -> int:
    """The longest sequence that a model accepts, in tokens."""
    text: Any = model.config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or sys.maxsize


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the dtype of the parameters in place, and of nothing else.

    Parameters that the model's class keeps in fp32, such as some routers', stay in fp32.
    `model.to(dtype)` would also round the rotary frequencies, which are fp32 in a loaded model. The
    model would then compute something else than after saving and loading.
    """
    import torch

    wide = "|".join(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        own = torch.float32 if wide and re.search(rf"(^|\.)({wide})($|\.)", name) else dtype
        if parameter.dtype != own:
            parameter.data = parameter.data.to(own)
    return model


@contextlib.contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters are in `dtype`, which holds the stored values exactly, within the context."""
    stored = [parameter.dtype for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, own in zip(model.parameters(), stored, strict=True):
            if parameter.dtype != own:
                parameter.data = parameter.data.to(own)


def move(model: Any, device: Places) -> PreTrainedModel:
    """Move a model, in place, to one device or to several places."""
    if isinstance(device, str):
        model.to(device)
    else:
        from grasp.model.places import place

        place(model, device)
    moved: PreTrainedModel = model
    return moved


def pick_dtype(dtype: Literal["auto", "fp32", "bf16"], device: str) -> Literal["fp32", "bf16"]:
    """`dtype`; "auto" is bf16 on a GPU and fp32 on a CPU, where many compute bf16 far slower."""
    if dtype == "auto":
        return "fp32" if device == "cpu" else "bf16"
    return dtype


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that our option names: fp32 or bf16."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def check_launched(shard: ShardMode) -> None:
    """Raise GraspError if weights are to be split over ranks, and torchrun has started none."""
    if shard != "none" and not launched():
        raise GraspError(f"`shard={shard!r}` splits the weights over ranks: start it with torchrun")


def check_device(device: str) -> None:
    """Raise GraspError if `device` cannot be the name of a device; needs no torch."""
    if not DEVICE.fullmatch(device):
        raise GraspError(f"`device` must be cpu, cuda, cuda:1 or auto, got {device!r}")


def pick_device(device: str) -> str:
    """The name of a usable torch device; "auto" is a GPU if there is one. Raises GraspError."""
    check_device(device)
    join()  # which chooses the GPU of a rank

    import torch

    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    asked = torch.device(device)
    if asked.type == "cuda" and ranks() > 1:
        _check_gpu_of_rank(asked.index, gpus)
    if asked.type == "cuda" and (asked.index or 0) >= gpus:
        raise GraspError(
            f"device {device} asked for, but torch {torch.__version__} sees {gpus or 'no'} GPU"
        )
    if asked.type == "cpu":
        return "cpu"
    if (capability := torch.cuda.get_device_capability(asked)) < (8, 0):
        raise GraspError(
            f"{torch.cuda.get_device_name(asked)} has compute capability "
            f"{'.'.join(map(str, capability))}, the kernels need 8.0 or newer: use `device='cpu'`"
        )
    return device


def _check_gpu_of_rank(asked: int | None, gpus: int) -> None:
    """Raise GraspError unless each rank of this machine has a GPU of its own."""
    if asked not in (None, local_rank()):  # its own is where its model lies
        raise GraspError(
            f"`device` must be cuda under torchrun, which gives each rank its own GPU, got "
            f"cuda:{asked}"
        )
    if local_rank() >= gpus:
        raise GraspError(
            f"rank {rank()} has no GPU: this machine has {gpus}: start as many processes, or use "
            "`device='cpu'`"
        )


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU behind `device`, by which math libraries choose kernels."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # `platform` does not know it on Linux
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """All that must be equal for two runs of one model to agree bit for bit."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "processor": processor(device),
        "threads": str(torch.get_num_threads()),
    }


def _load_safetensors(
    source: Source, dtype: torch.dtype | None, device: Places, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from grasp.model.places import device_map

    location = source.location
    options = {"trust_remote_code": trust_remote_code}
    if source.kind == "hub":
        options["local_files_only"] = not hub_answers()
    config = AutoConfig.from_pretrained(location, **options)
    auto, places = auto_class(config), None
    if not isinstance(device, str):  # each part is read where it belongs, not by the host first
        with init_empty_weights():
            empty = auto.from_config(config, trust_remote_code=trust_remote_code)
        places = device_map(empty, device)
    model, loading = auto.from_pretrained(
        location,
        dtype=dtype or "auto",
        use_safetensors=True,
        output_loading_info=True,
        device_map=places,
        **options,
    )
    check_names(location, loading["missing_keys"], loading["unexpected_keys"])
    if (usual := usual_attention(model)) != model.config._attn_implementation:
        model.set_attn_implementation(usual)
    return model, _tokenizer(location, **options)


def check_names(
    location: str | Path, lacking: Collection[str], unused: Collection[str], fix: str = ""
) -> None:
    """Raise GraspError where transformers would use random weights, or leave some out."""
    for problem, names in (("lack", lacking), ("hold, unused by it,", unused)):
        if names:
            raise GraspError(
                f"{location} is not the model that its config.json describes: its weights "
                f"{problem} {min(names)} ({len(names)} such tensors): get both from one place{fix}"
            )


def usual_attention(model: PreTrainedModel) -> str:
    """The attention that a loaded model has: SDPA where that computes the same."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    # older releases use SDPA without the softcap
    return "eager" if capped or not model._supports_sdpa else "sdpa"


def _load_shards(
    source: Source,
    shard: ShardMode,
    dtype: torch.dtype | None,
    device: str,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from huggingface_hub import snapshot_download

    from grasp.model.sharding import load_sharded

    folder = source.location
    if source.kind == "hub":
        files = ["*.json", "*.safetensors", "*.jinja", *TOKENIZERS, *["*.py"] * trust_remote_code]
        folder = snapshot_download(
            folder,
            allow_patterns=files,
            ignore_patterns=["consolidated*", "original/*"],  # the same weights once more
            local_files_only=not hub_answers(),
        )
    own = {"trust_remote_code": trust_remote_code}
    return load_sharded(Path(folder), shard, dtype, device, **own), _tokenizer(folder, **own)


def _tokenizer(location: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:
        raise GraspError(f"cannot read the tokenizer of {location}: {reason(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its table of missing weights, which we report."""
    from transformers.utils import logging

    bars, report = logging.is_progress_bar_enabled(), logging.get_logger(LOADER)
    logging.disable_progress_bar()
    report.disabled = True
    try:
        yield
    finally:
        report.disabled = False
        if bars:
            logging.enable_progress_bar()
