"""Megatron-LM's `tools/checkpoint/convert.py` as a front end of `megatron-cpt convert`, with the same argument names.

    python tools/convert_checkpoint.py --model-type GPT --loader llama_mistral --saver core --load-dir hf/ \
        --save-dir checkpoint/ --target-tensor-parallel-size 8 --target-pipeline-parallel-size 4

The format of the source is detected, so any loader may be named. The saver decides what is written: `hf`,
`llama_mistral` or another Hugging Face name stands for a Hugging Face folder, `core`, `mcore` or `megatron` for a
checkpoint. Arguments that cannot be followed are refused, never ignored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.cli.tool import run_tool
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.errors import UserError

_HF_SAVERS = ("hf", "hf_llava", "llama_mistral", "huggingface")
_CHECKPOINT_SAVERS = ("core", "megatron", "mcore")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    options = parse_arguments(argv)
    return run_tool(lambda: convert(options))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse Megatron-LM's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-type", required=True, help="GPT")
    parser.add_argument("--loader", default="core", help="not needed: the format of the source is detected")
    parser.add_argument("--saver", default="core", help=f"{', '.join(_CHECKPOINT_SAVERS)}, or {', '.join(_HF_SAVERS)}")
    parser.add_argument("--load-dir", required=True, type=Path)
    parser.add_argument("--save-dir", required=True, type=Path)
    parser.add_argument("--target-tensor-parallel-size", type=int, default=1)
    parser.add_argument("--target-pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--model-size", help="not needed: it is read from the model's config")
    parser.add_argument("--checkpoint-type", choices=["meta", "hf"], default="hf", help="hf")
    parser.add_argument("--tokenizer-model", help="not needed: the tokenizer's files are copied")
    parser.add_argument("--megatron-path", help="not needed: Megatron-LM is not imported")
    parser.add_argument("--bf16", action="store_true", help="cast weights to bfloat16")
    parser.add_argument("--fp16", action="store_true", help="cast weights to float16")
    parser.add_argument("--max-queue-size", type=int, default=50, help="not needed: there is no queue")
    parser.add_argument("--no-checking", action="store_true", help="refused: every tensor is always checked")
    return parser.parse_args(argv)


def convert(options: argparse.Namespace) -> None:
    """Convert as the arguments say.

    Raises:
        UserError: an argument is not supported.
    """
    if options.model_type != "GPT":
        raise UserError(f"--model-type {options.model_type}: not supported; only GPT")
    if options.checkpoint_type == "meta":
        raise UserError("--checkpoint-type meta: not supported; take the Hugging Face version of the model")
    if options.no_checking:
        raise UserError("--no-checking: not supported, because every tensor is checked; omit it")
    if min(options.target_tensor_parallel_size, options.target_pipeline_parallel_size) < 1:
        raise UserError("--target-tensor-parallel-size and --target-pipeline-parallel-size: must be at least 1")
    if options.bf16 and options.fp16:
        raise UserError("--bf16 and --fp16: exclude each other; choose one")
    dtype = "bf16" if options.bf16 else "fp16" if options.fp16 else None
    if options.saver in _HF_SAVERS:
        with progress_bar("exporting", is_bytes=True) as advance:
            export_checkpoint(options.load_dir, options.save_dir, ExportOptions(dtype=dtype), advance=advance)
        return
    if options.saver not in _CHECKPOINT_SAVERS:
        raise UserError(f"--saver {options.saver}: not known; choose {', '.join((*_CHECKPOINT_SAVERS, *_HF_SAVERS))}")
    target = Target(options.target_tensor_parallel_size, options.target_pipeline_parallel_size)
    with progress_bar("importing", is_bytes=True) as advance:
        import_checkpoint(
            options.load_dir, options.save_dir, ImportOptions(dtype=dtype, target=target), advance=advance
        )


if __name__ == "__main__":
    sys.exit(main())
