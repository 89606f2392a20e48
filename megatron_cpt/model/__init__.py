"""Config -> megatron-core GPT. Install the CPU backend before importing this package where CUDA is missing."""
