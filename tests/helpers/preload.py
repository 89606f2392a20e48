"""Imports of the fork server, from which the ranks of all tests are forked."""

import gc

from megatron_cpt.backend import cpu

cpu.install()

import torch._dynamo  # noqa: E402, F401 - every optimizer imports it, which takes more than a second per rank

import megatron_cpt.hooks.console  # noqa: E402
import megatron_cpt.hooks.jsonl_files  # noqa: E402
import megatron_cpt.train.trainer  # noqa: E402, F401

gc.collect()
gc.freeze()  # megatron-core collects garbage in every save; skip the imported objects
