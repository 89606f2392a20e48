"""Checks of inputs and outputs that all commands which rewrite datasets share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError


def open_with_one_dtype(prefixes: Sequence[str]) -> list[IndexedDataset]:
    """Open datasets that will be written together, and check that their token types are equal.

    Raises:
        UserError: no dataset is given, a file is missing, or the token types differ.
        RefusedError: a dataset is damaged.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if not datasets:
        raise UserError("no dataset is given; name at least one prefix of .bin/.idx")
    first = datasets[0]
    for dataset in datasets:
        if dataset.dtype != first.dtype:
            raise UserError(
                f"{dataset.prefix}: has {dataset.dtype.name} tokens, {first.prefix} has {first.dtype.name}: their "
                "vocabularies differ; process them separately, or build one again with `megatron-cpt preprocess`"
            )
    return datasets


def require_free(output_prefix: str, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Check that an output is none of the inputs, and does not exist unless `overwrite` is set.

    Raises:
        UserError: the output may not be written.
    """
    existing = [f"{output_prefix}{end}" for end in (".bin", ".idx") if os.path.exists(f"{output_prefix}{end}")]
    if any(os.path.realpath(f"{output_prefix}.bin") == os.path.realpath(f"{prefix}.bin") for prefix in inputs):
        raise UserError(f"{output_prefix}: is an input too; choose another output")
    if existing and not overwrite:
        raise UserError(f"{' and '.join(existing)}: exists already; choose another output, or replace it: --overwrite")
