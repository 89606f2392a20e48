"""A session -> a checkpoint."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import Record
from megatron_cpt.config import dump_yaml
from megatron_cpt.train.setup import Session, rank_layout


def save(session: Session, *, wait: bool) -> list[Path]:
    """Save the session under its step, after the save before it; a collective call.

    Args:
        session: what to save.
        wait: whether it must be published on return, also where saves run in the background.

    Returns:
        The checkpoints published meanwhile, oldest first.

    Raises:
        CptError: this one or the one before could not be written.
    """
    found = [session.saver.finish(), session.saver.save(session.state.step, record(session))]
    if wait:
        found.append(session.saver.finish())
    return [path for path in found if path is not None]


def record(session: Session) -> Record:
    """What a checkpoint of this session says in plain text."""
    return Record(_state(session), dump_yaml(session.config.to_dict()), session.plan.to_dict())


def _state(session: Session) -> dict[str, Any]:
    return {
        "format_version": layout.FORMAT_VERSION,
        "train": session.state.to_dict(),
        "layout": rank_layout(session.config, session.ranks),
        "next_rate": session.plan.schedule.rate(session.state.step + 1),
        "data_fingerprints": session.data_fingerprints,
        "tokenizer_fingerprint": session.tokenizer_fingerprint,
        "layer_spec": session.model.spec,
        "versions": {
            "megatron_cpt": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        },
    }
