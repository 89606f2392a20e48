"""The engine on one rank: answers do not depend on batches, and the model is unchanged; tests/distributed has more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.backend import rng_state
from megatron_cpt.checkpoint.loading.inference_model import (
    InferenceModel,
    inference_run,
    load_inference_model,
    open_checkpoint,
)
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.requests import Generation, GenerationOptions, NotFiniteError, Score, ScoreRequest
from tests.helpers.hf_models import save_hf_model

MAX_LENGTH = 64  # of the tiny models


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceModel]:
    base = tmp_path_factory.mktemp("engine")
    save_hf_model(base / "hf", "llama")
    import_checkpoint(base / "hf", base / "checkpoint")
    saved = open_checkpoint(base / "checkpoint")
    with load_inference_model(saved, inference_run(saved)) as model:
        yield model


def engine(loaded: InferenceModel, **options: Any) -> Any:
    from megatron_cpt.evaluate.engine import Engine

    return Engine(loaded.model, loaded.run, loaded.ranks, **{"row_tokens": 48, "group_size": 4, **options})


def requests() -> list[ScoreRequest]:
    draw = random.Random(1)
    contexts = [tuple(draw.randrange(101) for _ in range(draw.randrange(1, 30))) for _ in range(10)]
    return [
        ScoreRequest(context, tuple(draw.randrange(101) for _ in range(draw.randrange(1, 6))))
        for context in contexts
        for _ in range(3)
    ]


def prompts() -> list[tuple[int, ...]]:
    return [request.context for request in requests()]


GREEDY = GenerationOptions(max_new_tokens=8)
SAMPLED = GenerationOptions(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3)


def test_scores_are_bit_equal_for_any_batch_size_and_order(loaded: InferenceModel) -> None:
    expected = engine(loaded, batch_size=1).score(requests())
    order = random.Random(2).sample(range(len(expected)), len(expected))
    for batch_size in (4, 16):
        shuffled = engine(loaded, batch_size=batch_size).score([requests()[number] for number in order])
        assert shuffled == [expected[number] for number in order]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_texts_are_equal_for_any_order(loaded: InferenceModel, options: GenerationOptions) -> None:
    different = sorted(set(prompts()))
    expected = engine(loaded).generate(different, options)
    assert engine(loaded).generate(different[::-1], options) == expected[::-1]


@pytest.mark.parametrize("options", [None, GREEDY, SAMPLED])
def test_nan_is_no_answer(loaded: InferenceModel, options: GenerationOptions | None) -> None:
    """Before: an accuracy of 1, because no comparison with NaN is true."""
    weight = next(loaded.model.chunks[0].parameters())
    kept = weight.detach().clone()
    weight.data[:] = float("nan")
    try:
        with pytest.raises(NotFiniteError, match=r"computes NaN or infinity for .* of a batch"):
            engine(loaded).score(requests()) if options is None else engine(loaded).generate(prompts(), options)
    finally:
        weight.data[:] = kept
    assert len(engine(loaded).score(requests())) == len(requests())


def test_overrides_that_change_the_model_are_refused(tmp_path: Path) -> None:
    """Before, answers of the changed model were kept as the checkpoint's."""
    save_hf_model(tmp_path / "hf", "llama")
    import_checkpoint(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"model\.rotary_base=50: not possible here"):
        inference_run(open_checkpoint(tmp_path / "checkpoint"), ["model.rotary_base=50"])


def test_a_killed_evaluation_computes_at_most_one_batch_again(loaded: InferenceModel) -> None:
    whole = engine(loaded, batch_size=2)
    batches: list[dict[int, Score]] = []
    expected = whole.score(requests(), on_batch=batches.append)
    assert {number: score for batch in batches for number, score in batch.items()} == dict(enumerate(expected))
    stored = {number: score for batch in batches[:3] for number, score in batch.items()}
    rest: list[dict[int, Score]] = []
    resumed = engine(loaded, batch_size=2)
    assert resumed.score(requests(), finished=stored, on_batch=rest.append) == expected
    assert rest == batches[3:], "the same rows, without the finished ones"
    assert resumed.counts.forward_tokens < whole.counts.forward_tokens


def test_a_killed_generation_computes_at_most_one_batch_again(loaded: InferenceModel) -> None:
    batches: list[dict[int, Generation]] = []
    expected = engine(loaded).generate(prompts(), SAMPLED, on_batch=batches.append)
    stored = {number: text for batch in batches[:2] for number, text in batch.items()}
    rest: list[dict[int, Generation]] = []
    assert engine(loaded).generate(prompts(), SAMPLED, finished=stored, on_batch=rest.append) == expected
    assert rest == batches[2:]


