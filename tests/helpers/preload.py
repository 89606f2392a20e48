"""What the fork server imports once, so that every rank of every test starts with it."""

import gc

from megatron_cpt.backend import cpu

cpu.install()

import torch._dynamo  # noqa: E402, F401 - every optimizer loads it, which takes each rank more than a second

import megatron_cpt.hooks.console  # noqa: E402
import megatron_cpt.hooks.metrics_file  # noqa: E402
import megatron_cpt.train.trainer  # noqa: E402, F401

gc.collect()
gc.freeze()  # megatron-core collects garbage in every save: what was imported here need not be looked through again
