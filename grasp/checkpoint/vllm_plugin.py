"""Plugin that lets vLLM run pruned checkpoints without their remote code.

vLLM finds `register` by its entry point (group vllm.general_plugins in pyproject.toml) and calls it
in each of its processes. vLLM's Transformers backend then runs the layers from transformers.
"""

from __future__ import annotations

from grasp.model.modeling_grasp import FAMILIES

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register our architectures with vLLM; calling this repeatedly is safe."""
    from vllm import ModelRegistry

    for _, _, causal_class in FAMILIES.values():
        ModelRegistry.register_model(causal_class.__name__, BACKEND)
