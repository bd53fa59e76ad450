"""The native training engine on megatron-core."""
