"""What the fork server imports once, so that every rank of every test starts with it."""

from megatron_cpt.backend import cpu

cpu.install()

import megatron_cpt.hooks.console  # noqa: E402
import megatron_cpt.hooks.metrics_file  # noqa: E402
import megatron_cpt.train.loop  # noqa: E402, F401
