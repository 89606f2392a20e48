"""What a run starts from: its own newest checkpoint, another one, or random weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import Ranks
from megatron_cpt.checkpoint.loading.find_valid import find_valid
from megatron_cpt.checkpoint.loading.load import load_training, load_weights
from megatron_cpt.checkpoint.preflight import find_changes, model_shape, refuse_unless_allowed
from megatron_cpt.checkpoint.record import SavedRun, corrupt_as_refused
from megatron_cpt.config import RunConfig
from megatron_cpt.errors import RefusedError
from megatron_cpt.model.build_model import Model
from megatron_cpt.plan import RunPlan
from megatron_cpt.train.state import TrainState
from megatron_cpt.views.preflight_table import ResumeSummary, describe

logger = logging.getLogger(__name__)


def preflight(
    own: SavedRun,
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    fingerprints: dict[str, str],
    tokenizer: str | None,
    allow: Collection[str],
) -> None:
    """Compare the run with the checkpoint it goes on from, say what was found, and refuse what was not allowed.

    Args:
        own: the run's own checkpoint.
        config, plan, ranks: the run as it is now.
        fingerprints, tokenizer: hashes of the sources' files and of the tokenizer's content; None: it is not known.
        allow: names of changes that may be made.

    Raises:
        RefusedError: something changed that was not allowed.
    """
    with corrupt_as_refused(own.path):
        saved = own.state
        tokenizers = (saved.get("tokenizer_fingerprint"), tokenizer)
        changes = find_changes(own.run, config, saved["data_fingerprints"], fingerprints, tokenizers)
        step = saved["train"]["step"] + 1
        summary = ResumeSummary(
            step, saved["train"]["samples_by_source"], plan.schedule.rate(step), saved.get("next_rate")
        )
        _log(ranks, describe(changes, allow, summary))
    refuse_unless_allowed(changes, allow, str(own.path))


def init_checkpoint(config: RunConfig, broken: Mapping[Path, Sequence[str]]) -> SavedRun | None:
    """The checkpoint that `init.from` means, which fits the model; None: random weights. A collective call.

    Args:
        config: the run.
        broken: checkpoints that are known to be, with their faults.

    Raises:
        UserError: there is none of that name.
        RefusedError: it is broken, of another model, or lacks what `init.load` wants.
    """
    if config.init.from_ is None:
        return None
    saved = find_valid(config.init.from_, config.checkpoint.verify, broken)
    path = saved.path
    with corrupt_as_refused(path):
        before, now = model_shape(saved.run), model_shape(config.to_dict())
    wrong = [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in now if before.get(key) != now[key]]
    if wrong:
        raise RefusedError(
            f"init.from: {path}: a checkpoint of another model: {'; '.join(wrong)}; make the model section agree"
        )
    if config.init.load == "weights+optimizer" and saved.state.get("content") == "weights":
        raise RefusedError(
            f"init.load: weights+optimizer: {path} was imported from weights alone and has no optimizer; "
            "take init.load=weights"
        )
    return saved


def load_state(
    config: RunConfig,
    ranks: Ranks,
    model: Model,
    optimizer: MegatronOptimizer,
    own: SavedRun | None,
    origin: SavedRun | None,
) -> TrainState:
    """Fill model, optimizer and random states; a collective call.

    Args:
        config, ranks: the run.
        model, optimizer: take what is loaded; after an error they hold anything.
        own: the run's own checkpoint, which goes on; None: it starts.
        origin: what it starts from; None: random weights.

    Returns:
        Where the run stands.

    Raises:
        CorruptCheckpointError: shards of the checkpoint are damaged.
        RefusedError: it cannot be read, or does not fit the model.
    """
    if own is not None:
        with corrupt_as_refused(own.path):
            is_same_layout = own.state["layout"] == rank_layout(config, ranks)
            state = TrainState.from_dict(own.state["train"])
        load_training(own, model.chunks, optimizer, config.checkpoint.verify, with_rng=is_same_layout)
        random_states = "random states go on" if is_same_layout else "random states start anew, in another layout"
        _log(
            ranks,
            f"going on from {own.path}, step {state.step}: "
            f"weights, optimizer, data and schedule go on; {random_states}",
        )
        return state
    if origin is not None:
        if config.init.load == "weights":
            loaded = load_weights(origin, model.chunks, config.checkpoint.verify)
            # The fp32 master weights are of the random ones; made of weights in FP8, they would be rounded for good.
            optimizer.reload_model_params(loaded if config.precision.has_fp8_weights else None)
        else:
            load_training(origin, model.chunks, optimizer, config.checkpoint.verify, with_rng=False)
        taken = "weights" if config.init.load == "weights" else "weights and the optimizer's moments and step"
        left = "optimizer, " if config.init.load == "weights" else ""
        _log(
            ranks,
            f"starting from {origin.path} (init.load: {config.init.load}): takes {taken}; "
            f"{left}step, data, schedule and random states start anew",
        )
    else:
        _log(ranks, f"starting from random weights of seed {config.seed}: nothing is loaded")
    return TrainState()


def rank_layout(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """What must be the same for random states to belong to the same ranks."""
    parallel = config.parallel
    return {
        "world_size": ranks.world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
    }


def _log(ranks: Ranks, message: str) -> None:
    if ranks.is_main:
        logger.info(message)
