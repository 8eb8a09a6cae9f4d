"""The plugin by which vLLM runs pruned checkpoints without their remote code.

vLLM finds `register` by its entry point (group vllm.general_plugins in pyproject.toml) and calls it
in each of its processes. Layers then come from transformers through vLLM's Transformers backend.
"""

from __future__ import annotations

from grasp.model.modeling_grasp import FAMILIES

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Name our architectures to vLLM; to be called any number of times."""
    from vllm import ModelRegistry

    for _, _, causal_class in FAMILIES.values():
        ModelRegistry.register_model(causal_class.__name__, BACKEND)
