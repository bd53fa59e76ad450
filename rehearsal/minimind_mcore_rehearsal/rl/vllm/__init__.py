"""A stand-in for vLLM 0.11 with the part of its interface that MindSpeed-RL uses.

It supports only the external launcher and dummy weights, which MindSpeed-RL's resharding then overwrites. The models
have vLLM's class names and parameter names, whole or in tensor-parallel shards. There is no KV cache: for each token
the model runs on the whole sequence.
"""

from .engine import LLM, RequestOutput, SamplingParams

__version__ = "0.11.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams"]
