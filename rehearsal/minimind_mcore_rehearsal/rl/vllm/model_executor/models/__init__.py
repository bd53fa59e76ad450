from typing import ClassVar

from .qwen3 import LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM


class ModelRegistry:
    models: ClassVar = {cls.__name__: cls for cls in (LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM)}

    @classmethod
    def get_supported_archs(cls) -> list[str]:
        return list(cls.models)
