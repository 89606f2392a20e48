"""Text files of a run: its tokenizer; run.yaml, plan.json and plans.jsonl in its output; records of its checkpoints."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import orjson

from megatron_cpt import __version__
from megatron_cpt.backend import Ranks, launched_rank
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import Record
from megatron_cpt.config import ParallelConfig, RunConfig, dump_yaml
from megatron_cpt.errors import CptError, RefusedError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.provenance.plans_file import note_first_checkpoint, note_plan
from megatron_cpt.train.first_start import keep_given_run_file, set_aside

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)


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
            "import the model again with --add-tokens to give every id a row, name the tokenizer that the model was "
            "trained with, or, for random weights, make the vocabulary as large"
        )
    if eod_id is None and tokenizer.eod_note and launched_rank() == 0:
        logger.info("tokenizer: %s; set documents.eod_id for another one", tokenizer.eod_note)
    return tokenizer.eod_id if eod_id is None else eod_id, tokenizer.fingerprint


def compare_eod_ids(eod_id: int | None, of_data: Collection[int]) -> Iterator[str]:
    """Yield a sentence if the data ends documents with another id than the run.

    Args:
        eod_id: end-of-document id of the run; None: there is none.
        of_data: ids that end documents, by the sidecars.
    """
    others = [str(other) for other in sorted(of_data) if other != eod_id]
    if others and eod_id is not None:
        yield (
            f"documents end with id {', '.join(others)} by the sidecars of the data, and with id {eod_id} by run.yaml; "
            "set documents.eod_id"
        )


def write_run_files(session: Session, *, restart: bool = False) -> None:
    """Write plans.jsonl, run.yaml and plan.json to the run directory, on the main rank.

    plans.jsonl comes first: with it the next start knows the other files as files of this run.

    Args:
        session: the run.
        restart: move the files of an earlier run aside, unless the run resumes.

    Raises:
        CptError: they cannot be written.
    """
    if not session.ranks.is_main:
        return
    run, plan = session.config.to_dict(), session.plan.to_dict()
    try:
        session.output.mkdir(parents=True, exist_ok=True)
        if restart and session.is_resumed:
            logger.warning("--restart: %s has checkpoints, so the run resumes from them", session.output)
        elif restart:
            set_aside(session.output)
        elif not session.is_resumed:
            keep_given_run_file(session.output)
        note_plan(
            session.output,
            session.state.step,
            run_id=session.run_id,
            run=run,
            plan=plan,
            state=session.state.data,
            fingerprints=session.data_fingerprints,
        )
        write_atomically(session.output / layout.RUN_FILE, dump_yaml(run))
        write_atomically(session.output / layout.PLAN_FILE, orjson.dumps(plan, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise CptError(
            f"{error.filename or session.output}: {error.strerror}: the run directory cannot be written; free some "
            "space or choose another output"
        ) from error


def note_published(session: Session) -> None:
    """Record the first checkpoint of a run in plans.jsonl, on the main rank; a failure is only a warning."""
    if session.ranks.is_main:
        try:
            note_first_checkpoint(session.output)
        except (OSError, RefusedError) as error:  # the checkpoint itself is complete, and the next start records it
            logger.warning("%s: the first checkpoint is saved, but not recorded here: %s", session.output, error)


def record(session: Session) -> Record:
    """Return the text files of a checkpoint: state.json, run.yaml and plan.json."""
    state = {
        "format_version": layout.FORMAT_VERSION,
        "run_id": session.run_id,
        "train": session.state.to_dict(),
        "layout": rank_layout(session.config.parallel, session.ranks),
        "next_rate": session.plan.schedule.rate(session.state.step + 1),
        "data_fingerprints": session.data_fingerprints,
        "tokenizer_fingerprint": session.tokenizer_fingerprint,
        "eod_id": session.eod_id,
        "teacher": None if (distillation := session.forward.distillation) is None else distillation.teacher.digest,
        "layer_spec": session.model.spec,
        "versions": {
            "megatron_cpt": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        },
    }
    return Record(state, dump_yaml(session.config.to_dict()), session.plan.to_dict())


def rank_layout(parallel: ParallelConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the sizes that must be equal for the saved random states to belong to the same layers."""
    names = ("tensor", "pipeline", "virtual_pipeline", "context")
    sizes: dict[str, Any] = {"world_size": ranks.world_size, **{name: getattr(parallel, name) for name in names}}
    # Checkpoints of versions without this key have no entry, like runs that do not set it.
    return sizes if parallel.pipeline_layout is None else {**sizes, "pipeline_layout": parallel.pipeline_layout}
