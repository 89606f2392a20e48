"""Reading and writing Megatron's indexed datasets (.bin and .idx)."""
