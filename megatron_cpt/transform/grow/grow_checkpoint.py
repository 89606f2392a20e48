"""Growth of a checkpoint: streamed, resumable, proven, published by one rename."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.backend import launched_world_size
from megatron_cpt.checkpoint.layout import MANIFEST_FILE
from megatron_cpt.checkpoint.loading.inference_model import open_checkpoint
from megatron_cpt.checkpoint.manifest import digest, manifest_text, read_manifest
from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.checkpoint_files import write_records
from megatron_cpt.convert.dtypes import find_dtype
from megatron_cpt.convert.importer import ImportOptions, work_folder, write_checkpoint
from megatron_cpt.convert.job import Advance, no_progress, refuse_existing
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.convert.megatron.torch_dist_writer import WrittenFile
from megatron_cpt.convert.source import SourceCheckpoint, open_source_checkpoint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.output_path import refuse_output_inside
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.transform.grow.grown_source import grown_source
from megatron_cpt.transform.grow.growth_axes import layer_origins
from megatron_cpt.transform.grow.growth_proof import LIMITS, GrowthProof, prove_growth, refuse_small_memory
from megatron_cpt.transform.grow.growth_target import SIZES, read_target, size_of

_KEPT_RUN_KEYS = ("tokenizer", "documents")  # of the small model's run.yaml
_KEPT_STATE_KEYS = ("tokenizer_fingerprint", "eod_id")


@dataclass(frozen=True, kw_only=True)
class GrowOptions:
    """Options of a growth.

    Attributes:
        noise: standard deviation of the symmetry-breaking noise, relative to the RMS of each row of a grown matrix.
            0.316 is HyperCloning's signal-to-noise ratio of 10 dB; 0 adds none.
        seed: of the noise and of fresh weights.
        dtype: `fp32`, `bf16` or `fp16`; None: keep the dtype of each tensor.
        target: tensor- and pipeline-parallel sizes that load fastest; every layout can load the checkpoint.
        workers: number of threads; 0: one per core, at most 4. Each holds about 100 MB.
        should_prove: compare the logits of both models before the checkpoint is published.
        tolerance: largest accepted relative difference of the logits; None: `growth_proof.LIMITS`.
    """

    noise: float = 0.316
    seed: int = 1234
    dtype: str | None = None
    target: Target = field(default_factory=Target)
    workers: int = 0
    should_prove: bool = True
    tolerance: float | None = None


@dataclass(frozen=True)
class GrowReport:
    """Result of a growth.

    Attributes:
        sizes: size before and after, by the names of run.yaml's `model` section.
        identity_layers: numbers of the inserted layers -> number of the old layer that each copies.
        num_tensors, num_parameters, num_bytes, num_files: size of the grown checkpoint.
        num_kept: number of files that an interrupted earlier call had written.
        proof: comparison of the logits; None with `--no-proof`.
    """

    sizes: Mapping[str, tuple[int, int]]
    identity_layers: Mapping[int, int]
    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_files: int
    num_kept: int
    seconds: float
    proof: GrowthProof | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def grow_checkpoint(
    source: str | Path,
    model_file: str | Path,
    output: str | Path,
    options: GrowOptions | None = None,
    *,
    advance: Advance = no_progress,
) -> GrowReport:
    """Grow a checkpoint to the shape in a file, without changing the function that it computes.

    The output appears only when it is complete, proven and on the disk. Call the function again with the same arguments
    to resume an interrupted growth. Example:

        grow_checkpoint("runs/small", "wide.yaml", "checkpoints/wide", GrowOptions(noise=0.1))

    Args:
        source: a checkpoint, or a run directory (its newest checkpoint).
        model_file: see `read_target`.
        output: the checkpoint to create; it must not exist.
        options: noise, dtype, layout and proof.
        advance: progress callback, see `Advance`.

    Raises:
        UserError: a file or a value is wrong, the output exists or is inside the source, the disk or the memory is
            too small, or the shape cannot be reached without changing the function.
        RefusedError: the source is corrupt or changes while it is read, or the proof fails.
        CptError: the operating system failed, for example with a full disk.
    """
    source, output, options = Path(source), Path(output), options or GrowOptions()
    if launched_world_size() > 1:
        raise UserError("grow is one process; start it without a launcher")
    refuse_existing(output)
    proof: GrowthProof | None = None
    with os_errors_as_cpt_errors(work_folder(output)):
        started = time.perf_counter()
        saved = open_checkpoint(source)
        refuse_output_inside(output, saved.path)
        small = open_source_checkpoint(saved.path)
        target = read_target(Path(model_file), small.model)
        grown = grown_source(small, target, noise=options.noise, seed=options.seed, dtype=find_dtype(options.dtype))
        if options.should_prove:
            refuse_small_memory(target)
        job, provenance = _job(small, target, options), _provenance(saved, small.model, target, options)

        def write_files(folder: Path, written: Mapping[str, WrittenFile]) -> None:
            nonlocal proof
            write_records(
                folder,
                output.name,
                grown,
                grown.specs,
                written,
                state={key: saved.state.get(key) for key in _KEPT_STATE_KEYS},
                run={key: saved.run[key] for key in _KEPT_RUN_KEYS if saved.run.get(key) is not None},
                provenance=provenance,
            )
            if options.should_prove:
                proof = _prove(saved.path, folder, grown, options)
                content = manifest_text(read_manifest(folder), {**provenance, "proof": proof.to_dict()})
                write_atomically(folder / MANIFEST_FILE, content)

        sizes = write_checkpoint(grown, grown.specs, output, job, _writing_options(options), write_files, advance)
    return GrowReport(
        sizes={key: (size_of(small.model, key), size_of(target, key)) for key in SIZES},
        identity_layers=_identity_layers(small.model, target),
        num_tensors=len(grown.specs),
        num_parameters=sum(spec.num_bytes // spec.dtype.itemsize for spec in grown.specs.values()),
        num_bytes=sizes.num_bytes,
        num_files=sizes.num_files,
        num_kept=sizes.num_kept,
        seconds=time.perf_counter() - started,
        proof=proof,
    )


def _job(small: SourceCheckpoint, target: ModelConfig, options: GrowOptions) -> dict[str, Any]:
    return {
        "software": __version__,
        "grown_from": small.identity(),
        "model": target.model_dump(mode="json"),
        "noise": options.noise,
        "seed": options.seed,
        "dtype": options.dtype,
        "target": asdict(options.target),
    }


def _writing_options(options: GrowOptions) -> ImportOptions:
    return ImportOptions(target=options.target, workers=options.workers or min(4, os.cpu_count() or 1))


def _identity_layers(small: ModelConfig, target: ModelConfig) -> dict[int, int]:
    origins = layer_origins(small.layers, target.layers)
    return {number: origin.layer for number, origin in enumerate(origins) if origin.is_identity}


def _provenance(saved: SavedRun, small: ModelConfig, target: ModelConfig, options: GrowOptions) -> dict[str, Any]:
    return {
        "command": "grow",
        "inputs": [
            {
                "path": str(saved.path.resolve()),
                "step": saved.state["train"]["step"],
                "run_id": saved.run_id,
                "digest": digest(saved.path / MANIFEST_FILE).checksum,
            }
        ],
        "sizes": {key: [size_of(small, key), size_of(target, key)] for key in SIZES},
        "identity_layers": {str(number): layer for number, layer in _identity_layers(small, target).items()},
        "noise": options.noise,
        "seed": options.seed,
    }


def _prove(small: Path, folder: Path, grown: SourceCheckpoint, options: GrowOptions) -> GrowthProof:
    """Compare the logits of both models.

    Raises:
        RefusedError: they differ by more than the limit.
    """
    limit = options.tolerance
    if limit is None:
        limit = max(LIMITS[spec.dtype] for spec in grown.specs.values())
    proof = prove_growth(small, folder, limit)
    if not proof.holds:
        raise RefusedError(
            f"the grown model is not the same function: its logits differ by {proof.relative_difference:.2e} of the "
            f"largest logit, more than {limit:g}; nothing was published. If only rounding is to blame, write it with "
            "--dtype fp32 or raise --tolerance"
        )
    return proof
