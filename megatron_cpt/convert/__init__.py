"""Checkpoints of other projects <-> ours: one declarative table a family, a tensor at a time.

The Hugging Face side: `safetensors_folder.HfFolder` reads, `hf_writer.HfWriter` writes, `families` know config.json and
the table of weights, `mapping.resolve` turns a table into rules between Hugging Face tensors and the global tensors of
Megatron.
"""
