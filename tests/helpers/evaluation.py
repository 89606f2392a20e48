"""Small tasks of lm-evaluation-harness, tiny models with a tokenizer, and an engine on transformers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_cpt.evaluate.requests import Generation, GenerationOptions, Score, ScoreRequest
from tests.helpers.hf_models import save_hf_model

TASKS = ("colors", "letters", "continue")
_OBJECTS = (
    "grass",
    "the sky",
    "a ripe tomato",
    "fresh snow",
    "coal",
    "a banana",
    "an old \u20ac coin",
    "the sea \u2603",
)
_COLORS = ("green", "blue", "red", "white", "black", "yellow", "brown", "grey")

_TASK_FILES: dict[str, dict[str, Any]] = {
    "colors": {
        "output_type": "multiple_choice",
        "doc_to_text": "What color has {{object}}? Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(color)}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "fewshot_split": "test",
        "num_fewshot": None,
    },
    "letters": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{letter}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "continue": {
        "output_type": "generate_until",
        "doc_to_text": "{{object}} is",
        "doc_to_target": "{{color}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 8},
        "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "none", "filter": [{"function": "take_first"}]},
            {
                "name": "first-word",
                "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}],
            },
        ],
    },
}


def write_tasks(folder: Path, **changes: dict[str, Any]) -> Path:
    """Write the files of `TASKS` and their documents; `changes` are keys of a task's file."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / "documents.jsonl"
    rows = [
        {"object": name, "color": color, "choices": [color, *(c for c in _COLORS if c != color)][: 2 + number % 3],
         "letter": f"Dear {name}, you are {color}. " * (1 + 3 * (number % 4))}
        for number, (name, color) in enumerate(zip(_OBJECTS, _COLORS, strict=True))
    ]  # fmt: skip
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in _TASK_FILES.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **content,
            **changes.get(name, {}),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def save_model_with_tokenizer(folder: Path, *, template: str = "", family: str = "llama", **config: Any) -> Path:
    """Write a tiny Hugging Face model and a byte-level BPE tokenizer with `<s>` and `</s>`; texts of 64 tokens fit.

    Args:
        template: post-processor of the tokenizer, such as "<s> $A".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([*_OBJECTS, *_COLORS, "What color has ? Answer: Dear , you are . is"], trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    vocabulary = tokenizer.get_vocab_size()
    save_hf_model(folder, family, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **config)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


class ArithmeticEngine:
    """Engine whose answers are a checksum of the request, for tests of everything around an engine.

    Attributes:
        computed: number of requests computed.
        fail_after: raise KeyboardInterrupt, as a kill would, when so many requests are computed; None: never.
    """

    def __init__(self, *, max_length: int = 64, batch_size: int = 2) -> None:
        self.max_length, self._batch_size = max_length, batch_size
        self.computed = 0
        self.fail_after: int | None = None

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        finished: Mapping[int, Score] | None = None,
        on_batch: Callable[[dict[int, Score]], None] | None = None,
    ) -> list[Score]:
        return self._run(requests, self._score_one, finished, on_batch)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: GenerationOptions,
        *,
        stop: Callable[[int, tuple[int, ...]], bool] | None = None,
        finished: Mapping[int, Generation] | None = None,
        on_batch: Callable[[dict[int, Generation]], None] | None = None,
    ) -> list[Generation]:
        return self._run(prompts, lambda prompt: self._generate_one(prompt, options, stop), finished, on_batch)

    def _run(self, requests: Any, compute: Any, finished: Any, on_batch: Any) -> Any:
        answers = dict(finished or {})
        missing = [number for number in range(len(requests)) if number not in answers]
        for first in range(0, len(missing), self._batch_size):
            batch = {}
            for number in missing[first : first + self._batch_size]:
                if self.fail_after is not None and self.computed >= self.fail_after:
                    raise KeyboardInterrupt
                self.computed += 1
                batch[number] = compute(requests[number])
            answers |= batch
            if on_batch is not None:
                on_batch(batch)
        return [answers[number] for number in range(len(requests))]

    def _score_one(self, request: ScoreRequest) -> Score:
        checksum = zlib.crc32(repr((request.context, request.continuation)).encode())
        return Score(-checksum / 2**28, checksum % 2 == 0, len(request.continuation))

    def _generate_one(self, prompt: tuple[int, ...], options: GenerationOptions, stop: Any) -> Generation:
        return Generation(tuple(token + 10 for token in prompt[:4]), "max_new_tokens")


class TransformersEngine(ArithmeticEngine):
    """Engine that runs a transformers model, one request at a time."""

    def __init__(self, folder: Path, *, max_length: int = 64) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(max_length=max_length)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def _score_one(self, request: ScoreRequest) -> Score:
        ids = (*request.context, *request.continuation)[-self.max_length - 1 :]
        logits = self._model(torch.tensor([ids[:-1]])).logits[0, -len(request.continuation) :]
        targets = torch.tensor(request.continuation)
        logprobs = logits.log_softmax(-1).gather(1, targets[:, None])
        return Score(float(logprobs.double().sum()), bool((logits.argmax(-1) == targets).all()), len(targets))

    @torch.no_grad()
    def _generate_one(self, prompt: tuple[int, ...], options: GenerationOptions, stop: Any) -> Generation:
        new: tuple[int, ...] = ()
        while len(new) < options.max_new_tokens:
            token = int(self._model(torch.tensor([[*prompt, *new]])).logits[0, -1].argmax())
            if token in options.stop_ids:
                return Generation(new, "stop_id")
            new = (*new, token)
            if stop is not None and stop(0, new):
                return Generation(new, "stop_text")
        return Generation(new, "max_new_tokens")
