"""Merging and splitting datasets."""
