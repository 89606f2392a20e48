"""Checkpoints that are made of other checkpoints."""
