"""Log-likelihoods and generation on megatron-core model chunks, at any TP x PP x VPP x DP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_cpt.backend import Ranks
from megatron_cpt.config import RunConfig
from megatron_cpt.evaluate.requests import EngineCounts, Generation, GenerationOptions, Score, ScoreRequest
from megatron_cpt.model.build_model import Model


class Engine:
    """Scores and generates with the model of a job; every rank makes the same calls with the same arguments.

    Answers are identical bit for bit for any batch size, order of requests and number of data-parallel ranks. Rows and
    groups are made from the whole request set, so a call that resumes gives the whole set and the finished answers.
    Between calls the model is unchanged: modes, random states and gradients are as before.

    Attributes:
        vocab_size: token ids of the model, without padding.
        max_length: largest number of tokens in a forward pass of one sequence.
        counts: tokens computed so far.
    """

    def __init__(
        self, model: Model, run: RunConfig, ranks: Ranks, *, batch_size: int = 8, max_length: int | None = None
    ) -> None:
        """Prepare an engine.

        Args:
            model: model chunks of this rank with their configuration.
            run: the run that built the model.
            ranks: position of this process.
            batch_size: number of rows, or groups of prompts, that a data-parallel rank has in the pipeline at once.
            max_length: None: `model.max_positions`, or the run's longest sequence.

        Raises:
            UserError: the run uses context parallelism.
        """
        raise NotImplementedError

    @property
    def counts(self) -> EngineCounts:
        """Tokens computed so far."""
        raise NotImplementedError

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        finished: Mapping[int, Score] | None = None,
        on_batch: Callable[[dict[int, Score]], None] | None = None,
    ) -> list[Score]:
        """Return the scores in the order of the requests, on every rank.

        Args:
            requests: the whole request set.
            finished: scores that an interrupted call has computed, by index; they are not computed again.
            on_batch: called on every rank after each batch, with its new scores by index.

        Raises:
            UserError: a continuation is longer than `max_length`.
        """
        raise NotImplementedError

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: GenerationOptions,
        *,
        stop: Callable[[int, tuple[int, ...]], bool] | None = None,
        finished: Mapping[int, Generation] | None = None,
        on_batch: Callable[[dict[int, Generation]], None] | None = None,
    ) -> list[Generation]:
        """Return the generated tokens in the order of the prompts, on every rank.

        Args:
            prompts: the whole set of prompts, each of at least one token and shorter than `max_length`.
            options: the same for all prompts.
            stop: called after each new token with the prompt's index and its new tokens; True ends the text. Ranks
                must decide alike.
            finished: answers of an interrupted call, by index.
            on_batch: called on every rank after each batch, with its new answers by index.

        Raises:
            UserError: a prompt is empty or too long.
        """
        raise NotImplementedError
