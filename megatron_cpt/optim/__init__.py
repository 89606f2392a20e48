"""The megatron-core optimizer and its parameter groups."""
