"""What Megatron takes from Apex and Transformer Engine, in torch: chains of operations as one.

megatron-core without those two computes each chain an operation at a time, and autograd keeps and
copies what lies between. Here a chain is one node of the graph that passes over memory as often as it
must; `install` puts them where megatron-core looks for the fused ones. The results are those of the
unfused chains but for the order of additions.
"""
