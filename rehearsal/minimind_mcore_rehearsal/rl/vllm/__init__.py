"""A small generator in the place of vLLM 0.11, as MindSpeed-RL uses it: external launcher, dummy weights.

Its models have vLLM's class names and parameter names, whole or in tensor-parallel shards. The weights come from
MindSpeed-RL's resharding. It has no KV cache: for each token it runs the model on the whole sequence.
"""

from .engine import LLM, RequestOutput, SamplingParams

__version__ = "0.11.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams"]
