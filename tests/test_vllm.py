"""Checkpoints have what vLLM's Transformers backend reads, and the plugin registers them.

vLLM itself is not installed here: tests/served runs it.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import FAMILIES, brought_model
from test_checkpoint import IDS, UNEVEN, pruned, save
from test_structure import random_mask
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grasp.compress.fold import fold
from grasp.model.modeling_grasp import classes_of
from grasp.model.units import UnitSpace
from grasp.planning.plan import plan


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_says_its_heads(family, tmp_path, monkeypatch):
    """An attention function that is set in the config, as vLLM's is, sees every layer's own."""
    model, mask = pruned(family, UNEVEN)
    save(model, mask, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    layers = [(own.num_attention_heads, own.num_key_value_heads) for own in config.per_layer_config]
    assert config.is_heterogeneous and layers == [(2 * kv, kv) for _, kv in UNEVEN]
    assert (config.num_hidden_layers, config.head_dim) == (3, 16)

    seen = {}

    def attend(module, query, key, value, *_rest, **_options):
        seen[module.layer_idx] = (query.shape[1], key.shape[1])
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "theirs", attend)
    config._attn_implementation = "theirs"
    decoder = AutoModel.from_config(config)
    decoder(IDS, use_cache=False)
    assert [seen[i] for i in range(3)] == layers
    assert decoder.is_backend_compatible()
    assert decoder.tp_plan == model.model.tp_plan != {}


@pytest.mark.parametrize("name", ["falcon-h1", "qwen3.5"])
def test_layers_with_states_are_refused_where_none_are_kept(name, tmp_path):
    """Falcon-H1 has attention in every layer, so that vLLM itself misses the mixer beside it."""
    model = brought_model(name)
    model.config.save_pretrained(tmp_path)
    (vllm,) = (r for r in plan(str(tmp_path), seq_len=64).runtimes if r.name.startswith("vLLM"))
    assert not vllm.loads and "keys and values only" in vllm.why
    config = fold(model, random_mask(UnitSpace.of(model))).config
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"^vLLM's Transformers backend keeps no states"):
        AutoModel.from_config(config)


def test_the_plugin_names_every_class(monkeypatch):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    group = "vllm.general_plugins"
    (plugin,) = re.findall(
        rf'^\[project.entry-points."{group}"\]\ngrasp = "(.+)"$', project, re.MULTILINE
    )
    named = {}
    registry = SimpleNamespace(register_model=named.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    register = EntryPoint("grasp", plugin, group).load()
    register()
    register()  # vLLM calls it in every process
    classes = {family: classes_of(family) for family in (*FAMILIES, "granite", "olmo2")}
    assert named.keys() >= {c.autos[AutoModelForCausalLM].__name__ for c in classes.values()}
    (backend,) = set(named.values())
    assert backend == "vllm.model_executor.models.transformers:TransformersForCausalLM"
    for found in classes.values():
        assert AutoModel._model_mapping[found.config] is found.autos[AutoModel]
