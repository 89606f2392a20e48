"""Verified checkpoints: layout, manifest, save, load, preflight."""
