"""The model as lm-evaluation-harness sees it: texts in, log-likelihoods and texts out.

Tokenization, truncation and stop texts follow the harness's `hf` backend (lm_eval/models/huggingface.py of lm-eval
0.4.13), so both give the same numbers.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.evaluate.finished_requests import FinishedRequests, request_key
from megatron_cpt.evaluate.ranks import LeadingEngine, decode_text
from megatron_cpt.evaluate.requests import Generation, GenerationOptions, Score, ScoreRequest

logger = logging.getLogger(__name__)

_KNOWN_OPTIONS = {"do_sample", "temperature", "top_p", "top_k", "seed"}
_DEFAULT_NEW_TOKENS = 256  # as the `hf` backend

Answer = TypeVar("Answer", Score, Generation)
Tokens = tuple[int, ...]


@dataclass
class RequestCounts:
    """Requests of an evaluation.

    Attributes:
        total: requests of the tasks.
        answered_from_file: requests whose answer the file of finished requests had.
        truncated: prompts that were longer than the model's length, so that their beginning was cut off.
    """

    total: int = 0
    answered_from_file: int = 0
    truncated: int = 0


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """Language model of lm-evaluation-harness on an engine; used on rank 0.

    Args:
        engine: scores and generates token ids.
        tokenizer: of the model; its `eos_id` ends a generated text, and begins a text if there is no start id.
        add_bos: put the start id in front of every prompt; None: as the tokenizer's own template does.
        finished: file with the answers of finished requests; None keeps none.
        scope: digest of everything that the answers depend on besides the request itself.
        advance: called with the number of newly finished requests, and the number of all known so far.
    """

    def __init__(
        self,
        engine: LeadingEngine,
        tokenizer: Tokenizer,
        *,
        add_bos: bool | None = None,
        finished: FinishedRequests | None = None,
        scope: str = "",
        advance: Callable[[int, int], None] = lambda amount, total: None,
    ) -> None:
        super().__init__()
        if tokenizer.eos_id is None:
            raise UserError("evaluation: the tokenizer has no id that ends a text; name its eos_token in its files")
        self._engine, self._ids, self._eos_id = engine, tokenizer, tokenizer.eos_id
        self._template = _template(tokenizer, add_bos)
        self._bos_text = tokenizer.decode([self.prefix_token_id])
        self._finished, self._scope, self._advance = finished, scope, advance
        self.counts = RequestCounts()

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self._eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id in front of a text without a context."""
        return self._ids.bos_id if self._ids.bos_id is not None else self._eos_id

    @property
    def max_length(self) -> int:
        """Largest number of tokens in a forward pass."""
        return self._engine.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, in the tokenizer's template unless the text begins with the start token."""
        if add_special_tokens is None:
            add_special_tokens = not (self._bos_text and string.startswith(self._bos_text))
        before, after = self._template if add_special_tokens else ([], [])
        return [*before, *self._ids.encode(string), *after]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return decode_text(self._ids, tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation."""
        self._begin(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), before, ids in requests:
            if not ids:
                raise UserError(f"a task asks for the likelihood of an empty answer ({continuation!r}); fix its file")
            if not before:
                raise UserError(
                    f"a task asks for the likelihood of {continuation!r} after blanks only ({context!r}); "
                    "fix its file or its documents"
                )
        pairs = [ScoreRequest(tuple(context), tuple(ids)) for _, context, ids in requests]
        return [(score.logprob, score.is_greedy) for score in self._score(pairs, Counter(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, in windows that the harness defines."""
        self._begin(requests)
        windows: list[list[ScoreRequest]] = []
        for instance in requests:
            tokens = self.tok_encode(instance.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = map(make_disjoint_window, rolling)
            windows.append([ScoreRequest(tuple(context), tuple(ids)) for context, ids in pairs])
        # A request counts as finished with its last window.
        last = Counter(own[-1] for own in windows if own)
        self._advance(sum(not own for own in windows), self.counts.total)
        scores = iter(self._score([window for own in windows for window in own], last))
        return [sum(next(scores).logprob for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text generated after each prompt, up to its first stop text."""
        self._begin(requests)
        eos_text = self._ids.decode([self._eos_id])
        calls: dict[tuple[GenerationOptions, tuple[str, ...]], list[tuple[int, Tokens]]] = defaultdict(list)
        seen: Counter[tuple[Tokens, GenerationOptions]] = Counter()
        for number, instance in enumerate(requests):
            context, arguments = instance.args
            options, stops = self._generation_options(arguments, instance.task_name, eos_text)
            prompt = self._truncated(tuple(self.tok_encode(context)), options.max_new_tokens, instance.task_name)
            if options.temperature:  # a repeated prompt gets another sample
                seen[prompt, options] += 1
                options = GenerationOptions(**{**vars(options), "seed": options.seed + seen[prompt, options] - 1})
            calls[options, stops].append((number, prompt))
        texts = [""] * len(requests)
        for (options, stops), prompts in calls.items():
            for (number, _), answer in zip(prompts, self._generate(prompts, options, stops), strict=True):
                text = self.tok_decode(answer.token_ids)
                texts[number] = postprocess_generated_text(text, list(stops), think_end_token=None)
        return texts

    def _begin(self, requests: Sequence[Instance]) -> None:
        self.counts.total += len(requests)
        self._advance(0, self.counts.total)

    def _score(self, requests: Sequence[ScoreRequest], weights: Mapping[ScoreRequest, int]) -> list[Score]:
        limit = self.max_length + 1
        self.counts.truncated += sum(len(one.context) + len(one.continuation) > limit for one in requests)
        return self._answers(
            requests,
            keys=lambda one: request_key(self._scope, "score", [self.max_length, one.context, one.continuation]),
            parse=lambda plain: Score(**plain),
            compute=self._engine.score,
            weights=weights,
        )

    def _generate(
        self, prompts: Sequence[tuple[int, Tokens]], options: GenerationOptions, stops: tuple[str, ...]
    ) -> list[Generation]:
        plain = {**vars(options), "stop_ids": sorted(options.stop_ids), "stops": stops, "max_length": self.max_length}
        ids = [prompt for _, prompt in prompts]
        return self._answers(
            ids,
            keys=lambda prompt: request_key(self._scope, "generate", [plain, prompt]),
            parse=lambda found: Generation(tuple(found["token_ids"]), found["reason"]),
            compute=lambda unique, known, on_batch: self._engine.generate(unique, options, stops, known, on_batch),
            weights=Counter(ids),
        )

    def _answers(
        self,
        requests: Sequence[Any],
        *,
        keys: Callable[[Any], bytes],
        parse: Callable[[Any], Answer],
        compute: Callable[[list[Any], dict[int, Answer], Callable[[dict[int, Answer]], None]], list[Answer]],
        weights: Mapping[Any, int],
    ) -> list[Answer]:
        """Return the answer of every request; equal requests are computed once, and finished ones not again.

        Args:
            keys: returns the key of a request in the file of finished requests.
            parse: returns an answer from its plain values in the file.
            compute: the engine, on the whole request set.
            weights: number of the harness's requests that are finished with a request.
        """
        unique = list(dict.fromkeys(requests))
        known = [keys(one) for one in unique]
        found = self._finished.find(known) if self._finished is not None else {}
        finished = {number: parse(found[key]) for number, key in enumerate(known) if key in found}
        num_finished = sum(weights[unique[number]] for number in finished)
        self.counts.answered_from_file += num_finished
        self._advance(num_finished, self.counts.total)

        def keep(batch: dict[int, Answer]) -> None:
            self._keep({known[number]: asdict(answer) for number, answer in batch.items()})
            self._advance(sum(weights[unique[number]] for number in batch), self.counts.total)

        if len(finished) == len(unique):
            answers = [finished[number] for number in range(len(unique))]
        else:
            answers = compute(unique, finished, keep)
        by_request = dict(zip(unique, answers, strict=True))
        return [by_request[one] for one in requests]

    def _keep(self, answers: Mapping[bytes, Any]) -> None:
        """Write finished answers; if that fails the evaluation continues without the file."""
        if self._finished is None:
            return
        try:
            self._finished.add(answers)
        except CptError as error:
            logger.warning("%s; the evaluation continues, but cannot be resumed", error)
            self._finished = None

    def _generation_options(
        self, arguments: Mapping[str, Any], task: str | None, eos_text: str
    ) -> tuple[GenerationOptions, tuple[str, ...]]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), _DEFAULT_NEW_TOKENS))
        stops = handle_stop_sequences(options.pop("until", None), eos=eos_text or None)
        max_new_tokens = options.pop("max_gen_toks")
        if unknown := sorted(set(options) - _KNOWN_OPTIONS):
            raise UserError(
                f"task {task}: generation_kwargs: {', '.join(unknown)} not supported; "
                f"remove it, or use {', '.join(sorted(_KNOWN_OPTIONS))}, until and max_gen_toks"
            )
        sampling = {name: options[name] for name in ("top_p", "top_k", "seed") if options.get(name) is not None}
        temperature = float(options.get("temperature") or 0.0) if options["do_sample"] else 0.0
        found = GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=frozenset([self._eos_id]),
            **(sampling if temperature else {}),
        )
        if (problem := found.problem()) is not None:
            name, advice = problem
            key = "max_gen_toks" if name == "max_new_tokens" else name
            raise UserError(f"task {task}: generation_kwargs: {key}: {getattr(found, name)}; {advice}")
        return found, tuple(stops)

    def _truncated(self, prompt: Tokens, max_new_tokens: int, task: str | None) -> Tokens:
        longest = self.max_length - max_new_tokens
        if longest <= 0:
            raise UserError(
                f"task {task}: max_gen_toks: {max_new_tokens} leaves no room for a prompt in the model's "
                f"{self.max_length} tokens; set fewer in generation_kwargs of the task's file"
            )
        self.counts.truncated += len(prompt) > longest
        # The harness allows an empty prompt; its text then begins as a document does.
        return prompt[-longest:] or (self.prefix_token_id,)


def _template(tokenizer: Tokenizer, add_bos: bool | None) -> tuple[list[int], list[int]]:
    """Return the ids before and after each text."""
    if add_bos is False:
        return [], []
    before, after = tokenizer.template
    if add_bos and not before and not after:
        if tokenizer.bos_id is None:
            raise UserError("--add-bos: the tokenizer names no id that begins a text; remove the option")
        before = [tokenizer.bos_id]
    return before, after
