"""MiniMind language models on Megatron-Core: one kit for CPU, CUDA and Ascend."""

__version__ = "0.1.0"
