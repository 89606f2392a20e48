"""Atomic writes, JSONL logs, checksums and object stores; knows nothing of training."""
