"""Token files, streams, blends and batches, in plain numpy. Importing it loads no torch and no tokenizer library."""

from megatron_cpt.data.loading.batch import Batch, DocumentOptions, make_batch
from megatron_cpt.data.loading.loader import Loader, StepData, validation_batches
from megatron_cpt.data.loading.stream import SampleLocation, TokenStream
from megatron_cpt.data.tokenfile.reader import (
    IndexedDataset,
    IndexedDatasetWriter,
    IndexHeader,
    best_dtype,
    expand_prefixes,
    read_header,
)
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend, assign
from megatron_cpt.sampling.permutation import Permutation, derive_key

__all__ = [
    "Batch",
    "BlendCursor",
    "DocumentOptions",
    "IndexHeader",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Loader",
    "Permutation",
    "PhaseBlend",
    "SampleLocation",
    "StepData",
    "TokenStream",
    "Tokenizer",
    "assign",
    "best_dtype",
    "derive_key",
    "expand_prefixes",
    "load_tokenizer",
    "make_batch",
    "read_header",
    "validation_batches",
]
