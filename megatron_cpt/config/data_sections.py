"""Sections of run.yaml about data: `sources`, `phases` and `documents`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_cpt.config.quantities import Section, TokenCount, expand_paths

ExpandPaths = BeforeValidator(expand_paths)


class OneUnit(Section):
    """Section in which exactly one field is given."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        return self


class FimConfig(Section):
    """Fill in the middle: pieces of documents are reordered to prefix, suffix, middle or suffix, prefix, middle."""

    rate: float = Field(0.5, gt=0, le=1)
    """Share of the pieces that are reordered."""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """Share of the reordered pieces in which the suffix comes first."""
    prefix_id: int = Field(ge=0)
    """Token id in front of the prefix."""
    middle_id: int = Field(ge=0)
    """Token id in front of the middle."""
    suffix_id: int = Field(ge=0)
    """Token id in front of the suffix."""


class SourceConfig(Section):
    """One source of tokens."""

    path: Annotated[str | list[str], ExpandPaths]
    """A prefix of .bin/.idx, a document list NAME.docs, a glob, or a list of these."""
    max_epochs: float | None = Field(None, gt=0)
    """Largest number of epochs of this source in the run; null sets no limit."""
    on_exhausted: Literal["error", "renormalize"] = "error"
    """Action at `max_epochs`: `error` refuses the plan, `renormalize` gives its weight to the rest of the blend."""
    fim: FimConfig | None = None
    """Fill in the middle, for code; null leaves documents unchanged."""
    cache: Annotated[str | None, ExpandPaths] = None
    """Folder on a node-local disk that caches tokens read from an object store or shared disk; null does not cache."""
    tokens: TokenCount | None = None
    """Size of the source, to plan without its files; ignored if the files exist."""

    @property
    def paths(self) -> list[str]:
        """Prefixes, document lists or globs as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Until(OneUnit):
    """End of a phase, in exactly one unit, counted from the start of the run."""

    lr: float | None = Field(None, gt=0, lt=1)
    """End with the last step whose learning rate is above this fraction of `max_lr`."""
    tokens: TokenCount | None = None
    """End when the run has read this many tokens."""
    step: int | None = Field(None, gt=0)
    """Last step of the phase."""


class PhaseBatchConfig(Section):
    """Batch sizes of one phase, in sequences."""

    global_: int | None = Field(None, alias="global", gt=0)
    """Sequences per step over all ranks, without ramp-up; null uses `batch.global` and its ramp-up."""
    micro: int | None = Field(None, gt=0)
    """Sequences per forward pass of one rank; null uses `batch.micro`."""


class PhaseConfig(Section):
    """Part of the run with one blend."""

    name: str = Field(min_length=1)
    """Name of the phase in metrics and plans."""
    blend: dict[str, float] = Field(min_length=1)
    """Weight per source; weights need not sum to 1."""
    until: Until | None = None
    """End of the phase; null for the last phase, which runs to the end."""
    seq_length: int | None = Field(None, gt=0)
    """Tokens per sequence in this phase; null uses the top-level `seq_length`."""
    batch: PhaseBatchConfig | None = None
    """Batch sizes in this phase; null uses the top-level `batch`."""


class DocumentsConfig(Section):
    """Treatment of the boundaries between documents inside a sample."""

    reset_attention: bool = False
    """Let a token attend only to its own document."""
    reset_positions: bool = False
    """Start positions at 0 in each document."""
    eod_loss: bool = True
    """Train on the token that follows an end-of-document token."""
    eod_id: int | None = Field(None, ge=0)
    """End-of-document token id; null uses the id of the tokenizer."""