def test_finished_requests_cost_nothing(loaded: InferenceModel) -> None:
    again = engine(loaded)
    scores = {number: Score(-1.0, True, 1) for number in range(len(requests()))}
    assert again.score(requests(), finished=scores) == list(scores.values())
    assert again.counts.forward_tokens == 0


def test_the_start_of_a_long_context_is_cut_off(loaded: InferenceModel) -> None:
    context, continuation = tuple(range(100)), (7, 8, 9)
    (score,) = engine(loaded).score([ScoreRequest(context, continuation)])
    (expected,) = engine(loaded).score([ScoreRequest(context[-(MAX_LENGTH + 1 - 3) :], continuation)])
    assert score == expected


def test_texts_end_at_stop_ids_stop_texts_and_limits(loaded: InferenceModel) -> None:
    prompt = prompts()[0]
    (free,) = engine(loaded).generate([prompt], GREEDY)
    assert free.reason == "max_new_tokens"
    assert not free.stopped
    first, second = free.token_ids[0], next(token for token in free.token_ids if token != free.token_ids[0])
    cut = free.token_ids[: free.token_ids.index(second)]
    (at_id,) = engine(loaded).generate([prompt], GenerationOptions(max_new_tokens=8, stop_ids=frozenset({second})))
    assert at_id == Generation(cut, "stop_id")
    (at_text,) = engine(loaded).generate([prompt], GREEDY, stop=lambda index, new: index == 0 and new[-1] == second)
    assert at_text == Generation((*cut, second), "stop_text")
    (at_start,) = engine(loaded).generate([prompt], GenerationOptions(max_new_tokens=8, stop_ids=frozenset({first})))
    assert at_start == Generation((), "stop_id")
    (long,) = engine(loaded).generate([(1,) * (MAX_LENGTH - 3)], GREEDY)
    assert (len(long.token_ids), long.reason) == (3, "max_length")


def test_generation_computes_a_tenth_of_recomputing_everything(loaded: InferenceModel) -> None:
    new, texts = 256, [prompt + (5,) * 40 for prompt in sorted(set(prompts()))]
    counted = engine(loaded, max_length=400, row_tokens=512)
    counted.generate(texts, GenerationOptions(max_new_tokens=new))
    recomputed = sum(len(text) + done for text in texts for done in range(new))
    assert counted.counts.forward_tokens < recomputed / 10


def test_the_model_is_unchanged_after_an_evaluation(loaded: InferenceModel) -> None:
    chunk = loaded.model.chunks[0]
    chunk.train()
    tokens = torch.arange(8)[None]

    def facts() -> tuple[Any, ...]:
        modules = [(name, type(module), module.training, len(module._forward_hooks)) for name, module in _named(chunk)]
        with torch.no_grad():
            return modules, chunk(tokens, tokens, None).clone()

    try:
        (modules, logits), states = facts(), rng_state()
        engine(loaded).score(requests())
        engine(loaded).generate(prompts(), SAMPLED)
        assert all(torch.equal(state, states[name]) for name, state in rng_state().items())
        assert facts()[0] == modules
        assert torch.equal(facts()[1], logits)
        with pytest.raises(RuntimeError, match="interrupted"):
            engine(loaded).score(requests(), on_batch=_interrupt)
        assert facts()[0] == modules
    finally:
        chunk.eval()


def _named(chunk: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return list(chunk.named_modules())


def _interrupt(_: Any) -> None:
    raise RuntimeError("interrupted")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest((), (1,)), "put a prefix token before"),
        (ScoreRequest((1,), ()), "need a token each"),
        (ScoreRequest((1,), (101,)), "token id 101: the model has the ids 0 to 100"),
        (ScoreRequest((1,), (1,) * 65), "continuation of 65 tokens is longer than the model's length of 64"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(
    loaded: InferenceModel, request_: ScoreRequest, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        engine(loaded).score([request_])


def test_prompts_that_leave_no_room_are_refused(loaded: InferenceModel) -> None:
    for prompt in ((), (1,) * MAX_LENGTH):
        with pytest.raises(UserError, match="give between 1 and 63"):
            engine(loaded).generate([prompt], GREEDY)


def test_context_parallelism_is_refused(loaded: InferenceModel) -> None:
    from megatron_cpt.evaluate.engine import Engine

    parallel = loaded.run.parallel.model_copy(update={"context": 2})
    with pytest.raises(UserError, match=r"parallel.context: 2: evaluation does not split sequences"):
        Engine(loaded.model, loaded.run.model_copy(update={"parallel": parallel}), loaded.ranks)
