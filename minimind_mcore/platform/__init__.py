"""Devices: detection, the CPU as megatron-core's device, fused operations, patches of megatron-core."""
