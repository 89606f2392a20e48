"""Learning rate, sequence length and batch of a continued run, each with its reason."""

from __future__ import annotations

import math

from megatron_cpt.config import ModelConfig, format_count
from megatron_cpt.errors import UserError
from megatron_cpt.planning.cost.parameters import count_parameters
from megatron_cpt.recipe.commented_yaml import Reasoned
from megatron_cpt.recipe.pretraining import Pretraining

PAPER = "arXiv 2407.07263"
PAPER_SEQ_LENGTH = 4096
PAPER_BATCH_TOKENS = 1152 * PAPER_SEQ_LENGTH
PAPER_TOKENS = 300_000_000_000
_LEAST_RATE, _MOST_RATE = 1e-12, 1.0  # a rate outside is a mistake: the peaks below are a thousand times smaller than 1

# Parameters and peak learning rate of GPT-3's models, arXiv 2005.14165, table 2.1. Each decays to a tenth of its peak.
_GPT3_PEAKS = (
    (125e6, 6.0e-4),
    (350e6, 3.0e-4),
    (760e6, 2.5e-4),
    (1.3e9, 2.0e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1.0e-4),
    (175e9, 0.6e-4),
)

_USABLE = f"give a learning rate from {_LEAST_RATE:g} to {_MOST_RATE:g}, such as 4.5e-5"


def choose_max_lr(pretraining: Pretraining, *, given: float | None, propose: bool) -> Reasoned[float]:
    """Return the highest learning rate: the last one of pretraining, as given, recorded or proposed.

    Raises:
        UserError: it is neither given nor recorded, and no proposal was asked for; or it is no usable rate.
    """
    recorded = pretraining.record.last_rate
    if given is not None:
        if not _is_usable(given):
            raise UserError(f"--max-lr {given:g}: {_USABLE}")
        other = f"; the checkpoint records {recorded.value:g} ({recorded.reason})" if recorded else ""
        return Reasoned(given, f"eta_max: pretraining's last learning rate, given by --max-lr{other} ({PAPER})")
    if recorded is not None:
        if not _is_usable(recorded.value):
            raise UserError(
                f"{pretraining.path}: the learning rate that pretraining ended on is {recorded.value:g} "
                f"({recorded.reason}), and no run can start there; give another with --max-lr: {_USABLE}"
            )
        return Reasoned(recorded.value, f"eta_max: pretraining's last learning rate: {recorded.reason} ({PAPER})")
    proposal = propose_max_lr(pretraining.model)
    if propose:
        return proposal
    raise UserError(
        f"{pretraining.path}: does not record the learning rate that pretraining ended on, where the run must start; "
        f"give it: --max-lr RATE, or take a proposal, {proposal.value:g}: --propose-lr"
    )


def _is_usable(rate: float) -> bool:
    return _LEAST_RATE <= rate <= _MOST_RATE  # False for NaN


def propose_max_lr(model: ModelConfig) -> Reasoned[float]:
    """Return a tenth of the peak rate of the GPT-3 model that is nearest in size, on a logarithmic scale."""
    parameters = count_parameters(model).total
    size, peak = min(_GPT3_PEAKS, key=lambda row: abs(math.log(row[0] / parameters)))
    return Reasoned(
        float(f"{peak / 10:.12g}"),
        f"A PROPOSAL, not a record (--propose-lr): a tenth of {peak:g}, the peak of GPT-3's model of "
        f"{format_count(size)} parameters (arXiv 2005.14165, table 2.1), the nearest to this model's "
        f"{format_count(parameters)}. GPT-3's cosine ends at a tenth of its peak, and eta_max should be the rate that "
        f"pretraining ended on ({PAPER}). Replace it if you know that rate",
    )


def choose_seq_length(pretraining: Pretraining, given: int | None) -> Reasoned[int]:
    """Return the tokens per sequence: as in pretraining, else at most the paper's 4,096."""
    if given is not None:
        return Reasoned(given, "tokens per sequence, given by --seq-length")
    if recorded := pretraining.record.seq_length:
        return Reasoned(recorded.value, f"tokens per sequence, as in pretraining ({PAPER}): {recorded.reason}")
    model = pretraining.model
    longest = model.rope_scaling.original_max_positions if model.rope_scaling else model.max_positions
    if longest is None or longest >= PAPER_SEQ_LENGTH:
        reason = f"not recorded: the paper's length ({PAPER}), which the model's positions allow; set pretraining's own"
        return Reasoned(PAPER_SEQ_LENGTH, reason)
    return Reasoned(longest, f"not recorded: all positions of the model ({pretraining.model_source})")


def choose_batch(
    pretraining: Pretraining, seq_length: int, tokens: int, *, given: int | None, num_gpus: int | None
) -> Reasoned[int]:
    """Return the sequences per step: as in pretraining, else the paper's tokens, scaled to the length of the run."""
    if given is not None:
        return Reasoned(given, "sequences per step, given by --global-batch")
    recorded = pretraining.record.global_batch
    if recorded is not None:
        return Reasoned(recorded.value, f"sequences per step, as in pretraining ({PAPER}): {recorded.reason}")
    scale = min(1.0, math.sqrt(tokens / PAPER_TOKENS))
    wanted = PAPER_BATCH_TOKENS * scale / seq_length
    unit = num_gpus or (8 if wanted >= 8 else 1)
    batch = max(1, round(wanted / unit)) * unit
    reason = (
        f"sequences per step; not recorded, so the paper's 4.72M tokens per step ({PAPER}) x sqrt(tokens / 300B), at "
        f"most 1, which is {scale:.3g}: the largest useful batch grows with the tokens, not the model (arXiv "
        f"2410.21676; the square root is ours). Rounded to a multiple of {unit}; set pretraining's own"
    )
    return Reasoned(batch, reason)


def choose_min_lr(max_lr: float) -> Reasoned[float]:
    """Return a hundredth of the highest rate."""
    reason = f"eta_min = eta_max / 100, the best of the paper's experiments ({PAPER})"
    return Reasoned(float(f"{max_lr / 100:.12g}"), reason)
