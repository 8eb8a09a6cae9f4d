"""Plugin that lets vLLM run pruned checkpoints without their remote code.

vLLM finds `register` by its entry point (group vllm.general_plugins in pyproject.toml) and calls it
in each of its processes. vLLM's Transformers backend then runs the layers from transformers.
"""

from __future__ import annotations

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register our architectures with vLLM; calling this repeatedly is safe."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    import grasp.model.modeling_grasp  # noqa: F401  derives a class when its config is read

    for name in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        ModelRegistry.register_model(f"Grasp{name}", BACKEND)
