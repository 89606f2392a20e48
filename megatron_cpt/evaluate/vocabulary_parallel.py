"""Log-probabilities, largest logits and samples from logits whose vocabulary is divided over tensor-parallel ranks.

Every rank of a tensor-parallel group calls these functions and gets the same answer, bit for bit.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.evaluate.requests import GenerationOptions

_ROWS_AT_ONCE = 256


def own_logits(logits: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return this rank's columns in fp32, with -inf for padding (ids at and above `vocab`); may change its argument.

    Args:
        logits: (n, columns of this rank).
    """
    logits = logits.float()
    logits[:, max(0, vocab - _first_column(logits)) :] = float("-inf")
    return logits


def log_probabilities(logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each target in the row of logits with its number.

    Args:
        logits: result of `own_logits`.
        rows, targets: (m,) row and token id.
    """
    # in parts, because torch makes a copy: 2,048 rows of a vocabulary of 256,000 would take 2 GB more
    local = torch.cat([torch.logsumexp(part, dim=-1) for part in torch.split(logits, _ROWS_AT_ONCE)])
    largest = _reduced(local, dist.ReduceOp.MAX)
    # exp(0) and log(1) are exact, so one rank gives `local` unchanged
    total = largest + _reduced(torch.exp(local - largest), dist.ReduceOp.SUM).log()
    columns = targets - _first_column(logits)
    is_mine = (columns >= 0) & (columns < logits.shape[1])
    chosen = logits[rows, columns.clamp(0, logits.shape[1] - 1)]
    return _reduced(torch.where(is_mine, chosen, torch.zeros_like(chosen)), dist.ReduceOp.SUM) - total[rows]


def largest_ids(logits: torch.Tensor) -> torch.Tensor:
    """Return for each row the id with the largest logit; of equal ones, the first; -1 where a logit is NaN.

    Args:
        logits: result of `own_logits`.
    """
    values, columns = logits.max(dim=-1)  # the first of equal ones
    ids = torch.where(values.isnan(), -1, columns + _first_column(logits))
    values = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # so that -1 wins over all ranks
    is_largest = values == _reduced(values, dist.ReduceOp.MAX)
    return _reduced(torch.where(is_largest, ids, torch.iinfo(torch.int64).max), dist.ReduceOp.MIN)


def most_likely(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each row's most likely ids, their log-probabilities, and the log of the probability of all other ids.

    Args:
        logits: result of `own_logits`.
        top_k: number of ids, at most the vocabulary.

    Returns:
        ids (n, top_k), log-probabilities (n, top_k) in descending order, and (n,) -inf where nothing is left.
    """
    parts = [_most_likely(part, top_k) for part in torch.split(logits, _ROWS_AT_ONCE)]
    ids, log_probs, log_tail = (torch.cat(list(tensors)) for tensors in zip(*parts, strict=True))
    return ids, log_probs, log_tail


def _most_likely(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, columns = _first_column(logits), logits.shape[1]
    total = _log_sum_exp(logits)
    values, places = logits.topk(min(top_k, columns), dim=-1)
    values, ids = _gathered(values), _gathered(places + first)
    values, chosen = values.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_k], ids.gather(1, chosen)[:, :top_k]
    # the tail from its own terms: 1 minus the sum of the top_k would lose all digits of a small one
    is_mine = (ids >= first) & (ids < first + columns)
    kept = torch.nn.functional.pad(logits, (0, 1)).scatter_(1, torch.where(is_mine, ids - first, columns), -math.inf)
    return ids, values - total[:, None], _log_sum_exp(kept[:, :-1]) - total


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the summed exponentials of each row over all ranks; -inf where every logit is."""
    local = torch.logsumexp(logits, dim=-1)
    largest = _reduced(local, dist.ReduceOp.MAX)
    # exp(0) and log(1) are exact, so one rank gives `local` unchanged
    base = largest.clamp_min(torch.finfo(local.dtype).min)
    return base + _reduced(torch.exp(local - base), dist.ReduceOp.SUM).log()


def sampled_ids(logits: torch.Tensor, draws: torch.Tensor, options: GenerationOptions) -> torch.Tensor:
    """Return for each row an id sampled with temperature, top_k and top_p; -1 where a logit is NaN.

    Args:
        logits: result of `own_logits`.
        draws: (n,) fp64, uniform in [0, 1).
    """
    full = _gathered(logits).double()
    is_nan = full.isnan().any(dim=-1)
    # minus the largest, so that a very small temperature makes no infinity of it
    full = (full - full.amax(dim=-1, keepdim=True)) / options.temperature
    probabilities, ids = torch.softmax(full, dim=-1).sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        probabilities[:, options.top_k :] = 0.0
    before = probabilities.cumsum(dim=-1) - probabilities  # of the more likely tokens
    limit = options.top_p * probabilities.sum(dim=-1, keepdim=True)
    kept = torch.where(before < limit, probabilities, torch.zeros_like(probabilities))
    kept[:, 0] = probabilities[:, 0]
    cumulative = kept.cumsum(dim=-1)
    # the first token whose cumulative probability is above the draw; rounding must not lead past the last kept one
    chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    last = ((kept > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # NaN is not above 0
    return torch.where(is_nan, -1, ids.gather(1, torch.minimum(chosen, last))[:, 0])


def draw(seed: int, prompt: bytes, position: int) -> float:
    """Return a number in [0, 1) that depends on the seed, the prompt and the position of the new token only."""
    digest = hashlib.blake2b(prompt, digest_size=8, key=f"{seed}:{position}".encode()).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _first_column(logits: torch.Tensor) -> int:
    return int(parallel_state.get_tensor_model_parallel_rank()) * logits.shape[1]


def _reduced(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, operation, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def _gathered(logits: torch.Tensor) -> torch.Tensor:
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)
