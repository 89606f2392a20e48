"""Replacement for Megatron-LM's `tools/preprocess_data.py`: same arguments, same output, speed of `preprocess`.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model tokenizer/ --append-eod --workers 8

writes corpus_text_document.bin and .idx. As in Megatron-LM, a text without tokens stays as an empty document. Arguments
that would change the output in an unsupported way are refused, never ignored. Arguments that only change how the work
is done are accepted and have no effect.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.cli.encoding_progress import encoding_progress, print_report
from megatron_cpt.cli.tool import run_tool
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.errors import UserError

_KINDS = {"HuggingFaceTokenizer": "huggingface", "GPTSentencePieceTokenizer": "sentencepiece"}
_REFUSED = {
    "Llama2Tokenizer": "it begins each document with the id of <s>; use GPTSentencePieceTokenizer for text without it",
    "SentencePieceTokenizer": "it adds tokens of its own to the model; use GPTSentencePieceTokenizer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = parse_arguments(argv)
    return run_tool(lambda: encode(options))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse Megatron-LM's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("input data")
    data.add_argument("--input", required=True, help="a JSONL file or a glob")
    data.add_argument("--json-keys", nargs="+", default=["text"], help="one dataset PREFIX_KEY_document per key")
    data.add_argument("--split-sentences", action="store_true", help="refused: only BERT and T5 need it")
    data.add_argument("--keep-newlines", action="store_true", help="has no effect without --split-sentences")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, help=f"{', '.join(_KINDS)} or GPT2BPETokenizer")
    tokenizer.add_argument("--tokenizer-model", help="tokenizer.model, or folder with a tokenizer.json")
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--vocab-size", type=int, help="no effect: taken from the tokenizer")
    tokenizer.add_argument("--append-eod", action="store_true")
    tokenizer.add_argument("--lang", default="english", help="has no effect without --split-sentences")
    output = parser.add_argument_group("output data")
    output.add_argument("--output-prefix", required=True)
    output.add_argument("--dataset-impl", default="mmap", choices=["mmap"])
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=int, required=True)
    runtime.add_argument("--log-interval", type=int, default=1000, help="no effect: there is a progress bar")
    runtime.add_argument("--partitions", type=int, default=1, help="no effect: the input is always cut into blocks")
    runtime.add_argument("--keep-sequential-samples", action="store_true", help="no effect: the order is always kept")
    return parser.parse_args(argv)


def encode(options: argparse.Namespace) -> None:
    """Encode the input as the arguments ask.

    Raises:
        UserError: an argument has no equivalent here.
    """
    if options.split_sentences:
        raise UserError("--split-sentences: not supported; causal language models take whole documents")
    if options.partitions > 1 and not options.keep_sequential_samples:
        raise UserError(
            "--partitions: without --keep-sequential-samples Megatron-LM deals the lines out to the partitions, which "
            "changes their order; remove it (it does not make this tool faster), or add --keep-sequential-samples"
        )
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: give at least 1")
    with tempfile.TemporaryDirectory() as folder, encoding_progress() as (show, notify):
        preprocess_options = PreprocessOptions(
            key=options.json_keys,
            append_eod=options.append_eod,
            keep_empty=True,
            workers=options.workers,
            prefixes=[f"{options.output_prefix}_{key}_document" for key in options.json_keys],
            overwrite=True,
            progress=show,
            notify=notify,
        )
        spec = tokenizer_spec(options, Path(folder))
        report = preprocess([options.input], options.output_prefix, tokenizer=spec, options=preprocess_options)
    print_report(report)


def tokenizer_spec(options: argparse.Namespace, folder: Path) -> str:
    """Return the `KIND:PATH` of Megatron-LM's tokenizer; a tokenizer.json made for it is written to `folder`.

    Raises:
        UserError: the tokenizer type is not supported, or a file is missing.
    """
    kind = options.tokenizer_type
    if kind in _KINDS:
        if not options.tokenizer_model:
            raise UserError(f"--tokenizer-type {kind}: needs --tokenizer-model")
        return f"{_KINDS[kind]}:{options.tokenizer_model}"
    if kind != "GPT2BPETokenizer":
        reason = _REFUSED.get(kind, "not supported")
        raise UserError(f"--tokenizer-type {kind}: {reason} (supported: {', '.join(_KINDS)}, GPT2BPETokenizer)")
    files = (options.vocab_file, options.merge_file)
    for option, file in zip(("--vocab-file", "--merge-file"), files, strict=True):
        if file is None or not Path(file).is_file():
            raise UserError(f"{option} {file}: no such file; {kind} needs it")
    import tokenizers

    tokenizers.ByteLevelBPETokenizer(*files).save(str(folder / "tokenizer.json"))
    return f"huggingface:{folder / 'tokenizer.json'}"


if __name__ == "__main__":
    sys.exit(main())
