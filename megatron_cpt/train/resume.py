"""Start of a run: its own newest checkpoint, another run's checkpoint, or random weights."""

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
from megatron_cpt.convert.side_files import side_files_of_checkpoint
from megatron_cpt.data.tokenfile.sidecar import name_tokenizer
from megatron_cpt.data.tokenizers.tokenizer import read_fingerprint
from megatron_cpt.errors import RefusedError
from megatron_cpt.model.build_model import Model
from megatron_cpt.model.padded_vocabulary import zero_padding
from megatron_cpt.optim.ema import WeightEma
from megatron_cpt.planning import RunPlan
from megatron_cpt.train.run_files import rank_layout
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
    eod_id: int | None,
    run_id: str | None,
    teacher: str | None,
    allow: Collection[str],
) -> None:
    """Compare the run with the checkpoint it resumes from, report the changes, and refuse those not allowed.

    Args:
        own: the run's own checkpoint.
        config, plan, ranks: the run now.
        fingerprints, tokenizer: hashes of the sources' files and of the tokenizer's content; None: unknown.
        eod_id: the end-of-document id; None: there is none.
        run_id: id of the run directory; None: unknown.
        teacher: hash of the teacher's content; None: there is none.
        allow: names of allowed changes.

    Raises:
        RefusedError: a change is not allowed.
    """
    with corrupt_as_refused(own.path):
        saved = own.state
        tokenizers = (saved.get("tokenizer_fingerprint"), tokenizer)
        ends = (saved["eod_id"], eod_id) if "eod_id" in saved else None
        run_ids = (own.run_id, run_id)
        teachers = (saved.get("teacher"), teacher)
        changes = find_changes(
            own.run, config, saved["data_fingerprints"], fingerprints, tokenizers, ends, run_ids, teachers
        )
        step = saved["train"]["step"] + 1
        samples, rate = saved["train"]["samples_by_source"], plan.schedule.rate(step)
        if ranks.is_main and own.run_id is None and run_id is not None:
            logger.warning("%s: of a version without run ids, so it may be of another run than %s", own.path, run_id)
        if ranks.is_main:
            logger.info(describe(changes, allow, ResumeSummary(step, samples, rate, saved.get("next_rate"))))
    refuse_unless_allowed(changes, allow, str(own.path))


def init_checkpoint(config: RunConfig, corrupt: Mapping[Path, Sequence[str]]) -> SavedRun | None:
    """Return the checkpoint named by `init.from`; None: start from random weights. A collective call.

    Args:
        config: the run.
        corrupt: faults of the checkpoints already found corrupt.

    Raises:
        UserError: there is no such checkpoint.
        RefusedError: it is corrupt, has another model, or lacks the optimizer that `init.load` asks for.
    """
    if config.init.from_ is None:
        return None
    saved = find_valid(config.init.from_, config.checkpoint.verify, corrupt)
    path = saved.path
    with corrupt_as_refused(path):
        before, now = model_shape(saved.run), model_shape(config.to_dict())
    differing = [key for key in now if before.get(key) != now[key] and key != "padding_in_softmax"]
    wrong = [f"{key}: {before.get(key)} there, {now[key]} here" for key in differing]
    if wrong:
        raise RefusedError(
            f"init.from: {path}: a checkpoint of another model: {'; '.join(wrong)}; omit `model`, or make it agree"
        )
    if config.init.load == "weights+optimizer" and saved.state.get("content") == "weights":
        raise RefusedError(
            f"init.load: weights+optimizer: {path} was imported from weights alone and has no optimizer; "
            "set init.load=weights, or import it with --optimizer"
        )
    return saved


