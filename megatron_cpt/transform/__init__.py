"""Checkpoints from checkpoints, with proof."""
