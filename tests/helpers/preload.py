"""Imports of the fork server, from which the ranks and commands of all tests are forked."""
# ruff: noqa: E402, F401

import gc

from megatron_cpt.backend import cpu

cpu.install()

import psutil
import pytest  # imported by the module of every test, which each rank imports
import torch._dynamo  # imported by every optimizer, for more than a second
from megatron.core.dist_checkpointing.strategies import torch as _strategies
from rich import _emoji_codes

import megatron_cpt.checkpoint.loading.load
import megatron_cpt.checkpoint.saving.saver
import megatron_cpt.cli
import megatron_cpt.hooks.console
import megatron_cpt.hooks.event_log
import megatron_cpt.hooks.jsonl_files
import megatron_cpt.hooks.report_page
import megatron_cpt.model.build_model
import megatron_cpt.optim.update
import megatron_cpt.train.open_data
import megatron_cpt.train.setup
import megatron_cpt.train.trainer
import megatron_cpt.train.validation
import megatron_cpt.views.preflight_table
import tests.helpers.checkpoints
import tests.helpers.runs

gc.collect()
gc.freeze()  # megatron-core collects garbage in every save; skip the imported objects
