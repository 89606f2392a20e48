"""Tokenizers by `KIND:PATH`. A tokenizer library is imported when a tokenizer of its kind is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import UserError

KINDS = "sentencepiece:tokenizer.model, huggingface:DIR_OR_tokenizer.json, byte"

# End-of-document tokens of GPT-2, Llama 3, Llama 2 and Gemma, for folders without a tokenizer_config.json.
_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """Interface and base of every kind of tokenizer. No method adds an id of its own (no start, no end of document).

    Attributes:
        vocab_size: every id is below it.
        eod_id: the id that ends a document; None if the vocabulary has none.
        fingerprint: sha256 of the file in hex, or "byte".
    """

    vocab_size: int
    eod_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts."""
        ...

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the ids of many texts, one array of unsigned integers per text."""
        return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that a `KIND:PATH` names: `sentencepiece:tokenizer.model`, `huggingface:DIR` or `byte`.

    Raises:
        UserError: the kind is unknown, or the file is missing or of another kind.
    """
    kind, _, path = spec.partition(":")
    if kind == "byte" and not path:
        return ByteTokenizer()
    if kind == "sentencepiece" and path:
        return SentencePieceTokenizer(Path(path))
    if kind == "huggingface" and path:
        return HuggingFaceTokenizer(Path(path))
    raise UserError(f"tokenizer {spec!r}: not a known KIND:PATH; give one of {KINDS}")


class ByteTokenizer(Tokenizer):
    """Tokenizer whose ids 0 to 255 are the bytes of the UTF-8 text; 256 ends a document."""

    vocab_size = 257
    eod_id: int | None = 256
    fingerprint = "byte"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the UTF-8 bytes of each text."""
        return [list(text.encode()) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes, without ends of documents; invalid UTF-8 becomes U+FFFD."""
        array = np.asarray(ids, np.int64)
        return array[array < 256].astype(np.uint8).tobytes().decode(errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece `tokenizer.model`.

    Raises:
        UserError: the file is missing or not a SentencePiece model.
    """

    library = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        data = _read(path)
        self.file = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece model; give one of {KINDS}") from error
        self.vocab_size: int = self._model.vocab_size()
        eos_id: int = self._model.eos_id()
        self.eod_id = eos_id if eos_id >= 0 else None
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, with one thread: `preprocess` runs one process per core."""
        ids: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control ids."""
        return str(self._model.decode([int(i) for i in ids]))

    def pieces(self) -> list[str]:
        """Return the text of each piece, with blanks in place of U+2581."""
        return [self._model.id_to_piece(i).replace("\u2581", " ") for i in range(self.vocab_size)]

    def special_texts(self) -> list[str]:
        """Return the control, unknown and byte pieces, which stand for no text of their own."""
        is_special = (self._model.is_control, self._model.is_unknown, self._model.is_byte)
        return [self._model.id_to_piece(i) for i in range(self.vocab_size) if any(kind(i) for kind in is_special)]


class HuggingFaceTokenizer(Tokenizer):
    """Hugging Face `tokenizer.json`, alone or in a model's folder.

    Truncation, padding and added special tokens that the file may ask for are switched off: a document is encoded whole
    and unchanged. Text that is written like a special token, such as "</s>", becomes that token, as in transformers and
    Megatron-LM. The end of document is the `eos_token` of the folder's tokenizer_config.json, else the first of the
    usual names that the vocabulary has.

    Raises:
        UserError: the file is missing or invalid, or the vocabulary lacks the folder's `eos_token`.
    """

    library = "tokenizers"

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.file = file = path / "tokenizer.json" if path.is_dir() else path
        data = _read(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"tokenizer {file}: not a tokenizer.json ({error}); give one of {KINDS}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # not the number of ids: they may have gaps
        names = _eos_token(path / "tokenizer_config.json") if path.is_dir() else None
        self.eod_id = next((vocabulary[name] for name in names or _USUAL_EOD if name in vocabulary), None)
        if names and self.eod_id is None:
            raise UserError(
                f"tokenizer {path}: tokenizer_config.json names {names[0]!r}, but {file.name} does not have it;"
                " correct one of the two files"
            )
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def pieces(self) -> list[str]:
        """Return the text of each id."""
        return list(self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False))

    def special_texts(self) -> list[str]:
        """Return the texts of added tokens."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path}: {error.strerror}; give one of {KINDS}") from error


def _eos_token(config: Path) -> tuple[str] | None:
    """Return the `eos_token` of a tokenizer_config.json: a string, or the `content` of an object."""
    if not config.is_file():
        return None
    try:
        content: Any = json.loads(config.read_bytes())
    except ValueError as error:
        raise UserError(f"tokenizer {config}: not JSON: {error}") from error
    token = content.get("eos_token") if isinstance(content, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return (token,) if isinstance(token, str) else None
