"""Tokenizers by `KIND:PATH`. A tokenizer library is imported when a tokenizer of its kind is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenizers.special_tokens import CONFIG_FILE, find_document_end, find_special_token
from megatron_cpt.errors import UserError, install_command
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import read_file

KINDS = "sentencepiece:tokenizer.model, huggingface:DIR_OR_tokenizer.json, byte"
_SENTENCEPIECE_FILE = "tokenizer.model"
_JSON_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Interface and base of every kind of tokenizer. No method adds an id of its own (no start, no end of document).

    Attributes:
        vocab_size: every id is below it.
        eod_id: the id that ends a document; None if the vocabulary has none.
        eod_note: sentence about the choice of `eod_id` if the tokenizer's files do not make it, else empty.
        bos_id: the id that begins a document for models that want one; None if the tokenizer names none.
        special_ids: ids that stand for no text of a document, but that `decode` shows.
        template: ids that the tokenizer's own template puts before and after each text; no method here adds them.
        fingerprint: sha256 of the file in hex, or "byte".
    """

    vocab_size: int
    eod_id: int | None
    eod_note: str = ""
    bos_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    template: tuple[list[int], list[int]] = ([], [])
    fingerprint: str

    @property
    def eos_id(self) -> int | None:
        """The id that ends an answer: the named `eos_token`, which may end a turn of a chat; else `eod_id`."""
        return self.eod_id

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

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its name, such as `</s>`; None if the vocabulary lacks it."""
        return None

    def token_name(self, number: int) -> str | None:
        """Return the name of an id; None if it has none."""
        return None


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that a `KIND:PATH` names: `sentencepiece:tokenizer.model`, `huggingface:DIR` or `byte`.

    `null:VOCAB_SIZE` is Megatron-LM's NullTokenizer, for tests of speed.

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
    if kind == "null" and path.isdecimal():
        return NullTokenizer(int(path))
    raise UserError(f"tokenizer {spec!r}: not a known KIND:PATH; give one of {KINDS}")


def read_fingerprint(spec: str) -> str:
    """Return the fingerprint of a tokenizer; in most cases only its file is read, and no library is imported.

    Raises:
        UserError: the kind is unknown, or the file is missing.
    """
    kind, _, name = spec.partition(":")
    path = Path(name)
    if kind == "sentencepiece" and name:
        file = _sentencepiece_file(path) if path.is_dir() else path
    elif kind == "huggingface" and name:
        file = path / _JSON_FILE if path.is_dir() else path
    if kind not in ("sentencepiece", "huggingface") or not name or not file.exists():
        return load_tokenizer(spec).fingerprint
    return hashlib.sha256(_read(file)).hexdigest()


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


class NullTokenizer(Tokenizer):
    """Tokenizer of texts that are ids already, such as "17 4 256", as Megatron-LM's; the last id ends a document."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod_id = vocab_size - 1
        self.fingerprint = f"null:{vocab_size}"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids that each text lists.

        Raises:
            UserError: a text is something else than ids of the vocabulary.
        """
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as text."""
        return " ".join(map(str, ids))

    def _encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split(" ")] if text else []
        except ValueError:
            ids = [-1]
        if not all(0 <= number < self.vocab_size for number in ids):
            raise UserError(f"tokenizer null:{self.vocab_size}: {text[:80]!r} is not a list of ids below that number")
        return ids


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece `tokenizer.model`, alone or in a model's folder; its template is empty.

    Raises:
        UserError: the file is missing or not a SentencePiece model.
    """

    library = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if path.is_dir():
            path = _sentencepiece_file(path)
        self.content = data = _read(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece model; give one of {KINDS}") from error
        self.vocab_size: int = self._model.vocab_size()
        folder = path.parent if path.name == _SENTENCEPIECE_FILE else None
        self.model_eos_id = _not_negative(self._model.eos_id())
        end = find_document_end(folder, self.token_id, self.model_eos_id)
        self.eod_id, self.eod_note = end.id, end.note
        is_named, bos = find_special_token(folder, "bos_token")
        self.bos_id = self.token_id(bos) if bos is not None else None
        if not is_named:
            self.bos_id = _not_negative(self._model.bos_id())
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, with one thread: `preprocess` runs one process per core."""
        ids: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control ids."""
        return str(self._model.decode([int(i) for i in ids]))

    def token_id(self, token: str) -> int | None:
        """Return the id of a piece; None if the vocabulary lacks it."""
        number: int = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None

    def token_name(self, number: int) -> str | None:
        """Return the piece of an id."""
        return str(self._model.id_to_piece(number)) if 0 <= number < self.vocab_size else None

    def pieces(self) -> list[str]:
        """Return the text of each piece, with blanks in place of U+2581."""
        return [self._model.id_to_piece(i).replace("\u2581", " ") for i in range(self.vocab_size)]

    def special_texts(self) -> list[str]:
        """Return the control, unknown and byte pieces, which stand for no text of their own."""
        is_special = (self._model.is_control, self._model.is_unknown, self._model.is_byte)
        return [self._model.id_to_piece(i) for i in range(self.vocab_size) if any(kind(i) for kind in is_special)]


class HuggingFaceTokenizer(Tokenizer):
    """Hugging Face `tokenizer.json`, alone or in a model's folder; other files of a folder are read by transformers.

    Truncation, padding and added special tokens that the file may ask for are switched off: a document is encoded whole
    and unchanged. Text that is written like a special token, such as "</s>", becomes that token, as in transformers and
    Megatron-LM. A file named tokenizer.json gives the same result as its folder.

    Raises:
        UserError: the file is missing or invalid, or the vocabulary lacks the folder's `eos_token`.
    """

    library = "tokenizers"

    def __init__(self, path: Path) -> None:
        import tokenizers

        file = path / _JSON_FILE if path.is_dir() else path
        self.content = data = _convert_folder(path) if path.is_dir() and not file.exists() else _read(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.template = self._read_template()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library raises nothing narrower; its panics are no Exception
            raise UserError(f"tokenizer {file}: not a tokenizer.json ({error}); give one of {KINDS}") from error
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # not the number of ids: they may have gaps
        folder = file.parent if file.name == _JSON_FILE else None
        end = find_document_end(folder, self.token_id)
        self.eod_id, self.eod_note = end.id, end.note
        is_named, bos = find_special_token(folder, "bos_token")
        self.bos_id = self.token_id(bos) if bos is not None else None
        if not is_named and len(self.template[0]) == 1:
            self.bos_id = self.template[0][0]
        _, eos = find_special_token(folder, "eos_token")
        self._eos_id = self.token_id(eos) if eos is not None else None
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.fingerprint = hashlib.sha256(data).hexdigest()

    @property
    def eos_id(self) -> int | None:
        """The id of the named `eos_token`, else `eod_id`."""
        return self._eos_id if self._eos_id is not None else self.eod_id

    def _read_template(self) -> tuple[list[int], list[int]]:
        probe = "a"
        ids: list[int] = self._tokenizer.encode(probe, add_special_tokens=False).ids
        whole: list[int] = self._tokenizer.encode(probe).ids
        begin = next((i for i in range(len(whole)) if whole[i : i + len(ids)] == ids), 0)
        return whole[:begin], whole[begin + len(ids) :]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token; None if the vocabulary lacks it."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token_name(self, number: int) -> str | None:
        """Return the token of an id."""
        name: str | None = self._tokenizer.id_to_token(number)
        return name

    def pieces(self) -> list[str]:
        """Return the text of each id."""
        return list(self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False))

    def special_texts(self) -> list[str]:
        """Return the texts of added tokens."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        if not is_path_error(error):
            raise
        raise UserError(f"tokenizer {path}: {error.strerror}; give one of {KINDS}") from error


