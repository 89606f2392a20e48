"""Finished runs of other experiments that an arm need not train again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import read_run
from megatron_cpt.config import RunConfig
from megatron_cpt.experiment.input_fingerprints import InputFingerprints, changed_inputs
from megatron_cpt.experiment.result_file import RESULT_FILE, read_result_file
from megatron_cpt.files.whole_io import exists
from megatron_cpt.report.run_digests import differences


def find_equal_run(config: RunConfig, folders: Sequence[str], fingerprints: InputFingerprints) -> RunConfig | None:
    """Return the configuration of a finished run that differs in name and output only; None: there is none.

    Args:
        folders: outputs of other experiments.
        fingerprints: of the present files; a run that read others is not equal.

    Raises:
        RefusedError: a run of the same seed is damaged.
    """
    for folder in folders:
        for path in sorted(Path(folder).glob(f"*/seed-{config.seed}/{RESULT_FILE}")):
            if not exists(path.parent / layout.RUN_FILE):
                continue
            run = read_run(path.parent)
            other = config.model_copy(update={"name": run.get("name"), "output": str(path.parent)})
            if not differences([run, other.to_dict()]) and not changed_inputs(
                read_result_file(path).inputs, fingerprints.of_run(config)
            ):
                return other
    return None
