"""Continued pretraining on megatron-core: two phases of data, one falling learning rate."""

__version__ = "0.1.0"
