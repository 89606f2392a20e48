"""Texts that the model of a checkpoint writes after prompts; run by all ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cpt.backend.distributed import job_group
from megatron_cpt.backend.signals import stops_as_interrupts
from megatron_cpt.checkpoint.loading.inference_model import inference_run, load_inference_model, open_checkpoint
from megatron_cpt.checkpoint.record import WeightSet
from megatron_cpt.convert.temporary_checkpoint import Note, as_checkpoint
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.checkpoint_tokenizer import load_checkpoint_tokenizer
from megatron_cpt.evaluate.requests import GenerationOptions, StopReason

_COLLECTIVE_TIMEOUT = 3600.0  # seconds; the other ranks wait while rank 0 imports a model


@dataclass(frozen=True)
class GeneratedText:
    """Text of a model after a prompt.

    Attributes:
        text: the new text, up to a stop text.
        token_ids: new tokens, also the tokens of a stop text.
        prompt_tokens: number of tokens of the prompt.
        reason: cause of the end, see `Generation`.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reason: StopReason

    def to_dict(self) -> dict[str, Any]:
        """Return the text as plain values."""
        return asdict(self)


def generate_texts(
    model: str | Path,
    prompts: Sequence[str],
    options: GenerationOptions | None = None,
    *,
    stop: Sequence[str] = (),
    tokenizer: str | None = None,
    overrides: Sequence[str] = (),
    weights: WeightSet = "raw",
    note: Note = lambda activity: None,
) -> list[GeneratedText]:
    """Return the text that a model writes after each prompt, on every rank. Example:

        generate_texts("runs/my-run", ["The capital of France is"], GenerationOptions(max_new_tokens=16))

    A prompt is encoded as its tokenizer would for a model, with a begin-of-text token if its template has one. An
    end-of-document token ends the text.

    Args:
        model: a checkpoint, a run directory for its newest checkpoint, or a Hugging Face folder.
        stop: texts that end a new text, which does not contain them.
        tokenizer: KIND:PATH; None: the checkpoint's own.
        overrides: `key=value`, such as `parallel.tensor=2` or `precision.compute=bf16`.
        weights: `ema`: the moving average of the checkpoint's weights.
        note: called on rank 0 before long work without progress.

    Raises:
        KeyboardInterrupt: the process received a stop signal.
        UserError: an option is wrong, no tokenizer was found, or the number of processes does not fit the layout.
        RefusedError: the checkpoint is corrupt, or its model computes NaN.
    """
    options = options or GenerationOptions()
    check_options(options)
    for number, prompt in enumerate(prompts, start=1):
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes of an argument that are no text
            raise UserError(f"prompt {number}: not valid UTF-8; save it as UTF-8")
    with (
        stops_as_interrupts(),
        job_group(timeout=_COLLECTIVE_TIMEOUT),
        as_checkpoint(Path(model), note=note) as path,
    ):
        saved = open_checkpoint(path)
        codec = load_checkpoint_tokenizer(saved, tokenizer)
        run = inference_run(saved, overrides)
        stop_ids = options.stop_ids if codec.eod_id is None else options.stop_ids | {codec.eod_id}
        ids = [_encode(codec, prompt) for prompt in prompts]
        with load_inference_model(saved, run, weights) as loaded:
            # imported here: megatron-core reads torch.cuda on import, and job_group replaces it on a CPU
            from megatron_cpt.evaluate.engine import Engine

            engine = Engine(loaded.model, loaded.run, loaded.ranks)
            found = engine.generate(
                ids,
                replace(options, stop_ids=stop_ids),
                stop=lambda _, new: any(text in codec.decode(new) for text in stop),
            )
    return [
        GeneratedText(prompt, _before(codec.decode(one.token_ids), stop), one.token_ids, len(prompt_ids), one.reason)
        for prompt, prompt_ids, one in zip(prompts, ids, found, strict=True)
    ]


def check_options(options: GenerationOptions) -> None:
    """Raise `UserError` for options outside their range."""
    if (problem := options.problem()) is not None:
        name, advice = problem
        raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)}; {advice}")
    if not options.temperature and (options.top_k or options.top_p < 1):
        raise UserError("--top-p and --top-k choose among samples; give a --temperature above 0, too")


def _encode(codec: Tokenizer, prompt: str) -> tuple[int, ...]:
    ids = [*codec.template[0], *codec.encode(prompt)]
    if not ids and codec.eod_id is not None:
        ids = [codec.eod_id]  # an empty prompt is the beginning of a document
    return tuple(ids)


def _before(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop text in it."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(places)] if places else text
