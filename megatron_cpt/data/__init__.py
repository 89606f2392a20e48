"""Token files, streams, blends and batches. Plain numpy: importing it loads neither torch nor a tokenizer library."""

from megatron_cpt.data.batch import Batch, DocumentOptions, make_batch
from megatron_cpt.data.blend import BlendCursor, PhaseBlend, assign
from megatron_cpt.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    IndexHeader,
    best_dtype,
    expand_prefixes,
    read_header,
)
from megatron_cpt.data.loader import Loader, StepData, validation_batches
from megatron_cpt.data.permutation import Permutation, derive_key
from megatron_cpt.data.stream import SampleLocation, TokenStream
from megatron_cpt.data.tokenizers import Tokenizer, load_tokenizer

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
