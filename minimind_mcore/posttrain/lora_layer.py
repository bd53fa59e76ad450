"""The LoRA layer of peft around Megatron's parallel linear layers. Imports megatron-core and peft."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from peft import LoraConfig
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import Tensor


class ParallelLora(LoraParallelLinear):
    """peft's LoRA layer, changed for Megatron's linear layers.

    peft's own layer (0.17 to 0.21) expects a tensor from a parallel layer, which returns a pair (output, bias). It
    changes the dtype in a config that it shares with the whole model, initializes each rank's shard separately, and
    ignores that under sequence parallelism a rank has only some of the tokens.
    """

    def __init__(self, base_layer: MegatronModule, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        own = copy.copy(base_layer.config)
        super().__init__(base_layer, adapter_name, config, tensor_parallel, megatron_config=own, **options)
        whole: Any = (self.lora_B if self.is_parallel_a else self.lora_A)[adapter_name]
        # The attribute makes Megatron sum the gradients over the ranks.
        whole.weight.sequence_parallel = own.sequence_parallel

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Map [sequence, batch, in / TP or in] to [sequence, batch, out or out / TP], and return the base's bias."""
        result, bias = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            first: Any = self.lora_A[name]
            change = _output(self.lora_B[name](_output(first(x.to(first.weight.dtype)))))
            result = result + (change * self.scaling[name]).to(result.dtype)
        return result, bias


def _output(returned: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned
