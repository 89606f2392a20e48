"""Scores and generated texts at every layout, against transformers."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint.loading.inference_model import inference_run, load_inference_model, open_checkpoint
from megatron_cpt.cli import main
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.evaluate import token_tree
from megatron_cpt.evaluate.requests import Generation, GenerationOptions, Score, ScoreRequest
from tests.helpers.hf_models import FAMILY_CONFIGS, build_hf_model, save_hf_model, tiny_config
from tests.helpers.ranks import run_ranks

LAYERS = 4
NEW_TOKENS = 12
FAMILIES = ["nemotron", "qwen3"]  # biases and partial rotary; QK norms and tied embeddings
LAYOUTS = {
    1: {"tp1": []},
    2: {
        "tp2-sp": ["parallel={tensor: 2, sequence: true}"],
        "pp2-vpp2": ["parallel={pipeline: 2, virtual_pipeline: 2}"],
        "dp2": [],
    },
    4: {
        "tp2-pp2": ["parallel={tensor: 2, sequence: true, pipeline: 2}"],
        "pp2-vpp2-dp2": ["parallel={pipeline: 2, virtual_pipeline: 2}"],
        "tp2-sp-dp2": ["parallel={tensor: 2, sequence: true}"],
        "tp2-pp2-head-alone": ["parallel={tensor: 2, pipeline: 2, pipeline_layout: [4, 0]}"],
    },
}
GREEDY = GenerationOptions(max_new_tokens=NEW_TOKENS)
SAMPLED = GenerationOptions(max_new_tokens=NEW_TOKENS, temperature=1.2, top_p=0.95, top_k=50, seed=7)


def requests() -> list[ScoreRequest]:
    """Return questions with up to four answers, which share contexts, and contexts that share their beginning."""
    draw = random.Random(0)
    shots = _ids(draw, 20)
    contexts = [shots + _ids(draw, draw.randrange(1, 12)) for _ in range(4)]
    contexts += [_ids(draw, draw.randrange(1, 30)) for _ in range(8)]
    return [
        ScoreRequest(context, _ids(draw, draw.randrange(1, 6)))
        for context in contexts
        for _ in range(draw.randrange(1, 5))
    ]


def prompts() -> list[tuple[int, ...]]:
    return [*sorted({request.context for request in requests()}), (5, 6, 7), (5, 6, 7)]


def _ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(101) for _ in range(count))


def evaluate(base: str, families: Sequence[str], layouts: dict[str, list[str]]) -> tuple[dict[str, Any], str]:
    """Return scores, greedy and sampled texts by family and layout, and the output of `generate`; run by every rank."""
    answers = {
        f"{family}-{name}": _evaluate(Path(base) / family, overrides)
        for family in families
        for name, overrides in layouts.items()
    }
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        words = ["generate", f"{base}/{families[0]}", *next(iter(layouts.values())), "--tokenizer", "null:101"]
        assert main([*words, "--prompt", "5 6 7", "--max-new-tokens", "4", "--json"]) == 0
    return answers, printed.getvalue()


def _evaluate(checkpoint: Path, overrides: Sequence[str]) -> tuple[list[Score], list[Generation], list[Generation]]:
    saved = open_checkpoint(checkpoint)
    with load_inference_model(saved, inference_run(saved, overrides)) as loaded, pytest.MonkeyPatch.context() as patch:
        from megatron_cpt.evaluate.engine import Engine

        # small rows, segments and groups: several of each, and prompts that take several rows
        patch.setattr(token_tree, "_SEGMENT", 8)
        engine = Engine(loaded.model, loaded.run, loaded.ranks, row_tokens=48, group_size=4, batch_size=3)
        return (
            engine.score(requests()),
            engine.generate(prompts(), GREEDY),
            engine.generate(prompts(), SAMPLED),
        )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("engine")
    _import(base, FAMILIES)
    return base


def _import(base: Path, families: Sequence[str]) -> None:
    for family in families:
        save_hf_model(base / "hf" / family, family, num_hidden_layers=LAYERS)
        import_checkpoint(base / "hf" / family, base / family)


@pytest.fixture(scope="module")
def answers(checkpoints: Path) -> dict[str, Any]:
    """Return the answers of one rank and of two."""
    return _answers(checkpoints, FAMILIES, (1, 2))


def _answers(checkpoints: Path, families: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in sizes:
        by_rank = run_ranks(size, evaluate, str(checkpoints), families, LAYOUTS[size], timeout=1200)
        answers, printed = zip(*by_rank, strict=True)
        assert all(answer == answers[0] for answer in answers), "every rank has the answers"
        assert not any(printed[1:]), "only rank 0 prints"
        found |= answers[0]
        found[f"generate-{size}"] = json.loads(printed[0])
    return found


def _check_against_transformers(family: str, found: dict[str, Any], layouts: Sequence[str]) -> None:
    model = build_hf_model(tiny_config(family, num_hidden_layers=LAYERS))
    expected = [_hf_score(model, request) for request in requests()]
    texts = [_hf_greedy(model, prompt) for prompt in prompts()]
    for layout in layouts:
        scores, greedy, _ = found[f"{family}-{layout}"]
        for score, (logprob, is_greedy), request in zip(scores, expected, requests(), strict=True):
            assert score.token_count == len(request.continuation)
            assert abs(score.logprob - logprob) / score.token_count < 1e-5
            assert score.is_greedy is is_greedy
        assert [text.token_ids for text in greedy] == texts, layout


def _hf_score(model: Any, request: ScoreRequest) -> tuple[float, bool]:
    ids = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, -len(request.continuation) :].double()
    targets = torch.tensor(request.continuation)
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])
    return float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())


def _hf_greedy(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Return the new tokens, each from one forward computation on the whole text."""
    ids = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_at_every_layout(answers: dict[str, Any], family: str) -> None:
    _check_against_transformers(family, answers, [*LAYOUTS[1], *LAYOUTS[2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_data_parallel_replicas_are_bit_equal(answers: dict[str, Any], family: str) -> None:
    assert answers[f"{family}-dp2"] == answers[f"{family}-tp1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_depend_on_the_layout(answers: dict[str, Any], family: str) -> None:
    alone = answers[f"{family}-tp1"][2]
    for layout in LAYOUTS[2]:
        assert answers[f"{family}-{layout}"][2] == alone, layout
    assert alone != answers[f"{family}-tp1"][1], "samples are not the greedy texts"
    assert alone[-1] != alone[-2], "equal prompts get different samples"


def test_the_command_prints_the_same_text_on_two_ranks(answers: dict[str, Any]) -> None:
    (alone,) = answers["generate-1"]
    assert answers["generate-2"] == [alone]
    text = answers[f"{FAMILIES[0]}-tp1"][1][prompts().index((5, 6, 7))]
    assert tuple(alone["token_ids"]) == text.token_ids[:4]


@pytest.mark.long
def test_answers_of_every_family_on_four_ranks(checkpoints: Path) -> None:
    _import(checkpoints, [family for family in FAMILY_CONFIGS if family not in FAMILIES])
    found = _answers(checkpoints, list(FAMILY_CONFIGS), (1, 4))
    for family in FAMILY_CONFIGS:
        _check_against_transformers(family, found, [*LAYOUTS[1], *LAYOUTS[4]])
        assert all(found[f"{family}-{layout}"][2] == found[f"{family}-tp1"][2] for layout in LAYOUTS[4])
