"""Tokenizers by `KIND:PATH`, and their fast counterparts."""
