"""Average of checkpoints: streamed, verified while it is read, resumable, published by one rename.

The average is written as an import of a source whose tensors are weighted sums, so it has the files, the journal and
the layouts of an import. Optimizer states, random states and FP8 histories have no average: the result has weights
only, and training from it (`init.load: weights`) starts new ones.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_cpt import __version__
from megatron_cpt.checkpoint.manifest import Verify
from megatron_cpt.convert.checkpoint_files import write_records
from megatron_cpt.convert.dtypes import cast, find_dtype, is_finite
from megatron_cpt.convert.importer import ImportOptions, work_folder, write_checkpoint
from megatron_cpt.convert.job import Advance, no_progress, refuse_existing
from megatron_cpt.convert.megatron.torch_dist_plan import Target, TensorSpec
from megatron_cpt.convert.megatron.torch_dist_writer import WrittenFile
from megatron_cpt.convert.source import SourceCheckpoint
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.transform.average.average_inputs import AverageInput, describe_differences, open_inputs
from megatron_cpt.transform.average.average_weights import decay_weights, given_weights, uniform_weights

_BLOCK_BYTES = 2 << 20  # of the result; each input is read in blocks of these rows
_MAX_WORKERS = 8  # by default; as fast as most disks, and below 1 GB of memory
_CACHED_ELEMENTS = 1 << 17  # whose product in fp32 stays in a core's cache, which doubles the speed of the sum
_ARITHMETIC = "fp32: w1*x1, + w2*x2, + ... in the order of the inputs; each step rounded to fp32, the sum to the dtype"


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of an average; by default all checkpoints have the same weight.

    Attributes:
        weights: one per checkpoint, with sum 1; None: equal weights.
        decay: shape of a learning-rate decay that gives the weights, see `average_weights`; not with `weights`.
        dtype: `fp32`, `bf16` or `fp16`; None: the dtype of each tensor, or the wider one where the inputs differ.
        target: tensor- and pipeline-parallel sizes that load fastest; every layout can load the checkpoint.
        workers: number of threads; 0: one per core, at most 8. Each holds up to 32 MiB in memory.
        model: a preset, or a YAML file with a model section, for Megatron checkpoints without a usable config.
        verify: share of the inputs' checksums to compare, each before its file is read: `full`, `sampled` or `none`.
    """

    weights: tuple[float, ...] | None = None
    decay: str | None = None
    dtype: str | None = None
    target: Target = field(default_factory=Target)
    workers: int = 0
    model: str | None = None
    verify: Verify = "full"


@dataclass(frozen=True)
class AverageReport:
    """Result of an average.

    Attributes:
        inputs: path, kind, step, run id, digest and weight of each checkpoint, as in the manifest.
        weights: origin of the weights: `uniform`, `given`, or the name of a decay.
        notes: differences between the inputs that do not forbid an average.
        num_bytes: size of the result's tensors, padding included.
        input_bytes: size of the tensors that were averaged, in all inputs.
        num_kept: number of files that an interrupted earlier call had written.
    """

    inputs: list[dict[str, Any]]
    weights: str
    notes: list[str]
    num_tensors: int
    num_parameters: int
    num_bytes: int
    input_bytes: int
    num_files: int
    num_kept: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def average_checkpoints(
    paths: Sequence[str | Path],
    output: str | Path,
    options: AverageOptions | None = None,
    *,
    advance: Advance = no_progress,
) -> AverageReport:
    """Average checkpoints of one model, in any format and layout, into a checkpoint that training can start from.

    The output appears only when it is complete and on the disk. Call the function again with the same arguments to
    resume an interrupted average. Example:

        average_checkpoints(["run/checkpoints/step-00000500", "run"], "ckpt/average", AverageOptions(decay="linear"))

    Args:
        paths: checkpoints, run directories (their newest checkpoints) or Hugging Face folders; at least two.
        output: the checkpoint to create; it must not exist.
        advance: progress callback, see `Advance`.

    Raises:
        UserError: an input does not exist or is named twice, the output exists or is inside an input, the weights are
            wrong, or the disk is too small.
        RefusedError: an input is corrupt, changes while it is read, or is another model than the first one.
        CptError: the operating system failed, for example with a full disk.
    """
    output, options = Path(output), options or AverageOptions()
    refuse_existing(output)
    with os_errors_as_cpt_errors(work_folder(output)):
        inputs = open_inputs([Path(path) for path in paths], output, named_model=options.model, verify=options.verify)
        started = time.perf_counter()
        weights = _choose_weights(inputs, options)
        source = averaged_source(inputs, weights, find_dtype(options.dtype))
        provenance = _provenance(inputs, weights, options)

        def write_files(folder: Path, written: Mapping[str, WrittenFile]) -> None:
            write_records(
                folder,
                output.name,
                source,
                source.specs,
                written,
                state={key: inputs[0].state.get(key) for key in ("tokenizer_fingerprint", "eod_id")},
                run=inputs[0].kept_settings(),
                provenance=provenance,
            )

        workers = options.workers or min(os.cpu_count() or 1, _MAX_WORKERS)
        writing = ImportOptions(target=options.target, workers=workers, allow_nan=True)
        job = _job(source, weights, options)
        sizes = write_checkpoint(source, source.specs, output, job, writing, write_files, advance)
    return AverageReport(
        inputs=provenance["inputs"],
        weights=provenance["weights"],
        notes=[*describe_differences(inputs), *_describe_rates(inputs, options)],
        num_tensors=len(source.specs),
        num_parameters=sum(math.prod(spec.shape) for spec in source.specs.values()),
        num_bytes=sizes.num_bytes,
        input_bytes=sum(spec.num_bytes for each in inputs for spec in each.opened.specs.values()),
        num_files=sizes.num_files,
        num_kept=sizes.num_kept,
        seconds=time.perf_counter() - started,
    )


