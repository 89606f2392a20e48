"""Hugging Face folders: config.json, safetensors and pickled weights."""
