"""The gigatoken package in place of a slower library, where it was seen to give the same ids.

Three guards stand between its speed and a wrong id. A certificate (see `certificate.py`) is needed to begin at all. A
document that holds a character or special token in which the two are known to differ goes to the library. And in each
block one text, at most 512 characters of it, is encoded by both: the first difference ends the run, revokes the
certificate, and everything is encoded again by the library.
"""

from __future__ import annotations

import importlib.metadata
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenizers.certificate import Certificate, CertificateStore, EncodeOne, certify
from megatron_cpt.data.tokenizers.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_cpt.errors import CptError, UserError

WhenFast = Literal["auto", "on", "off"]
Check = Literal["sample", "all"]

PAYS_FROM_BYTES = 64_000_000
"""Of input: below, a certificate takes longer than it saves, and only one that is there already is used."""

_SAMPLE_CHARACTERS = 512
_ASCII = bytes(range(128))


class FastTokenizerMismatchError(CptError):
    """The fast tokenizer gave other ids than the library; the message shows the text."""


@dataclass(frozen=True)
class TokenizerPlan:
    """How workers make their tokenizer.

    Attributes:
        spec: its `KIND:PATH`.
        certificate: of the fast one; None: the library encodes everything.
        check: compare a sample, or every document.
    """

    spec: str
    certificate: Certificate | None = None
    check: Check = "sample"

    @property
    def engine(self) -> str:
        """What encodes most documents."""
        return "gigatoken" if self.certificate is not None else self.spec.partition(":")[0]

    def without_fast(self) -> TokenizerPlan:
        """The same, with the library only."""
        return replace(self, certificate=None)


def plan_tokenizer(
    spec: str,
    tokenizer: Tokenizer,
    *,
    when: WhenFast = "auto",
    check: Check = "sample",
    input_bytes: int = 0,
    store: CertificateStore | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> TokenizerPlan:
    """Decides whether the fast tokenizer is used.

    Args:
        spec: `KIND:PATH`.
        tokenizer: what it names, loaded.
        when: `auto`: where it is installed, certified and pays; `on`: it must be; `off`: never.
        check: how much of its work is compared with the library's.
        input_bytes: size of the input, to see whether a new certificate pays.
        store: where certificates are kept.
        notify: told what takes long, or is in the way.

    Raises:
        UserError: `on`, and it cannot be used.
    """
    slow = TokenizerPlan(spec, None, check)
    if when == "off" or (when == "auto" and not isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)):
        return slow
    certificate, problem = _find_certificate(tokenizer, when, input_bytes, store or CertificateStore(), notify)
    if certificate is not None and certificate.certified:
        return replace(slow, certificate=certificate)
    if certificate is not None:
        problem = f"gigatoken is not used, for it does not agree with the library on {spec}: {certificate.reason}"
        notify(problem)
    if when == "on":
        raise UserError(f"the fast tokenizer cannot be used for {spec}: {problem}")
    return slow


def _find_certificate(
    tokenizer: Tokenizer, when: WhenFast, input_bytes: int, store: CertificateStore, notify: Callable[[str], None]
) -> tuple[Certificate | None, str]:
    if not isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer):
        return None, "there is none for this kind"
    versions = library_versions(tokenizer)
    if versions is None:
        return None, "the package gigatoken is not installed; pip install 'megatron-cpt[fast]'"
    certificate = store.load(tokenizer.fingerprint, versions)
    if certificate is None and (when == "on" or input_bytes >= PAYS_FROM_BYTES):
        notify("comparing gigatoken with the tokenizer's own library, once for this tokenizer")
        certificate = make_certificate(tokenizer)
        store.save(tokenizer.fingerprint, versions, certificate)
    return certificate, "too little input for a certificate to pay"