def averaged_source(
    inputs: Sequence[AverageInput], weights: Sequence[float], dtype: torch.dtype | None = None
) -> SourceCheckpoint:
    """Return a source whose tensors are the weighted sums of the inputs' tensors.

    Model section and side files come from the first input.

    Args:
        dtype: of the result; None: the dtype of each tensor, or the wider one where the inputs differ.
    """
    first = inputs[0].opened
    specs = {
        name: TensorSpec(
            spec.shape, dtype or reduce(torch.promote_types, (each.opened.specs[name].dtype for each in inputs))
        )
        for name, spec in first.specs.items()
    }

    def read(name: str, first_row: int, last_row: int) -> torch.Tensor:
        shape = specs[name].shape[1:]
        rows = torch.empty((last_row - first_row, *shape), dtype=specs[name].dtype)
        step = max(1, _BLOCK_BYTES // (math.prod(shape) * rows.itemsize))
        for start in range(first_row, last_row, step):
            stop = min(last_row, start + step)
            total = weighted_sum(
                (weight, each.opened.read(name, start, stop)) for weight, each in zip(weights, inputs, strict=True)
            )
            if not is_finite(total):
                raise _not_finite(inputs, name, start, stop)
            rows[start - first_row : stop - first_row] = cast(name, total, rows.dtype)
        return rows

    identities = tuple(identity for each in inputs for identity in each.opened.identities)
    return replace(first, specs=specs, read=read, identities=identities, origins={}, groups=None)


def weighted_sum(terms: Iterable[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """Return w1 * x1 + w2 * x2 + ... in fp32.

    The terms are added in their order. Each product and each sum is rounded to fp32, so numpy gives the same bits:
    multiplication and addition stay two operations, since a fused one would round once and depends on the processor.

    Args:
        terms: weights that fp32 holds exactly, and contiguous tensors, which may be overwritten; only one of them is
            in memory at a time.
    """
    total: torch.Tensor | None = None
    for weight, tensor in terms:
        if total is None:
            total = torch.empty(tensor.shape, dtype=torch.float32)
            for sums, part in zip(_parts(total), _parts(tensor), strict=True):
                sums.copy_(part).mul_(weight)
        else:
            for sums, part in zip(_parts(total), _parts(tensor), strict=True):
                sums.add_(part.to(torch.float32).mul_(weight))
    assert total is not None
    return total


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.view(-1)
    return (flat[start : start + _CACHED_ELEMENTS] for start in range(0, flat.numel(), _CACHED_ELEMENTS))


def _not_finite(inputs: Sequence[AverageInput], name: str, first: int, last: int) -> RefusedError:
    wrong = [str(each.path) for each in inputs if not is_finite(each.opened.read(name, first, last))]
    if not wrong:
        return RefusedError(f"{name}: the sum of the inputs exceeds the range of fp32; average other checkpoints")
    return RefusedError(
        f"{name}: holds weights that are NaN or infinite in {', '.join(wrong)}; average without this checkpoint"
    )


def _choose_weights(inputs: Sequence[AverageInput], options: AverageOptions) -> list[float]:
    if options.decay is not None:
        steps = [each.step for each in inputs]
        known = [step for step in steps if step is not None]
        return decay_weights(options.decay, known if len(known) == len(steps) else range(len(steps)))
    if options.weights is not None:
        return given_weights(options.weights, len(inputs))
    return uniform_weights(len(inputs))


def _describe_rates(inputs: Sequence[AverageInput], options: AverageOptions) -> list[str]:
    """Return notes about what a decay's weights assume: one run, at a constant rate, with known steps."""
    if options.decay is None:
        return []
    notes = []
    if any(each.step is None for each in inputs):
        notes.append("some steps are unknown: the decay takes the checkpoints as equally spaced")
    rates = {float(rate) for each in inputs if (rate := each.state.get("next_rate")) is not None}
    if len(rates) > 1:
        notes.append(
            f"the learning rate changes from {max(rates):.3g} to {min(rates):.3g} over these checkpoints; the decay of "
            "the weights comes on top of it"
        )
    return notes


def _provenance(inputs: Sequence[AverageInput], weights: Sequence[float], options: AverageOptions) -> dict[str, Any]:
    return {
        "command": "average",
        "weights": options.decay or ("uniform" if options.weights is None else "given"),
        "arithmetic": _ARITHMETIC,
        "inputs": [
            {
                "path": str(each.path.resolve()),
                "kind": each.opened.kind,
                "step": each.step,
                "run_id": each.state.get("run_id"),
                "digest": each.digest(),
                "weight": weight,
            }
            for each, weight in zip(inputs, weights, strict=True)
        ],
    }


def _job(source: SourceCheckpoint, weights: Sequence[float], options: AverageOptions) -> Mapping[str, Any]:
    return {
        "software": __version__,
        "sources": source.identity(),
        "model": source.model.model_dump(mode="json"),
        "weights": list(weights),
        "decay": options.decay,
        "dtype": options.dtype,
        "target": asdict(options.target),
    }
