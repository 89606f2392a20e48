"""Validation and statistics of datasets."""