def library_versions(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> str | None:
    """The versions that a certificate holds for; None if gigatoken is not installed."""
    try:
        names = ("gigatoken", tokenizer.library)
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    except importlib.metadata.PackageNotFoundError:
        return None


def make_certificate(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> Certificate:
    """Compares gigatoken with a tokenizer's own library; takes seconds."""
    try:
        fast = load_fast(tokenizer)
    except Exception as error:  # noqa: BLE001 (it raises whatever its parser meets; any of it means: not for this one)
        return Certificate(False, f"gigatoken does not load it: {error}")
    return certify(tokenizer.encode_batch, fast, tokenizer.pieces(), tokenizer.special_texts())


def revoke_certificate(spec: str, certificate: Certificate, reason: str, store: CertificateStore | None = None) -> None:
    """Remembers that the fast tokenizer was wrong after all."""
    tokenizer = load_tokenizer(spec)
    assert isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)
    versions = library_versions(tokenizer)
    if versions is not None:
        (store or CertificateStore()).save(tokenizer.fingerprint, versions, certificate.revoked(reason))


def load_fast(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> EncodeOne:
    """gigatoken's encoder of one text, for the same file."""
    import gigatoken

    data = Path(tokenizer.file).read_bytes()
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = gigatoken.Tokenizer.from_sentencepiece(data)
    else:
        fast = gigatoken.Tokenizer.from_json(data)
    encode: EncodeOne = fast.backend.encode  # one call into it and one array a document: nothing is faster from Python
    return encode


def build_tokenizer(plan: TokenizerPlan) -> Tokenizer:
    """The tokenizer of a plan, in the process that is going to use it."""
    tokenizer = load_tokenizer(plan.spec)
    if plan.certificate is None:
        return tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)
    return CheckedTokenizer(tokenizer, load_fast(tokenizer), plan.certificate, plan.check)


class CheckedTokenizer:
    """Encodes with the fast tokenizer what is safe to, checks a part of it, and leaves the rest to the library.

    Args:
        slow: the library's tokenizer.
        fast: encodes one text.
        certificate: what is known about `fast`.
        check: compare a sample, or every document.
    """

    def __init__(self, slow: Tokenizer, fast: EncodeOne, certificate: Certificate, check: Check = "sample") -> None:
        assert certificate.certified
        self.vocab_size, self.eod_id, self.fingerprint = slow.vocab_size, slow.eod_id, slow.fingerprint
        self.encode, self.encode_batch, self.decode = slow.encode, slow.encode_batch, slow.decode
        self._slow, self._fast, self._check = slow, fast, check
        # `re` makes one quick table of the first 65,536 characters, but tries all ranges behind it one by one. So the
        # quick pattern takes every character behind it for a suspect, and only then the slow one is asked.
        low = [(first, min(last, 0xFFFF)) for first, last in certificate.unsafe_ranges if first <= 0xFFFF]
        self._suspect_character = _character_class([*low, (0x10000, 0x10FFFF)]).search
        self._unsafe_character = _character_class(certificate.unsafe_ranges).search
        texts = certificate.unsafe_texts
        self._unsafe_text = re.compile("|".join(map(re.escape, texts))).search if texts else None

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The ids of many texts, an array of unsigned integers each.

        Raises:
            FastTokenizerMismatchError: the two did not agree.
        """
        risky = {i for i, text in enumerate(texts) if self._is_risky(text)}
        safe = [text for i, text in enumerate(texts) if i not in risky] if risky else texts
        self._compare(safe)
        fast_ids: Iterator[npt.NDArray[Any]] = map(self._fast, safe)
        if not risky:
            return list(fast_ids)
        slow_ids = iter(self._slow.encode_arrays([texts[i] for i in sorted(risky)]))
        return [next(slow_ids) if i in risky else next(fast_ids) for i in range(len(texts))]

    def _is_risky(self, text: str) -> bool:
        if self._unsafe_text is not None and self._unsafe_text(text):
            return True
        if text.isascii():  # nothing unsafe is
            return False
        others = text.encode().translate(None, _ASCII).decode()  # far quicker than to search through the ASCII as well
        return self._suspect_character(others) is not None and self._unsafe_character(others) is not None

    def _compare(self, texts: Sequence[str]) -> None:
        if not texts:
            return
        if self._check == "sample":  # which one follows from the block alone, so every run checks the same
            chosen = texts[zlib.crc32(f"{len(texts)} {texts[0][:64]}".encode()) % len(texts)]
            start = zlib.crc32(chosen[:64].encode()) % max(1, len(chosen) - _SAMPLE_CHARACTERS)
            texts = [chosen[start : start + _SAMPLE_CHARACTERS]]
        for text, slow_ids in zip(texts, self._slow.encode_batch(texts), strict=True):
            if not np.array_equal(self._fast(text), slow_ids):
                raise FastTokenizerMismatchError(f"gigatoken and the library disagree on {text[:200]!r}")


def _character_class(ranges: Sequence[tuple[int, int]]) -> re.Pattern[str]:
    if not ranges:
        return re.compile("(?!)")  # nothing
    return re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]")
