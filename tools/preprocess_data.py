"""Replacement for Megatron-LM's `tools/preprocess_data.py`: same arguments, same output, speed of `preprocess`.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model tokenizer/ --append-eod --workers 8

writes corpus_text_document.bin and .idx. As in Megatron-LM, a text without tokens stays as an empty document. Arguments
that would change the output in an unsupported way are refused, never ignored. Arguments that only change how the work
is done are accepted and have no effect. Releases of Megatron-LM differ; the newest one (0.19) counts, and a note says
so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megatron_cpt.cli.encoding_progress import encoding_progress, print_report
from megatron_cpt.cli.tool import run_tool
from megatron_cpt.data.preprocess.file_format import find_format
from megatron_cpt.data.preprocess.inputs import MAX_LINE_BYTES, expand_inputs
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.preprocess.streams import ByteStream, DamageError
from megatron_cpt.data.tokenizers.special_tokens import find_special_token
from megatron_cpt.data.tokenizers.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_cpt.errors import UserError

_SENTENCEPIECE = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer")
_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer", *_SENTENCEPIECE, "TikTokenizer", "NullTokenizer")
_REFUSED = {
    "tokenizer_hf_no_use_fast": "--tokenizer-hf-no-use-fast: not supported; only fast tokenizers are",
    "trust_remote_code": "--trust-remote-code: not supported; no code of a tokenizer's folder is run",
    "tokenizer_sentencepiece_legacy": "--tokenizer-sentencepiece-legacy: not supported; special tokens are not added",
    "tokenizer_metadata": "--tokenizer-metadata: not supported; --tokenizer-type decides",
}
_GIGATOKEN = ("HuggingFaceTokenizer", "GPT2BPETokenizer")  # the types that take --use-gigatoken
_GPT2_END = "<|endoftext|>"

# The two patterns of Megatron-LM's TikTokenizer, and the special tokens that it needs
_LETTERS = r"\p{Lt}\p{Lm}\p{Lo}\p{M}"
_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}{_LETTERS}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}{_LETTERS}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_TIKTOKEN_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_TIKTOKEN_VOCABULARY = 1 << 17


class MegatronTokenizer(NamedTuple):
    """Equivalent of a tokenizer of Megatron-LM.

    Attributes:
        spec: `KIND:PATH`.
        eod: id that ends documents; None: the tokenizer's own.
        note: sentence about what differs between releases of Megatron-LM.
    """

    spec: str
    eod: int | None = None
    add_template: bool = False
    note: str = ""


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
    _add_tokenizer_arguments(parser.add_argument_group("tokenizer"))
    output = parser.add_argument_group("output data")
    output.add_argument("--output-prefix", required=True)
    output.add_argument("--dataset-impl", default="mmap", choices=["mmap"])
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=int, required=True)
    runtime.add_argument(
        "--find-optimal-num-workers", action="store_true", help="try --workers-to-check, then encode with the fastest"
    )
    runtime.add_argument("--workers-to-check", nargs="+", type=int, default=[16, 32, 64])
    runtime.add_argument("--max-documents", type=int, default=100_000, help="documents of each trial")
    runtime.add_argument("--performance-dir", help="folder for the results of the trials")
    runtime.add_argument(
        "--max-bad", help="not Megatron-LM's: fail above so many bad lines (100), or this share (0.1%%)"
    )
    runtime.add_argument("--allow-damaged-input", action="store_true", help="not Megatron-LM's: keep what can be read")
    runtime.add_argument("--log-interval", type=int, default=1000, help="no effect: there is a progress bar")
    runtime.add_argument("--partitions", type=int, default=1, help="no effect: the input is always cut into blocks")
    runtime.add_argument("--keep-sequential-samples", action="store_true", help="no effect: the order is always kept")
    return parser.parse_args(argv)


def _add_tokenizer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokenizer-type", required=True, help=", ".join(_TYPES))
    group.add_argument("--tokenizer-model", help="tokenizer.model, TikTokenizer's JSON file, or Hugging Face folder")
    group.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    group.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    group.add_argument("--vocab-size", type=int, help="for TikTokenizer and NullTokenizer; others know it")
    template = group.add_mutually_exclusive_group()
    template.add_argument(
        "--tokenizer-hf-include-special-tokens",
        dest="include_special_tokens",
        action="store_true",
        default=None,
        help="add the ids of the tokenizer's template (default)",
    )
    template.add_argument(
        "--tokenizer-hf-no-include-special-tokens", dest="include_special_tokens", action="store_false", default=None
    )
    group.add_argument("--tokenizer-hf-use-fast", action="store_true", help="no effect: always")
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true", help="refused")
    group.add_argument("--use-gigatoken", action="store_true", help="require the fast tokenizer, certified as equal")
    group.add_argument("--trust-remote-code", action="store_true", help="refused")
    group.add_argument("--special-tokens", "--tokenizer-special-tokens", nargs="+", help="for TikTokenizer")
    group.add_argument("--tiktoken-pattern", choices=sorted(_PATTERNS), default="v2")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true", help="refused")
    group.add_argument("--tokenizer-metadata", help="refused")
    group.add_argument("--null-tokenizer-eod-id", type=int, help="default: --vocab-size minus 1")
    group.add_argument("--null-tokenizer-pad-id", type=int, help="no effect: nothing is padded")
    group.add_argument("--append-eod", action="store_true")
    group.add_argument("--lang", default="english", help="has no effect without --split-sentences")


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
    for name, message in _REFUSED.items():
        if getattr(options, name):
            raise UserError(message)
    with tempfile.TemporaryDirectory() as name, encoding_progress() as (show, notify):
        folder = Path(name)
        tokenizer = find_tokenizer(options, folder)
        if tokenizer.note:
            notify(tokenizer.note)
        preprocess_options = PreprocessOptions(
            key=options.json_keys,
            append_eod=options.append_eod,
            eod=tokenizer.eod if options.append_eod else None,
            add_template=tokenizer.add_template,
            keep_empty=True,
            workers=options.workers,
            fast_tokenizer="on" if options.use_gigatoken and options.tokenizer_type in _GIGATOKEN else "auto",
            prefixes=[f"{options.output_prefix}_{key}_document" for key in options.json_keys],
            max_bad=options.max_bad,
            allow_damaged_input=options.allow_damaged_input,
            overwrite=True,
            progress=show,
            notify=notify,
        )
        if options.find_optimal_num_workers:
            workers = find_fastest_workers(options, tokenizer.spec, preprocess_options, folder)
            preprocess_options = replace(preprocess_options, workers=workers)
        report = preprocess(
            [options.input], options.output_prefix, tokenizer=tokenizer.spec, options=preprocess_options
        )
    print_report(report)


def find_fastest_workers(
    options: argparse.Namespace, spec: str, preprocess_options: PreprocessOptions, folder: Path
) -> int:
    """Encode the first documents with each number of workers, print the speeds, and return the fastest number.

    Raises:
        UserError: there is no folder for the results, or the input is not JSON lines.
    """
    if not options.performance_dir:
        raise UserError("--find-optimal-num-workers: needs --performance-dir, a folder for the results")
    results = Path(options.performance_dir)
    results.mkdir(parents=True, exist_ok=True)
    sample = folder / "sample.jsonl"
    sample.write_bytes(b"".join(itertools.islice(_lines(options.input), options.max_documents)))
    speeds: dict[int, float] = {}
    for workers in options.workers_to_check:
        prefixes = [str(folder / key) for key in options.json_keys]
        trial = replace(preprocess_options, workers=workers, prefixes=prefixes, notify=lambda text: None)
        report = preprocess([sample], folder / "trial", tokenizer=spec, options=trial)
        speeds[workers] = report.lines / max(report.seconds, 1e-9)
        (results / f"{workers}_workers.json").write_text(json.dumps({str(workers): [speeds[workers]]}))
    for workers, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        print(f"{workers} workers: {speed:.4f} documents per second")
    return max(speeds, key=lambda workers: speeds[workers])


def _lines(entry: str) -> Iterator[bytes]:
    for path in expand_inputs([entry]):
        form = find_format(path)
        if form is None or form.kind != "lines":
            raise UserError(f"--find-optimal-num-workers: {path} is not JSON lines")
        with ByteStream(path, form) as stream, contextlib.suppress(DamageError):
            rest = b""
            for piece in stream.lines(MAX_LINE_BYTES):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line + b"\n" for line in lines)
            yield rest + b"\n"


def find_tokenizer(options: argparse.Namespace, folder: Path) -> MegatronTokenizer:
    """Return the equivalent of Megatron-LM's tokenizer; files made for it are written to `folder`.

    Raises:
        UserError: the tokenizer type is not supported, or a file or argument is missing.
    """
    kind = options.tokenizer_type
    if kind not in _TYPES:
        raise UserError(f"--tokenizer-type {kind}: not supported (supported: {', '.join(_TYPES)})")
    if options.special_tokens and kind != "TikTokenizer":
        raise UserError(f"--special-tokens: not supported with {kind}; add them to the tokenizer's files")
    if kind == "NullTokenizer":
        if not options.vocab_size:
            raise UserError(f"--tokenizer-type {kind}: needs --vocab-size")
        eod = options.vocab_size - 1 if options.null_tokenizer_eod_id is None else options.null_tokenizer_eod_id
        return MegatronTokenizer(f"null:{options.vocab_size}", eod)
    if kind == "GPT2BPETokenizer":
        return _gpt2_tokenizer(options, folder)
    if not options.tokenizer_model:
        raise UserError(f"--tokenizer-type {kind}: needs --tokenizer-model")
    if kind == "TikTokenizer":
        return _tiktoken_tokenizer(options, folder)
    if kind in _SENTENCEPIECE:
        note = ""
        if kind == "Llama2Tokenizer":
            note = "Llama2Tokenizer: no <s> begins the documents, as in Megatron-LM 0.19; older releases wrote it"
        tokenizer = load_tokenizer(f"sentencepiece:{options.tokenizer_model}")
        assert isinstance(tokenizer, SentencePieceTokenizer)
        return MegatronTokenizer(f"sentencepiece:{options.tokenizer_model}", tokenizer.model_eos_id, note=note)
    return _huggingface_tokenizer(options)


def _huggingface_tokenizer(options: argparse.Namespace) -> MegatronTokenizer:
    if options.vocab_file or options.merge_file:
        raise UserError("--vocab-file, --merge-file: not supported with HuggingFaceTokenizer; give --tokenizer-model")
    path = Path(options.tokenizer_model)
    spec = f"huggingface:{path}"
    tokenizer = load_tokenizer(spec)
    _, name = find_special_token(path if path.is_dir() else path.parent, "eos_token")
    eod = tokenizer.token_id(name) if name is not None else None
    add_template = options.include_special_tokens in (True, None)
    first, last = tokenizer.template
    note = ""
    if options.include_special_tokens is None and (first or last):
        note = (
            f"ids {first} before and {last} after each text are written, as in Megatron-LM 0.15 and from 0.19 on; 0.16 "
            "does not write them: --tokenizer-hf-no-include-special-tokens"
        )
    elif options.include_special_tokens is False and (first or last):
        note = f"ids {first} before and {last} after each text are not written"
    return MegatronTokenizer(spec, eod, add_template, note)


def _gpt2_tokenizer(options: argparse.Namespace, folder: Path) -> MegatronTokenizer:
    files = (options.vocab_file, options.merge_file)
    for option, file in zip(("--vocab-file", "--merge-file"), files, strict=True):
        if file is None or not Path(file).is_file():
            raise UserError(f"{option} {file}: no such file; GPT2BPETokenizer needs it")
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer(*files)
    tokenizer.add_special_tokens([_GPT2_END])  # in a text, too, it is one token
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": _GPT2_END}))
    return MegatronTokenizer(f"huggingface:{folder}")


def _tiktoken_tokenizer(options: argparse.Namespace, folder: Path) -> MegatronTokenizer:
    """Write Megatron-LM's JSON file as a tekken.json, which has the same list of tokens, for transformers."""
    special = options.special_tokens or list(_TIKTOKEN_SPECIAL)
    if missing := [token for token in _TIKTOKEN_SPECIAL if token not in special]:
        raise UserError(f"--special-tokens: {missing[0]} is missing; TikTokenizer needs {' '.join(_TIKTOKEN_SPECIAL)}")
    try:
        tokens = json.loads(Path(options.tokenizer_model).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer-model {options.tokenizer_model}: not a JSON file of TikTokenizer: {error}"
        ) from error
    size, num_special = options.vocab_size or _TIKTOKEN_VOCABULARY, options.tiktoken_num_special_tokens
    if not isinstance(tokens, list) or len(tokens) < size - num_special or len(special) > num_special:
        raise UserError(
            f"--tokenizer-model {options.tokenizer_model}: needs a list of at least --vocab-size minus "
            f"--tiktoken-num-special-tokens tokens, {size - num_special}"
        )
    content = {
        "config": {
            "pattern": _PATTERNS[options.tiktoken_pattern],
            "default_vocab_size": size,
            "default_num_special_tokens": num_special,
            "version": "v7",
        },
        "vocab": tokens,
        "special_tokens": [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(special)],
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return MegatronTokenizer(f"huggingface:{folder}", special.index("</s>"))


if __name__ == "__main__":
    sys.exit(main())
