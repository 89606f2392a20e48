"""Megatron's indexed datasets (.bin and .idx): reading, writing and caching."""
