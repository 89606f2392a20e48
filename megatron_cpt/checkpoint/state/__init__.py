"""The run's tensors as megatron-core's sharded state dicts."""
