"""Fused operations in plain torch, which replace those of Apex and Transformer Engine.

Without Apex or Transformer Engine, megatron-core runs each operation separately, and autograd stores the intermediate
tensors. Here a chain of operations is one node of the autograd graph. `platform/patches.py` installs the operations
where megatron-core looks for fused ones. Results differ from the unfused chains only in the order of additions.
"""
