"""Files of a run beside data and checkpoints: its tokenizer, and run.yaml, plan.json and plans.jsonl in its output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.config import RunConfig, dump_yaml
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.provenance.plans_file import note_plan

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session


def read_tokenizer(config: RunConfig) -> tuple[int | None, str | None]:
    """Return the end-of-document id (`documents.eod_id`, or else the tokenizer's) and the tokenizer's fingerprint.

    With `documents.eod_id` the tokenizer's files need not exist on this machine; then the fingerprint is None.

    Raises:
        UserError: the tokenizer has more ids than the model, or it is missing and its id is needed.
    """
    eod_id = config.documents.eod_id
    if config.tokenizer is None:
        return eod_id, None
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except UserError:
        if eod_id is None:
            raise
        return eod_id, None
    if tokenizer.vocab_size > config.model.vocab:
        raise UserError(
            f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} ids, model.vocab is {config.model.vocab}; "
            "make the vocabulary at least as large"
        )
    return tokenizer.eod_id if eod_id is None else eod_id, tokenizer.fingerprint


def write_run_files(session: Session) -> None:
    """Write run.yaml, plan.json and plans.jsonl to the run directory, on the main rank.

    Raises:
        CptError: they cannot be written.
    """
    if not session.ranks.is_main:
        return
    run, plan = session.config.to_dict(), session.plan.to_dict()
    try:
        session.output.mkdir(parents=True, exist_ok=True)
        write_atomically(session.output / layout.RUN_FILE, dump_yaml(run))
        note_plan(
            session.output,
            session.state.step,
            run=run,
            plan=plan,
            state=session.state.data,
            fingerprints=session.data_fingerprints,
        )
        plan_text = orjson.dumps(plan, option=orjson.OPT_INDENT_2).decode()
        write_atomically(session.output / layout.PLAN_FILE, plan_text)
    except OSError as error:
        raise CptError(
            f"{error.filename or session.output}: {error.strerror}: the run directory cannot be written; free some "
            "space or choose another output"
        ) from error
