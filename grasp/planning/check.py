"""Early checks of the options, the file system and a config.json, without torch.

`plan` and every verb that works on a model run these checks first, so that a mistake is reported at
once and a plan describes a run that is possible.
"""

from __future__ import annotations

from collections.abc import Sequence

from grasp import criteria
from grasp.config import PruneConfig, RunConfig, SparsifyConfig
from grasp.data.parts import find_parts
from grasp.data.reading import find_source
from grasp.errors import GraspError
from grasp.model.header import Header, read_header
from grasp.model.load import ShardMode, check_device
from grasp.model.source import check_readable, read_config, resolve
from grasp.planning.layouts import check_layout


def check(config: RunConfig) -> Header:
    """Check what `config` asks for, and return the header of the model that it names.

    Raises GraspError: a missing text, a model that is not supported or is quantised, a sequence
    longer than it accepts, a budget or layout that it cannot meet.
    """
    find_parts(config.calibration, config.samples)
    for text in config.eval_text:
        find_source(text, "test")
    header = read_header(config.model)
    check_plain(config.model, header)
    check_fit(config, header)
    return header


def check_fit(config: RunConfig, header: Header) -> None:
    """Raise GraspError if the model of `header` cannot meet the options of `config`."""
    if header.longest is not None and config.seq_len > header.longest:
        raise GraspError(
            f"`seq_len` must be at most {header.longest} for this model, got {config.seq_len}"
        )
    if isinstance(config, SparsifyConfig) and config.shard != "none":
        _check_splits(config.model, config.shard, header)
    if not isinstance(config, PruneConfig):
        return
    _check_method(config.method, header)
    if config.shard != "none":
        check_shard(config, header)
    biased = config.compensation == "bias"
    if biased and not header.facts.carries_biases:
        raise GraspError(
            f"`compensate='bias'` needs a class with biases in o_proj and down_proj, and "
            f"{header.family} has none (llama has): use `compensate='blocks'`"
        )
    config.budget.check_multiples(header.space)
    config.budget.check_protected(header.space)
    check_layout(header, config.budget, biased=biased)
    config.budget.limit(header.space)


def _check_method(method: str, header: Header) -> None:
    """Raise GraspError if a criterion does not score what this model has."""
    mixture = bool(header.space.experts)
    if not criteria.suits(method, mixture=mixture):
        others = [n for n in criteria.names() if criteria.suits(n, mixture=mixture)]
        what = "does not score experts" if mixture else "scores experts, and this model has none"
        raise GraspError(f"`method={method!r}` {what}: use one of {', '.join(others)}")


def check_shard(config: PruneConfig, header: Header) -> None:
    """Raise GraspError if ranks cannot hold the weights in parts: for what needs them whole."""
    shard = f"`shard={config.shard!r}`"
    able = [name for name in criteria.names() if criteria.get(name).shardable]
    if config.method not in able:
        raise GraspError(
            f"{shard} is for methods that read no weights ({', '.join(able)}), got {config.method}"
        )
    if config.compensation == "bias":
        raise GraspError(f"{shard} has no `compensate='bias'`: use `compensate='blocks'`")
    _check_splits(config.model, config.shard, header)


def _check_splits(model: str, mode: ShardMode, header: Header) -> None:
    """Raise GraspError if the weights of `model` cannot be split over ranks."""
    shard = f"`shard={mode!r}`"
    if header.config is None:
        raise GraspError(f"{shard} reads safetensors, got {model}: name the original folder")
    if header.space.experts or header.config.get("text_config"):
        kind = "a mixture of experts" if header.space.experts else "more than a text model"
        raise GraspError(
            f"{shard} splits plain decoders, and {model} is {kind}: use `shard='none'`"
        )
    check_plain(model, header, "split")


def check_plain(model: str, header: Header, done: str = "cut") -> None:
    """Raise GraspError if the weights are quantised."""
    if header.quantised:
        raise GraspError(
            f"{model} is quantised ({header.quantised}), and its weights cannot be {done}: name "
            "the original checkpoint"
        )


def check_export(model: str) -> None:
    """Raise GraspError if the model cannot be loaded or cannot be converted."""
    check_readable(resolve(model))
    check_plain(model, read_header(model), "converted")


def check_reading(
    model: str,
    *,
    texts: Sequence[str] = (),
    seq_len: int | None = None,
    device: str = "auto",
    shard: ShardMode = "none",
) -> None:
    """Raise GraspError if the model, a text, the sequence length or the device cannot be used.

    Or if ranks cannot hold the model in parts, with `shard` other than "none".
    """
    check_device(device)
    for text in texts:  # first, because looking up a model on the hub takes seconds
        find_source(text, "test")
    source = resolve(model)
    check_readable(source)
    if shard != "none":
        _check_splits(model, shard, read_header(model))
    longest = None if source.kind == "gguf" else read_config(source).get("max_position_embeddings")
    if seq_len is not None and not 2 <= seq_len <= (longest or seq_len):
        expected = f"between 2 and {longest}" if longest else "at least 2"
        raise GraspError(f"`seq_len` must be {expected} for this model, got {seq_len}")
