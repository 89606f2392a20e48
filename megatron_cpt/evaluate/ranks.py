"""One rank leads, the others follow: lm-evaluation-harness runs on rank 0, the engine on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.evaluate.requests import Generation, GenerationOptions, NotFiniteError, Score, ScoreRequest

if TYPE_CHECKING:
    from megatron_cpt.evaluate.engine import Engine

T = TypeVar("T")


class StoppedEvaluation(BaseException):
    """Raised on every rank by `LeadingEngine.after_batch` to stop an evaluation; the harness must not catch it."""


class _EngineError(BaseException):
    """Unexpected error of the engine on rank 0, its argument; no fault of a task, so the harness must not catch it."""


@dataclass(frozen=True)
class _ScoreCall:
    requests: Sequence[ScoreRequest]
    finished: Mapping[int, Score]


@dataclass(frozen=True)
class _GenerateCall:
    prompts: Sequence[tuple[int, ...]]
    options: GenerationOptions
    stop_texts: Sequence[str]
    finished: Mapping[int, Generation]


@dataclass(frozen=True)
class _End:
    """End of the leader's work; None: it succeeded."""

    failure: CptError | StoppedEvaluation | None


def decode_text(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    """Return the text of ids, without special tokens such as the end of a document."""
    return tokenizer.decode([number for number in token_ids if number not in tokenizer.special_ids])


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    try:
        yield
    except CptError:
        raise
    except Exception as error:
        raise _EngineError(error) from error


class StopTexts:
    """Detection of stop texts in generated tokens, by decoding the last few.

    Args:
        texts: end a generated text; an empty one is ignored.
        decode: returns the text of token ids.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._texts = [text for text in texts if text]
        self._decode = decode
        # A token has at least one byte; the first two of the tail may decode differently without what precedes them.
        self._tail = max((len(text.encode()) for text in self._texts), default=0) + 2

    def __call__(self, index: int, token_ids: tuple[int, ...]) -> bool:
        """Return whether the last tokens contain a stop text."""
        if not self._texts:
            return False
        tail = self._decode(token_ids[-self._tail :])
        return any(text in tail for text in self._texts)


class LeadingEngine:
    """Engine whose calls on rank 0 run on every rank; the other ranks are inside `lead`.

    Args:
        engine: this rank's engine.
        tokenizer: decodes tokens to find stop texts.
        num_ranks: number of processes.

    Attributes:
        after_batch: called on every rank after each batch of the engine.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, num_ranks: int) -> None:
        self._engine, self._tokenizer, self._num_ranks = engine, tokenizer, num_ranks
        self.max_length = engine.max_length
        self.after_batch: Callable[[], None] = lambda: None

    def score(
        self,
        requests: Sequence[ScoreRequest],
        finished: Mapping[int, Score],
        on_batch: Callable[[dict[int, Score]], None],
    ) -> list[Score]:
        """Return the scores of all requests; only rank 0 calls it."""
        call = _ScoreCall(requests, finished)
        self._broadcast(call)
        with _engine_errors():
            return self._score(call, on_batch)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: GenerationOptions,
        stop_texts: Sequence[str],
        finished: Mapping[int, Generation],
        on_batch: Callable[[dict[int, Generation]], None],
    ) -> list[Generation]:
        """Return the generated tokens of all prompts; only rank 0 calls it."""
        call = _GenerateCall(prompts, options, stop_texts, finished)
        self._broadcast(call)
        with _engine_errors():
            return self._generate(call, on_batch)

    def lead(self, work: Callable[[], T]) -> T | None:
        """Run a function on rank 0, which may call the engine, and follow its calls elsewhere; a collective call.

        Returns:
            The function's result on rank 0, None on the other ranks.

        Raises:
            CptError: on all ranks, if the function raised it; on the other ranks for any exception except one of the
                engine and KeyboardInterrupt, which leave them to the launcher.
            StoppedEvaluation: on all ranks, if `after_batch` raised it.
        """
        if self._num_ranks > 1 and dist.get_rank() != 0:
            self._follow()
            return None
        failure: CptError | StoppedEvaluation | None = CptError("evaluation: rank 0 failed; its message says why")
        abrupt_end: BaseException | None = None
        try:
            result = work()
            failure = None
        except _EngineError as error:
            (abrupt_end,) = error.args
        except KeyboardInterrupt as error:
            abrupt_end = error
        except (CptError, StoppedEvaluation) as error:
            failure = error
            raise
        finally:
            # otherwise they may wait in a collective of the model, and end with this process or by their own signal
            if abrupt_end is None:
                self._broadcast(_End(failure))
        if abrupt_end is not None:
            raise abrupt_end  # out of the handler, so that its traceback is the only one
        return result

    def _follow(self) -> None:
        while True:
            call = self._broadcast(None)
            if isinstance(call, _End):
                if call.failure is not None:
                    raise call.failure
                return
            # Every rank raises these, after the same batch or for the same request; the end of rank 0's work is next.
            with contextlib.suppress(StoppedEvaluation, UserError, NotFiniteError):
                if isinstance(call, _ScoreCall):
                    self._score(call, lambda batch: None)
                else:
                    self._generate(call, lambda batch: None)

    def _score(self, call: _ScoreCall, on_batch: Callable[[dict[int, Score]], None]) -> list[Score]:
        def finish_batch(batch: dict[int, Score]) -> None:
            on_batch(batch)
            self.after_batch()

        return self._engine.score(call.requests, finished=call.finished, on_batch=finish_batch)

    def _generate(self, call: _GenerateCall, on_batch: Callable[[dict[int, Generation]], None]) -> list[Generation]:
        def finish_batch(batch: dict[int, Generation]) -> None:
            on_batch(batch)
            self.after_batch()

        stop = StopTexts(call.stop_texts, lambda ids: decode_text(self._tokenizer, ids))
        return self._engine.generate(
            call.prompts, call.options, stop=stop, finished=call.finished, on_batch=finish_batch
        )

    def _broadcast(self, call: Any) -> Any:
        if self._num_ranks == 1:
            return call
        calls = [call]
        dist.broadcast_object_list(calls, src=0)
        return calls[0]
