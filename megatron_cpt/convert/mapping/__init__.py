"""Rules that turn Hugging Face tensors into Megatron tensors and back."""
