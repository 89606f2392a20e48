"""Streams of samples, and the micro-batches that each rank makes of them."""
