"""Conversion of checkpoints: import, export and verification, a tensor at a time.

`importer`, `exporter` and `verify` have the functions to call. `source` opens a checkpoint in any format. `mapping` has
one table of weights per model family and turns it into rules between Hugging Face tensors and Megatron tensors.
`huggingface` and `megatron` read and write the formats.
"""
