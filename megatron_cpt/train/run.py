"""`megatron-cpt train`: a file of a run -> a finished run."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from megatron_cpt.backend import Ranks, catch_stop_signals, launched_rank, launched_world_size, process_groups
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.preflight import check_allowed_names
from megatron_cpt.config import RunConfig, dump_yaml
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.prepare import PreparedRun, prepare_run
from megatron_cpt.provenance.plans_file import note_plan
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.resilience.failure_guard import guard
from megatron_cpt.train.resilience.watchdog import Progress, Watchdog

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)

# Seconds that a collective may take: for ever, for the watchdog ends what hangs. torch measures them by the clock, and
# would end a job that was suspended for longer; there are places where it counts milliseconds in 32 bits.
_NO_TIMEOUT = 20 * 86400.0

MakeHooks = Callable[[RunConfig], Sequence[Hook]]


def run_training(path: str, overrides: Sequence[str], allow: Collection[str], make_hooks: MakeHooks) -> int:
    """Prepare, set up and train.

    Args:
        path: run.yaml.
        overrides: `key=value` changes to it.
        allow: names of changes that a resume may make.
        make_hooks: builds the hooks of the run.

    Returns:
        The exit status.

    Raises:
        UserError: the user's mistake; nothing was written.
        RefusedError: a checkpoint or data set that must not be used.
        LostPeerError: another rank is gone.
    """
    check_allowed_names(allow)
    prepared = prepare_run(path, overrides, need_files=True, num_gpus=launched_world_size())
    config = prepared.config
    eod_id, tokenizer_fingerprint = _read_tokenizer(config)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what the libraries below warn about is not for the reader of a training log
    limits, progress = config.resilience, Progress()
    stacks = Path(config.output) / "stacks"
    with (
        catch_stop_signals() as stop,
        Watchdog(progress, limits.hang_timeout, rank=launched_rank(), folder=stacks) as watchdog,
        process_groups(config.parallel, timeout=_NO_TIMEOUT) as ranks,
        guard(limits, ranks, watchdog, progress),
    ):
        # megatron-core reads torch.cuda when it is imported, and the process groups put the CPU in its place
        from megatron_cpt.train.setup import setup
        from megatron_cpt.train.trainer import train

        _configure_logging(ranks)
        hooks = make_hooks(config)  # before anything is written: one may refuse what it is asked for
        progress.note("setup")
        session = setup(
            config, prepared.plan, ranks, eod_id=eod_id, tokenizer_fingerprint=tokenizer_fingerprint, allow=allow
        )
        _write_run_files(session, prepared)
        with contextlib.ExitStack() as at_end:  # all of it, in this order from below, whatever fails
            for hook in reversed(hooks):
                at_end.callback(hook.on_end, session)
            at_end.callback(session.saver.close)
            at_end.callback(session.loader.close)
            return train(session, hooks, stop, progress=progress)


def _read_tokenizer(config: RunConfig) -> tuple[int | None, str | None]:
    """The end-of-document id, the config's own or else the tokenizer's, and the hash of the tokenizer's content.

    Where the config gives the id, the tokenizer's files need not be on this machine.

    Raises:
        UserError: the tokenizer does not fit the model, or is missing although it is needed.
    """
    if config.tokenizer is None:
        return config.documents.eod_id, None
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except UserError:
        if config.documents.eod_id is None:
            raise
        return config.documents.eod_id, None
    if tokenizer.vocab_size > config.model.vocab:
        raise UserError(
            f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} ids, model.vocab is {config.model.vocab}; "
            "make the vocabulary at least as large"
        )
    eod_id = config.documents.eod_id
    return tokenizer.eod_id if eod_id is None else eod_id, tokenizer.fingerprint


def _configure_logging(ranks: Ranks) -> None:
    """Our messages on stderr, from the main rank; of the others errors only."""
    ours = logging.getLogger("megatron_cpt")
    ours.setLevel(logging.INFO if ranks.is_main else logging.ERROR)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _write_run_files(session: Session, prepared: PreparedRun) -> None:
    """run.yaml, plan.json and plans.jsonl of the run directory.

    Raises:
        CptError: they cannot be written.
    """
    if not session.ranks.is_main:
        return
    try:
        _write_files(session, prepared)
    except OSError as error:
        raise CptError(
            f"{error.filename or session.output}: {error.strerror}: the run directory cannot be written; make room, or "
            "choose another output"
        ) from error


def _write_files(session: Session, prepared: PreparedRun) -> None:
    session.output.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(session.output) / layout.RUN_FILE, dump_yaml(session.config.to_dict()))
    plan = prepared.plan.to_dict()
    note_plan(
        session.output,
        session.state.step,
        run=session.config.to_dict(),
        plan=plan,
        state=session.state.data,
        fingerprints=session.data_fingerprints,
    )
    plan_text = orjson.dumps(plan, option=orjson.OPT_INDENT_2).decode()
    write_atomically(Path(session.output) / layout.PLAN_FILE, plan_text)
