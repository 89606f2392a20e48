"""Imports of the trainer and megatron-core; a machine without CUDA needs torch patched first."""

# ruff: noqa: E402, F401
from megatron_cpt.backend import cpu

cpu.install()

import megatron_cpt.train.setup
import megatron_cpt.train.trainer
