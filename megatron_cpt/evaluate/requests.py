"""Requests to the engine and its answers. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_cpt.errors import RefusedError


class NotFiniteError(RefusedError):
    """The model computes NaN or infinite logits."""


@dataclass(frozen=True)
class ScoreRequest:
    """Request for the log-likelihood of a continuation.

    If both together are longer than the model's `max_length` + 1, the beginning of the context is cut off.

    Attributes:
        context: token ids before the continuation; at least one. Rolling log-likelihoods start with a prefix token.
        continuation: token ids to score; at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation.

    Attributes:
        logprob: natural logarithm of the probability of all continuation tokens, summed in fp64.
        is_greedy: every continuation token is the one with the largest logit.
        token_count: number of continuation tokens.
    """

    logprob: float
    is_greedy: bool
    token_count: int


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of generation, for all prompts of a call.

    Attributes:
        max_new_tokens: largest number of tokens to generate per prompt.
        temperature: divisor of the logits; 0 always takes the token with the largest logit (greedy).
        top_p: sample from the most likely tokens that together have this probability.
        top_k: sample from this number of most likely tokens; 0 sets no limit.
        seed: seed of the samples. A draw depends on seed, prompt and position only, not on batch or layout.
        stop_ids: token ids that end a text, such as the end-of-document id; they are not part of it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 1234
    stop_ids: frozenset[int] = frozenset()

    def problem(self) -> tuple[str, str] | None:
        """Return the name of a field outside its range, and what to do; None if all are inside."""
        if self.max_new_tokens < 1:
            return "max_new_tokens", "give 1 or more"
        if not 0 <= self.temperature < math.inf:
            return "temperature", "give 0 for the most likely token, or a finite number"
        if not 0 < self.top_p <= 1:
            return "top_p", "give a probability above 0, at most 1"
        if self.top_k < 0:
            return "top_k", "give a number of tokens, or 0 for no limit"
        return None


StopReason = Literal["stop_id", "stop_text", "max_new_tokens", "max_length", "not_finite"]


@dataclass(frozen=True)
class Generation:
    """Generated tokens of one prompt.

    Attributes:
        token_ids: new tokens, without a stop id.
        reason: cause of the end: a stop id, the caller's `stop` function (`stop_text`), the limit of new tokens, the
            model's length, or logits that are not finite, which an engine never returns.
    """

    token_ids: tuple[int, ...]
    reason: StopReason

    @property
    def stopped(self) -> bool:
        """True if the text ended before a limit was reached."""
        return self.reason in ("stop_id", "stop_text")


@dataclass
class EngineCounts:
    """Tokens that an engine has computed, over all ranks.

    Attributes:
        forward_tokens: tokens that went through the model, padding included.
        padding_tokens: tokens of padding among them.
        request_tokens: tokens of the requests: contexts, continuations, prompts and new tokens. Shared prefixes make
            `forward_tokens` smaller.
    """

    forward_tokens: int = 0
    padding_tokens: int = 0
    request_tokens: int = 0
