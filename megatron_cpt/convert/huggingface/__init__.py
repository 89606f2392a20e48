"""Hugging Face folders: config.json, safetensors shards and pickled weights."""