def _not_negative(number: int) -> int | None:
    return number if number >= 0 else None


def _sentencepiece_file(folder: Path) -> Path:
    models = [folder / _SENTENCEPIECE_FILE] if (folder / _SENTENCEPIECE_FILE).is_file() else [*folder.glob("*.model")]
    if len(models) == 1:
        return models[0]
    if (folder / _JSON_FILE).is_file():
        raise UserError(f"tokenizer {folder}: no {_SENTENCEPIECE_FILE} in it; use huggingface:{folder}")
    raise UserError(f"tokenizer {folder}: no {_SENTENCEPIECE_FILE} in it; give the file: sentencepiece:PATH_OF_FILE")


def _convert_folder(folder: Path) -> bytes:
    """Return the tokenizer.json that transformers makes of other files: vocab.json and merges.txt, or tekken.json."""
    others = ("vocab.json", "tekken.json", "tiktoken.model", "vocab.txt")
    found = [name for name in others if (folder / name).is_file()]
    if not found and (folder / _SENTENCEPIECE_FILE).is_file():
        raise UserError(
            f"tokenizer {folder}: no {_JSON_FILE} in it, but a {_SENTENCEPIECE_FILE}; use "
            f"sentencepiece:{folder / _SENTENCEPIECE_FILE}"
        )
    if not found:
        raise UserError(f"tokenizer {folder}: no {_JSON_FILE} in it; give the folder that has one, or one of {KINDS}")
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"tokenizer {folder}: no {_JSON_FILE} in it; transformers can read its {found[0]}: {install_command('hf')}"
        ) from error
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return str(loaded.backend_tokenizer.to_str()).encode()
    except Exception as error:  # the library raises many types
        raise UserError(
            f"tokenizer {folder}: no {_JSON_FILE} in it, and transformers cannot read its {found[0]} "
            f"({str(error).splitlines()[0]}); name the class in {folder / CONFIG_FILE}, such as "
            '{"tokenizer_class": "GPT2Tokenizer"}'
        ) from error
