r"""A plug-in for vLLM (experimental): the method that you evaluated is the one that serves.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides \
        '{"architectures": ["VlmslimLlavaForConditionalGeneration"], "vlmslim": {"method": "divprune", "keep": 64}}'

vLLM finds it by the entry point "vllm.general_plugins". Stock architectures stay stock: a checkpoint is compressed only
where its architecture is given as one of `ARCHITECTURES`. This module and `vlmslim.vllm.plan` work without vLLM.
"""

from typing import Any

from vlmslim.vllm.plan import ARCHITECTURES, overrides

__all__ = ["ARCHITECTURES", "overrides", "register"]


def register() -> None:
    """Tell vLLM the new architectures. vLLM calls this in each of its processes, perhaps more than once."""
    from vllm import ModelRegistry

    known: Any = ModelRegistry.get_supported_archs()
    for architecture, model in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"vlmslim.vllm.models:{model}")
