"""A checkpoint as a model that only computes logits: `convert verify --logits`, `evaluate` and `generate` share it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpt.backend import Ranks, launched_world_size, process_groups
from megatron_cpt.backend.distributed import data_parallel_size
from megatron_cpt.checkpoint.layout import RUN_FILE, is_checkpoint, resolve_checkpoint
from megatron_cpt.checkpoint.record import SavedRun, WeightSet, corrupt_as_refused, no_ema_error, read_saved_run
from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from megatron_cpt.model.build_model import Model

_DEFAULT_LENGTH = 2048
_SECTIONS = ("parallel", "precision", "speed", "seq_length", "deterministic")
_MICRO_BATCHES = 720720  # never run; the interleaved schedule's check wants a multiple of the pipeline size, up to 16


@dataclass(frozen=True)
class InferenceModel:
    """Model of this rank with the weights of a checkpoint.

    Attributes:
        model: model chunks of this rank, without gradient buffers.
        run: the run that built the model.
        ranks: position of this process.
    """

    model: Model
    run: RunConfig
    ranks: Ranks


def open_checkpoint(path: str | Path) -> SavedRun:
    """Read the text files of a checkpoint, or of the newest checkpoint of a run directory.

    Raises:
        UserError: the path does not exist, or is another project's checkpoint.
        RefusedError: the checkpoint is corrupt.
    """
    found = resolve_checkpoint(path)
    if not is_checkpoint(found) or not (found / RUN_FILE).is_file():
        raise UserError(f"{path}: not a checkpoint of this package; import it first (`convert import`)")
    return read_saved_run(found)


def inference_run(saved: SavedRun, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a run of a checkpoint's model that only computes logits; its sources are placeholders, never opened.

    Its precision is the one that the checkpoint was trained in, or fp32 if the checkpoint was imported. Its layout is
    one rank per replica. `key=value` overrides, such as `parallel.tensor=2` or `precision.compute=bf16`, change both.

    Raises:
        UserError: an override is wrong, or of a section that does not matter here.
        RefusedError: the checkpoint's run.yaml is damaged.
    """
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in _SECTIONS:
            raise UserError(f"{override}: not possible here; only keys of {', '.join(_SECTIONS)} can be overridden")
    with corrupt_as_refused(saved.path):
        model = dict(saved.run["model"])
        length = int(saved.run.get("seq_length") or model.get("max_positions") or _DEFAULT_LENGTH)
    data: dict[str, Any] = {
        "name": "inference",
        "output": "unused",
        "model": model,
        "seq_length": length,
        "batch": {"global": _MICRO_BATCHES, "micro": 1},
        "tokens": length * _MICRO_BATCHES,
        "schedule": {"max_lr": 1.0},
        "sources": {"none": {"path": "unused"}},
        "phases": [{"name": "none", "blend": {"none": 1.0}}],
        "precision": saved.run.get("precision") or {"compute": "fp32"},
        "recompute": {"granularity": "none"},
    }
    return draft_config(data, overrides).finish(f"{saved.path}")


@contextlib.contextmanager
def load_inference_model(saved: SavedRun, run: RunConfig, weights: WeightSet = "raw") -> Iterator[InferenceModel]:
    """Open process groups, build the model of this rank and load its weights; a collective of all ranks of the job.

    Example:

        saved = open_checkpoint("runs/my-run")
        with load_inference_model(saved, inference_run(saved, ["parallel.tensor=2"])) as loaded:
            scores = Engine(loaded.model, loaded.run, loaded.ranks).score(requests)

    Raises:
        UserError: the number of processes does not fit `run.parallel`, or the checkpoint has no moving average.
        RefusedError: the checkpoint is corrupt.
    """
    data_parallel_size(run.parallel, launched_world_size())
    if weights == "ema" and not saved.has_ema:
        raise no_ema_error(saved.path)
    with process_groups(run.parallel) as ranks:
        # imported here: megatron-core reads torch.cuda on import, and process_groups replaces it on a CPU
        from megatron_cpt.checkpoint.loading.load import load_weights
        from megatron_cpt.checkpoint.state.state_dicts import unwrap
        from megatron_cpt.model.build_model import build_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core's, of what is not installed
            model = build_model(run, draw_weights=False, is_trainable=False)
        load_weights(saved, model.chunks, weights=weights)
        for chunk in model.chunks:
            chunk.eval()
            if ranks.device.type == "cpu":
                _store_by_columns(unwrap(chunk).decoder)
        yield InferenceModel(model, run, ranks)


def _store_by_columns(layers: nn.Module) -> None:
    """Change the order of the fp32 matrices of linear layers in memory: their rows are no longer contiguous.

    A CPU then takes 1.1 to 1.8 times less time for products with 4 to 64 rows, as in generation, and as long for others
    (torch 2.13 with MKL).
    """
    for parameter in layers.parameters():
        if parameter.ndim == 2 and parameter.dtype.itemsize == 4:
            parameter.data = parameter.data.t().contiguous().t()
