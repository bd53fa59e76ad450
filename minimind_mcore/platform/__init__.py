"""Where a model runs: the device, a CPU as megatron-core's device, fused operations, changes to megatron-core."""
