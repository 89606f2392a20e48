"""Megatron-LM's `tools/preprocess_data.py` at the speed of `megatron-cpt preprocess`: its arguments, the same bytes.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model tokenizer/ --append-eod --workers 8

writes corpus_text_document.bin and .idx. As there, a text without tokens stays as an empty document. Arguments whose
meaning cannot be kept are refused, never ignored; those that only change how the work is done are taken and not needed.
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

_DIRECT = {"HuggingFaceTokenizer": "huggingface", "GPTSentencePieceTokenizer": "sentencepiece"}
_OTHERS = {
    "Llama2Tokenizer": "it begins each document with the id of <s>; take GPTSentencePieceTokenizer for text without it",
    "SentencePieceTokenizer": "it adds tokens of its own to the model; take GPTSentencePieceTokenizer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status."""
    options = parse_arguments(argv)
    return run_tool(lambda: encode(options))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Megatron-LM's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("input data")
    data.add_argument("--input", required=True, help="a JSONL file or a glob")
    data.add_argument("--json-keys", nargs="+", default=["text"], help="each gives a data set PREFIX_KEY_document")
    data.add_argument("--split-sentences", action="store_true", help="refused: only BERT and T5 need it")
    data.add_argument("--keep-newlines", action="store_true", help="means something with --split-sentences only")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, help=f"{', '.join(_DIRECT)} or GPT2BPETokenizer")
    tokenizer.add_argument("--tokenizer-model", help="a tokenizer.model, or a folder with a tokenizer.json")
    tokenizer.add_argument("--vocab-file", help="of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="of GPT2BPETokenizer")
    tokenizer.add_argument("--vocab-size", type=int, help="not needed: the tokenizer knows")
    tokenizer.add_argument("--append-eod", action="store_true")
    tokenizer.add_argument("--lang", default="english", help="means something with --split-sentences only")
    output = parser.add_argument_group("output data")
    output.add_argument("--output-prefix", required=True)
    output.add_argument("--dataset-impl", default="mmap", choices=["mmap"])
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=int, required=True)
    runtime.add_argument("--log-interval", type=int, default=1000, help="not needed: there is a progress bar")
    runtime.add_argument("--partitions", type=int, default=1, help="not needed: all of the input is cut into pieces")
    runtime.add_argument("--keep-sequential-samples", action="store_true", help="always so")
    return parser.parse_args(argv)


def encode(options: argparse.Namespace) -> None:
    """Does what the arguments ask for.

    Raises:
        UserError: one of them cannot be kept.
    """
    if options.split_sentences:
        raise UserError("--split-sentences: not supported; causal language models take whole documents")
    if options.partitions > 1 and not options.keep_sequential_samples:
        raise UserError(
            "--partitions: without --keep-sequential-samples Megatron-LM deals the lines out to the partitions and so "
            "changes their order; leave it out (this is faster anyway), or give --keep-sequential-samples"
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
    """The `KIND:PATH` of Megatron-LM's tokenizer; what must be written for it goes into a folder.

    Raises:
        UserError: a tokenizer that is not known here, or a file is missing.
    """
    kind = options.tokenizer_type
    if kind in _DIRECT:
        if not options.tokenizer_model:
            raise UserError(f"--tokenizer-type {kind}: needs --tokenizer-model")
        return f"{_DIRECT[kind]}:{options.tokenizer_model}"
    if kind != "GPT2BPETokenizer":
        reason = _OTHERS.get(kind, "not known here")
        raise UserError(f"--tokenizer-type {kind}: {reason} (known: {', '.join(_DIRECT)}, GPT2BPETokenizer)")
    files = (options.vocab_file, options.merge_file)
    for option, file in zip(("--vocab-file", "--merge-file"), files, strict=True):
        if file is None or not Path(file).is_file():
            raise UserError(f"{option} {file}: no such file; {kind} needs it")
    import tokenizers

    tokenizers.ByteLevelBPETokenizer(*files).save(str(folder / "tokenizer.json"))
    return f"huggingface:{folder / 'tokenizer.json'}"


if __name__ == "__main__":
    sys.exit(main())
