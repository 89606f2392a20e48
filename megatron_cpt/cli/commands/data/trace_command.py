"""Command `trace`: show the documents that a step has read."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.commands.data.inspect_command import TOKENIZER_HELP, decode
from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
    from megatron_cpt.provenance.trace import Trace, TracedSample

SAMPLE_HELP = "Show only this sample of the global batch (from 0), with its complete text."
_SHOWN_CHARACTERS = 100  # per document, without --sample


def trace(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.")],
    step: Annotated[int, typer.Option("--step", metavar="N", help="Number of the step, from 1.")],
    sample: Annotated[int | None, typer.Option("--sample", metavar="I", help=SAMPLE_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the complete text.")] = False,
) -> None:
    """Show the samples that a step has read: source, epoch, file, documents, and the text if a tokenizer is known.

    The blend is replayed from the nearest checkpoint before the step, and compared with the next record after it.
    """
    from megatron_cpt.provenance.trace import trace_step

    with progress_bar("replaying") as advance:
        reported = 0

        def show(done: int, total: int) -> None:
            nonlocal reported
            advance(done - reported, total)
            reported = done

        found = trace_step(run_directory, step, progress=show)
    if sample is not None and not 0 <= sample < len(found.samples):
        raise UserError(f"--sample {sample}: the samples of a step are 0 to {len(found.samples) - 1}")
    samples = found.samples if sample is None else (found.samples[sample],)
    codec = _load_tokenizer(found, tokenizer)
    if as_json:
        plain = found.to_dict() | {"samples": [_sample_json(one, codec) for one in samples]}
        print(json.dumps(plain, indent=2))
        return
    _print_head(found)
    for one in samples:
        _print_sample(one, codec, most=_SHOWN_CHARACTERS if sample is None else None)


def _load_tokenizer(found: Trace, spec: str | None) -> Tokenizer | None:
    """Load the tokenizer of --tokenizer, or the run's own if its files exist."""
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    own = found.run.get("tokenizer")
    if spec is None and own is None:
        return None
    try:
        return load_tokenizer(str(spec or own))
    except UserError as error:
        if spec is not None:
            raise
        print(f"note: the text is not shown: {error}; give the tokenizer with --tokenizer", file=sys.stderr)
        return None


def _print_head(found: Trace) -> None:
    from megatron_cpt.config import format_number_of

    print(f"step {found.step}, phase {found.phase}: {format_number_of(len(found.samples), 'sample')}")
    for source, count in Counter(one.source for one in found.samples).most_common():
        epochs = sorted({one.epoch for one in found.samples if one.source == source})
        print(f"  {source}: {format_number_of(count, 'sample')}, epoch {' and '.join(map(str, epochs))}")
    agreement = f"{found.confirmed_by} agrees" if found.confirmed_by else "no later record to compare with"
    print(f"  replayed from step {found.replayed_from} with the plan in {found.plan}; {agreement}")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)


def _print_sample(one: TracedSample, codec: Tokenizer | None, most: int | None) -> None:
    from megatron_cpt.provenance.trace import read_parts

    tokens = f"{one.first_token} to {one.first_token + one.num_tokens}"
    file = f"{one.prefix}.bin" if {part.prefix for part in one.documents} == {one.prefix} else one.prefix
    print(f"sample {one.sample}: {one.source} {one.sample_index} (epoch {one.epoch}), {file} {tokens}")
    texts = [decode(codec, ids.tolist(), one.prefix) for ids in read_parts(one)] if codec is not None else []
    for number, part in enumerate(one.documents):
        where = "" if part.prefix == one.prefix else f" of {part.prefix}.bin"
        print(f"  document {part.document}{where}: tokens {part.first_token} to {part.first_token + part.num_tokens}")
        if texts:
            text = texts[number]
            print(text if most is None else f"    {text[:most]!r}{' ...' if len(text) > most else ''}")


def _sample_json(one: TracedSample, codec: Tokenizer | None) -> dict[str, Any]:
    from megatron_cpt.provenance.trace import read_parts

    plain = one.to_dict()
    if codec is not None:
        for part, ids in zip(plain["documents"], read_parts(one), strict=True):
            part["text"] = decode(codec, ids.tolist(), one.prefix)
    return plain
