"""`megatron-cpt train`: a file of a run -> a finished run."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from megatron_cpt.backend import Ranks, catch_stop_signals, launched_world_size, process_groups
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.preflight import check_allowed_names
from megatron_cpt.config import RunConfig, dump_yaml
from megatron_cpt.data.resolve import PreparedRun, prepare_run
from megatron_cpt.errors import UserError
from megatron_cpt.train.hook import Hook

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)

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
    """
    check_allowed_names(allow)
    prepared = prepare_run(path, overrides, need_files=True, num_gpus=launched_world_size())
    config = prepared.config
    eod_id = _end_of_document(config)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what the libraries below warn about is not for the reader of a training log
    with catch_stop_signals() as stop, process_groups(config.parallel) as ranks:
        # megatron-core reads torch.cuda when it is imported, and the process groups put the CPU in its place
        from megatron_cpt.train.loop import train
        from megatron_cpt.train.setup import setup

        _configure_logging(ranks)
        if config.checkpoint.async_ and ranks.is_main:
            logger.info("checkpoint.async: this version writes checkpoints while training waits")
        session = setup(config, prepared.plan, ranks, eod_id=eod_id, allow=allow)
        _write_run_files(session, prepared)
        hooks = make_hooks(config)
        try:
            return train(session, hooks, stop)
        finally:
            session.loader.close()
            for hook in hooks:
                hook.on_end(session)


def _end_of_document(config: RunConfig) -> int | None:
    """The end-of-document id: the config's own, else the tokenizer's.

    Raises:
        UserError: the tokenizer does not fit the model or has no such id although it is needed.
    """
    if config.documents.eod_id is not None or config.tokenizer is None:
        return config.documents.eod_id
    from megatron_cpt.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab:
        raise UserError(
            f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} ids, model.vocab is {config.model.vocab}; "
            "make the vocabulary at least as large"
        )
    return tokenizer.eod_id


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
    if not session.ranks.is_main:
        return
    session.output.mkdir(parents=True, exist_ok=True)
    layout.write_atomically(Path(session.output) / layout.RUN_FILE, dump_yaml(session.config.to_dict()))
    plan = orjson.dumps(prepared.plan.to_dict(), option=orjson.OPT_INDENT_2).decode()
    layout.write_atomically(Path(session.output) / layout.PLAN_FILE, plan)
