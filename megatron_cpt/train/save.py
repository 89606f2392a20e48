"""Checkpoints of a session."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpt import __version__
from megatron_cpt.backend import Ranks
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import Record
from megatron_cpt.config import ParallelConfig, dump_yaml

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session


def save(session: Session) -> Path | None:
    """Save the session under its step; the previous save must be finished. A collective call.

    Returns:
        The published checkpoint; None while it is written in the background.

    Raises:
        CptError: it could not be written.
    """
    return session.saver.save(session.state.step, record(session))


def record(session: Session) -> Record:
    """Return the text files of a checkpoint: state.json, run.yaml and plan.json."""
    return Record(_state(session), dump_yaml(session.config.to_dict()), session.plan.to_dict())


def _state(session: Session) -> dict[str, Any]:
    return {
        "format_version": layout.FORMAT_VERSION,
        "train": session.state.to_dict(),
        "layout": rank_layout(session.config.parallel, session.ranks),
        "next_rate": session.plan.schedule.rate(session.state.step + 1),
        "data_fingerprints": session.data_fingerprints,
        "tokenizer_fingerprint": session.tokenizer_fingerprint,
        "layer_spec": session.model.spec,
        "versions": {
            "megatron_cpt": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        },
    }


def rank_layout(parallel: ParallelConfig, ranks: Ranks) -> dict[str, int]:
    """Return the sizes that must be equal for the saved random states to belong to the same ranks."""
    return {
        "world_size": ranks.world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
    }
