"""Provenance: the documents that a step has read, and the plans a run has followed. Imports no torch."""
