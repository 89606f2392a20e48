"""A session -> a checkpoint."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import Record
from megatron_cpt.config import dump_yaml
from megatron_cpt.train.resume import rank_layout
from megatron_cpt.train.setup import Session


def save(session: Session) -> Path | None:
    """Save the session under its step; the save before it must be finished. A collective call.

    Returns:
        The published checkpoint, or None where it is still written in the background.

    Raises:
        CptError: it could not be written.
    """
    return session.saver.save(session.state.step, record(session))


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
