"""Embedders: text to vectors whose inner product is the cosine similarity.

    model2vec:DIR               a static model: the mean of one vector per token; about 1,500 documents/s per core
    sentence-transformers:DIR   a transformer; meant for a GPU

Both read a folder on this machine; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import UserError
from megatron_cpt.files.checksum import Checksum, file_checksum
from megatron_cpt.files.retry import is_path_error

KINDS = "model2vec:DIR, sentence-transformers:DIR"
Vectors = npt.NDArray[np.float32]
_BATCH = 64  # texts; with 512 tokens of 256 numbers each, model2vec gathers 32 MB for them


class Embedder(Protocol):
    """Function from texts to vectors.

    Attributes:
        name: KIND:DIR.
        digest: hash of the model's files; two folders with equal files have equal digests.
    """

    name: str
    digest: str

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return float32 (len(texts), dimensions): rows of length 1, or zeros for a text without a known word."""
        ...


def load_embedder(spec: str) -> Embedder:
    """Load the embedder that a `KIND:DIR` names.

    Raises:
        UserError: the kind is unknown, or the folder does not hold such a model.
        ModuleNotFoundError: its library is not installed.
    """
    kind, _, name = spec.partition(":")
    makers: dict[str, Any] = {"model2vec": StaticEmbedder, "sentence-transformers": TransformerEmbedder}
    if kind not in makers or not name:
        raise UserError(f"embedder {spec!r}: not a known KIND:DIR; give one of {KINDS}")
    folder = Path(name)
    if not folder.is_dir():  # the libraries would take the name for one of a model on the network
        raise UserError(f"embedder {spec}: {name} is no folder; give the folder of a model, see docs/guide/mine.md")
    embedder: Embedder = makers[kind](spec, folder)
    return embedder


class StaticEmbedder(Embedder):
    """Static model of the package model2vec."""

    def __init__(self, name: str, folder: Path) -> None:
        from model2vec import StaticModel

        try:
            self._model: Any = StaticModel.from_pretrained(folder, normalize=False, quantize_to="float32")
        except Exception as error:  # the library raises many types
            raise _not_a_model(name, error) from error
        self.name, self.digest = name, _folder_digest(folder)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the mean vectors of the tokens, scaled to length 1."""
        means = self._model.encode(list(texts), batch_size=_BATCH, use_multiprocessing=False)
        # Scaled here: model2vec 0.8 scales in float64 where a batch has a text without a known word.
        vectors: Vectors = np.ascontiguousarray(means, np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, lengths, out=vectors, where=lengths > 0)
        return vectors


class TransformerEmbedder(Embedder):
    """Model of the package sentence-transformers, on a GPU where torch finds one. Pickled weights are not read."""

    def __init__(self, name: str, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            self._model: Any = SentenceTransformer(
                str(folder), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:  # the library raises many types
            raise _not_a_model(name, error) from error
        self.name, self.digest = name, _folder_digest(folder)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the model's vectors, scaled to length 1."""
        vectors = self._model.encode(
            list(texts), batch_size=_BATCH, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        result = np.ascontiguousarray(vectors, np.float32)
        result[[not text.strip() for text in texts]] = 0  # the vector of the frame around an empty text means nothing
        return result


def _not_a_model(name: str, error: Exception) -> Exception:
    if isinstance(error, ImportError) or (isinstance(error, OSError) and not is_path_error(error) and error.errno):
        return error
    reason = str(error).partition("\n")[0]
    return UserError(f"embedder {name}: not such a model ({type(error).__name__}: {reason}); give one of {KINDS}")


def _folder_digest(folder: Path) -> str:
    checksum = Checksum()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        checksum.update(f"{path.relative_to(folder)} {file_checksum(path)}\n".encode())
    return checksum.hexdigest()
