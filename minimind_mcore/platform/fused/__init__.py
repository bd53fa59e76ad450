"""Fused operations in torch, in place of those of Apex and Transformer Engine.

Without these two megatron-core runs each operation of a chain by itself, and autograd keeps and copies what lies
between. Here a chain is one node of autograd's graph. `platform/patches.py` puts the operations where megatron-core
looks for the fused ones. Results differ from those of the unfused chains in the order of additions only.
"""