def compare_tokenizer(
    origin: SavedRun,
    tokenizer: tuple[str, str] | None,
    key: str = "init.from",
    otherwise: str = "or start anyway: --allow tokenizer",
) -> None:
    """Compare the run's tokenizer with the tokenizer of a checkpoint that the run uses, where both are known.

    Args:
        origin: the checkpoint.
        tokenizer: name and fingerprint of the run's tokenizer.
        key: key of run.yaml that names the checkpoint.
        otherwise: what a user can do besides encoding the data again.

    Raises:
        RefusedError: they differ.
    """
    if tokenizer is None:
        return
    known = _tokenizers_of(origin)
    if known and tokenizer[1] not in known.values():
        names = " or ".join(name_tokenizer(name, value) for name, value in known.items())
        raise RefusedError(
            f"{key}: {origin.path}: its model was trained with tokenizer {names}, this run has "
            f"{name_tokenizer(*tokenizer)}: equal ids mean other text; encode the data with the checkpoint's "
            f"tokenizer, {otherwise}"
        )


def _tokenizers_of(origin: SavedRun) -> dict[str, str]:
    """Return names and fingerprints of a checkpoint's tokenizer, which may exist as two kinds of file."""
    recorded = origin.state.get("tokenizer_fingerprint")
    if recorded is not None:
        return {str(origin.run.get("tokenizer")): recorded}
    files = side_files_of_checkpoint(origin.path)
    found = {"huggingface": files.get("tokenizer.json"), "sentencepiece": files.get("tokenizer.model")}
    specs = [f"{kind}:{path}" for kind, path in found.items() if path is not None]
    return {spec: read_fingerprint(spec) for spec in specs}


def load_state(
    config: RunConfig,
    ranks: Ranks,
    model: Model,
    optimizer: MegatronOptimizer,
    ema: WeightEma | None,
    own: SavedRun | None,
    origin: SavedRun | None,
) -> TrainState:
    """Load model, optimizer, moving average and random states; a collective call.

    The average starts as the loaded weights if the run starts, or if its checkpoint has no average.

    Args:
        config, ranks: the run.
        model, optimizer, ema: filled in place; unusable after an error.
        own: the run's own checkpoint to resume from; None: the run starts.
        origin: the checkpoint to start from; None: keep the random weights.

    Raises:
        CorruptCheckpointError: shards of the checkpoint are corrupt.
        RefusedError: it cannot be read, or does not fit the model.
    """
    state, has_ema = TrainState(), False
    if own is not None:
        with corrupt_as_refused(own.path):
            is_same_layout = own.state["layout"] == rank_layout(config.parallel, ranks)
            state = TrainState.from_dict(own.state["train"])
        has_ema = own.has_ema
        load_training(
            own,
            model.chunks,
            optimizer,
            config.checkpoint.verify,
            ema=ema if has_ema else None,
            with_rng=is_same_layout,
        )
        random_states = "continue" if is_same_layout else "start new, because the layout changed"
        message = (
            f"resuming from {own.path}, step {state.step}: weights, optimizer, data and schedule continue; "
            f"random states {random_states}"
        )
    elif origin is None:
        message = f"starting from random weights of seed {config.seed}: nothing is loaded"
    elif config.init.load == "weights":
        weights = load_weights(origin, model.chunks, config.checkpoint.verify)
        zero_padding(model.chunks, config.model)
        # Refresh the fp32 master weights. Model weights in FP8 are rounded, so then take those read from the file.
        optimizer.reload_model_params(weights if config.precision.has_fp8_weights else None)
        message = (
            f"starting from {origin.path} (init.load: weights): loads weights; optimizer, step, data, schedule "
            "and random states start new"
        )
    else:
        load_training(origin, model.chunks, optimizer, config.checkpoint.verify, with_rng=False)
        message = (
            f"starting from {origin.path} (init.load: weights+optimizer): loads weights and the optimizer's "
            "moments and step count; step, data, schedule and random states start new"
        )
    if ranks.is_main:
        logger.info(message)
    if ema is not None and not has_ema:
        ema.restart()
        if ranks.is_main:
            logger.info("ema: the moving average starts from the weights after step %d", state.step)
    return state
