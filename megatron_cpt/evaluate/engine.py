"""Log-likelihoods and generation on megatron-core model chunks, at any TP x PP x VPP x DP.

The bits of a matrix product depend on its shape. So that an answer does not depend on the batch size or on the order of
the requests, shapes depend on the request set only: all requests are sorted and packed into rows, and every row is a
forward pass of its own (`token_tree.py`). The batch size is the number of rows in flight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.backend import Ranks
from megatron_cpt.config import RunConfig, format_number_of
from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.requests import (
    EngineCounts,
    Generation,
    GenerationOptions,
    NotFiniteError,
    Score,
    ScoreRequest,
)
from megatron_cpt.evaluate.row_forward import Row, RowRunner
from megatron_cpt.evaluate.text_group import Stop, Text, TextGroup, draw_keys
from megatron_cpt.evaluate.token_tree import TokenRow, pack_rows
from megatron_cpt.evaluate.vocabulary_parallel import draw, largest_ids, log_probabilities, own_logits, sampled_ids
from megatron_cpt.model.build_model import Model

T = TypeVar("T")

_MULTIPLE = 16  # of row lengths: few shapes, little padding
_QUANTIZED_MULTIPLE = 32  # FP8 and FP4 kernels want multiples of 16 tokens, MXFP8 of 32


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
        self,
        model: Model,
        run: RunConfig,
        ranks: Ranks,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        row_tokens: int = 4096,
        group_size: int = 16,
    ) -> None:
        """Prepare an engine.

        Args:
            model: model chunks of this rank with their configuration.
            run: the run that built the model.
            ranks: position of this process.
            batch_size: number of rows that a data-parallel rank has in the pipeline at once. `on_batch` is called after
                each batch.
            max_length: None: `model.max_positions`, or the run's longest sequence.
            row_tokens: tokens per row. Changes the last bits of answers.
            group_size: prompts that are generated together. Changes the last bits of answers.

        Raises:
            UserError: the run uses context parallelism.
        """
        if run.parallel.context > 1:
            raise UserError(
                f"parallel.context: {run.parallel.context}: evaluation does not split sequences; evaluate a checkpoint "
                "of the run with parallel.context=1"
            )
        self.vocab_size = run.model.vocab
        self.max_length = max_length or run.model.max_positions or run.longest_sequence
        self.counts = EngineCounts()
        self._own = EngineCounts()  # of this replica since the last exchange
        self._runner = RowRunner(model.chunks, model.config, device=ranks.device)
        self._ranks = ranks
        self._batch_size = batch_size
        self._row_tokens = row_tokens
        self._group_size = group_size
        is_quantized = run.precision.fp8 is not None or run.precision.fp4 is not None
        self._multiple = _QUANTIZED_MULTIPLE if is_quantized else _MULTIPLE
        self._smallest_width = _QUANTIZED_MULTIPLE if is_quantized else 1

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
            UserError: a request has no context or no continuation, or its continuation is longer than `max_length`.
            NotFiniteError: a log-likelihood is NaN or infinite.
        """
        self._check_ids([ids for request in requests for ids in (request.context, request.continuation)])
        inputs = [self._input_of(request) for request in requests]
        lengths = [len(request.continuation) for request in requests]
        rows = pack_rows(inputs, budget=self._row_tokens, multiple=self._multiple, needed=lengths)
        scores = dict(finished or {})
        rows = [row for row in rows if not scores.keys() >= row.paths.keys()]
        self.counts.request_tokens += sum(len(inputs[number]) for row in rows for number in row.paths)
        with self._runner.evaluating():
            for batch in self._batches(rows, self._batch_size):
                own = batch[self._ranks.data_parallel_rank :: self._ranks.data_parallel_size]
                results = self._run_rows([self._scoring_row(row, requests) for row in own])
                for row in own:
                    self._count_own(len(row), row.num_tokens)
                new = self._shared({number: score for one in results for number, score in one.items()}, scores)
                _check_finite(math.isfinite(score.logprob) for score in new.values())
                scores |= new
                if on_batch is not None and new:
                    on_batch(new)
        return [scores[number] for number in range(len(requests))]

    def _input_of(self, request: ScoreRequest) -> tuple[int, ...]:
        """Return the tokens that go through the model: all but the last one, at most the last `max_length`."""
        if not request.context or not request.continuation:
            raise UserError("request: context and continuation need a token each; put a prefix token before a text")
        if len(request.continuation) > self.max_length:
            raise UserError(
                f"request: a continuation of {len(request.continuation):,} tokens is longer than the model's length of "
                f"{self.max_length:,}; score it in windows"
            )
        return (request.context + request.continuation)[:-1][-self.max_length :]

    def _check_ids(self, sequences: Sequence[Sequence[int]]) -> None:
        for ids in sequences:
            if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                wrong = next(number for number in ids if not 0 <= number < self.vocab_size)
                raise UserError(
                    f"token id {wrong}: the model has the ids 0 to {self.vocab_size - 1:,}; use the tokenizer that "
                    "belongs to this model"
                )

    def _scoring_row(self, row: TokenRow, requests: Sequence[ScoreRequest]) -> Row[dict[int, Score]]:
        # the token before each scored one, which predicts it
        before = {number: path[-len(requests[number].continuation) :] for number, path in row.paths.items()}
        selected, places = np.unique(np.concatenate(list(before.values())), return_inverse=True)
        targets = np.concatenate([np.array(requests[number].continuation) for number in before])

        def collect(logits: torch.Tensor) -> dict[int, Score]:
            logits = own_logits(logits, self.vocab_size)
            rows, wanted = (torch.from_numpy(x).to(logits.device) for x in (places, targets))
            by_token = log_probabilities(logits, rows, wanted).double().tolist()
            is_greedy = (largest_ids(logits)[rows] == wanted).tolist()
            scores, start = {}, 0
            for number, indices in before.items():
                part = slice(start, start + len(indices))
                scores[number] = Score(sum(by_token[part]), all(is_greedy[part]), len(indices))
                start += len(indices)
            return scores

        return Row.of_tokens(row, torch.from_numpy(selected), collect, self._ranks.device)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: GenerationOptions,
        *,
        stop: Stop | None = None,
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
            NotFiniteError: the logits of a new token are NaN.
        """
        self._check_prompts(prompts)
        answers = dict(finished or {})
        keys = draw_keys(prompts)
        order = sorted(range(len(prompts)), key=lambda number: (prompts[number], number))
        groups = [order[start : start + self._group_size] for start in range(0, len(order), self._group_size)]
        groups = [group for group in groups if not answers.keys() >= set(group)]
        with self._runner.evaluating():
            for batch in self._batches(groups, self._runner.config.pipeline_model_parallel_size):
                own = batch[self._ranks.data_parallel_rank :: self._ranks.data_parallel_size]
                texts = [[Text(n, prompts[n], keys[n], self.max_length, options, stop) for n in group] for group in own]
                self._generate_groups(texts, options)
                new = self._shared({text.number: text.answer() for group in texts for text in group}, answers)
                _check_finite(answer.reason != "not_finite" for answer in new.values())
                self.counts.request_tokens += sum(len(prompts[n]) + len(answer.token_ids) for n, answer in new.items())
                answers |= new
                if on_batch is not None and new:
                    on_batch(new)
        return [answers[number] for number in range(len(prompts))]

    def _check_prompts(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self._check_ids(prompts)
        for prompt in prompts:
            if not 0 < len(prompt) < self.max_length:
                raise UserError(
                    f"prompt: {len(prompt):,} tokens; give between 1 and {self.max_length - 1:,}, one less than the "
                    "model's length"
                )

    def _generate_groups(self, groups: Sequence[Sequence[Text]], options: GenerationOptions) -> None:
        """Generate groups of texts; the groups go through the pipeline together."""
        running = [self._prefill(texts, options) for texts in groups]
        while running := [group for group in running if group.shrink()]:
            running.sort(key=lambda group: -group.width)  # a stable sort; rows of one length are neighbors
            rows = [group.next_row(self._chooser(group.slots, options)) for group in running]
            ids = self._from_last_stage(self._run_rows(rows), [group.width for group in running])
            for group, new in zip(running, ids, strict=True):
                self._count_own(group.width, len(group.active))
                group.add(new)

    def _prefill(self, texts: Sequence[Text], options: GenerationOptions) -> TextGroup:
        """Run the prompts of a group, fill its cache and choose the first new token of each text."""
        group = TextGroup(texts, self._smallest_width, self._ranks.device)
        prompts = [text.prompt for text in texts]
        for packed in pack_rows(prompts, budget=self._row_tokens, multiple=self._multiple):
            last = torch.tensor([path[-1] for path in packed.paths.values()])
            choose = self._chooser([texts[slot] for slot in packed.paths], options)
            row = Row.of_tokens(packed, last, choose, self._ranks.device)
            row.fill(group.cache, packed.paths)
            (ids,) = self._from_last_stage(self._runner([row]), [len(packed.paths)])
            self._count_own(len(packed), packed.num_tokens)
            for slot, new in zip(packed.paths, ids, strict=True):
                texts[slot].add(new)
        return group

    def _chooser(
        self, texts: Sequence[Text | None], options: GenerationOptions
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that chooses the next token of each text from its logits."""

        def choose(logits: torch.Tensor) -> torch.Tensor:
            logits = own_logits(logits, self.vocab_size)
            if not options.temperature:
                return largest_ids(logits)
            draws = [0.0 if text is None else draw(options.seed, text.key, len(text.new)) for text in texts]
            return sampled_ids(logits, torch.tensor(draws, dtype=torch.float64, device=logits.device), options)

        return choose

    def _from_last_stage(self, chosen: Sequence[torch.Tensor], widths: Sequence[int]) -> list[list[int]]:
        """Return the chosen ids of each row on all pipeline stages."""
        ids = torch.cat(list(chosen)) if chosen else torch.zeros(sum(widths), dtype=torch.int64).to(self._ranks.device)
        if self._runner.config.pipeline_model_parallel_size > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(ids, source, group=parallel_state.get_pipeline_model_parallel_group())
        return [part.tolist() for part in torch.split(ids, list(widths))]

    def _batches(self, work: Sequence[T], size: int) -> Iterator[Sequence[T]]:
        """Yield `size` pieces of work for each replica."""
        size *= self._ranks.data_parallel_size
        for start in range(0, len(work), size):
            yield work[start : start + size]

    def _run_rows(self, rows: Sequence[Row[T]]) -> list[T]:
        """Run rows sorted by length; rows of one length go through the pipeline together."""
        results = []
        for _, same in groupby(rows, key=lambda row: len(row.tokens)):
            results += self._runner(list(same))
        return results

    def _count_own(self, forward_tokens: int, without_padding: int) -> None:
        self._own.forward_tokens += forward_tokens
        self._own.padding_tokens += forward_tokens - without_padding

    def _shared(self, own: dict[int, T], known: Mapping[int, T]) -> dict[int, T]:
        """Return the answers of all replicas that are not known yet, and add up the counts; a collective call."""
        # every rank of a replica has counted its tokens, and ranks of the last stage have its answers
        parts: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(parts, (self._ranks.data_parallel_rank, self._own, own))
        for counts in {replica: counts for replica, counts, _ in parts}.values():
            self.counts.forward_tokens += counts.forward_tokens
            self.counts.padding_tokens += counts.padding_tokens
        self._own = EngineCounts()
        merged = {number: answer for _, _, answers in parts for number, answer in answers.items()}
        return {number: merged[number] for number in sorted(merged) if number not in known}


def _check_finite(are_finite: Iterable[bool]) -> None:
    """Raise on every rank if an answer of a batch is not a number; a comparison with NaN would call it right."""
    if wrong := list(are_finite).count(False):
        raise NotFiniteError(
            f"the model computes NaN or infinity for {format_number_of(wrong, 'request')} of a batch: its weights are "
            "damaged, or precision.compute is too small for them; take an earlier checkpoint, or precision.compute=fp32"
        )
