"""Files that a run or a checkpoint consists of, which no other command may replace."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.checkpoint import layout
from megatron_cpt.errors import UserError
from megatron_cpt.files.whole_io import is_regular_file
from megatron_cpt.provenance.plans_file import FILE_NAME as PLANS_FILE
from megatron_cpt.provenance.run_history import ANOMALIES_FILE, EVENTS_FILE, METRICS_FILE

RUN_RECORDS = (layout.RUN_FILE, layout.PLAN_FILE, METRICS_FILE, ANOMALIES_FILE, EVENTS_FILE, PLANS_FILE)


def refuse_run_file(option: str, output: Path) -> None:
    """Raise UserError if an output would replace a file of a run or of a checkpoint.

    Args:
        option: the option that names the output, for the message.
    """
    if layout.is_checkpoint(output.parent) or (output.name in RUN_RECORDS and is_regular_file(output)):
        raise UserError(f"{option} {output}: would replace a file of a run or a checkpoint; choose another name")
