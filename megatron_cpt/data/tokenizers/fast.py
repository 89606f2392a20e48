"""Encode with the gigatoken package instead of a tokenizer's own slower library, if both give identical ids.

Three guards protect against wrong ids:

1. gigatoken is used only with a certificate (`certificate.py`).
2. A document with a character or special token for which the two are known to differ is encoded by the library.
3. In each block, up to 512 characters of one text are encoded by both. The first difference revokes the certificate,
   and the library encodes everything again.
"""

from __future__ import annotations

import importlib.metadata
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from megatron_cpt.errors import CptError, UserError, install_command

WhenFast = Literal["auto", "on", "off"]
Check = Literal["sample", "all"]

PAYS_FROM_BYTES = 64_000_000
"""Smallest input for which a new certificate saves more time than it takes; an existing one is used for any input."""

_SAMPLE_CHARACTERS = 512
_ASCII = bytes(range(128))


class FastTokenizerMismatchError(CptError):
    """gigatoken gave other ids than the library; the message shows the text."""


@dataclass(frozen=True)
class TokenizerPlan:
    """Instructions from which each worker builds its tokenizer.

    Attributes:
        spec: `KIND:PATH` of the tokenizer.
        certificate: the certificate of gigatoken; None: the library encodes everything.
    """

    spec: str
    certificate: Certificate | None = None
    check: Check = "sample"

    @property
    def engine(self) -> str:
        """Name of the library that encodes most documents."""
        return "gigatoken" if self.certificate is not None else self.spec.partition(":")[0]


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
    """Decide whether gigatoken is used.

    Args:
        tokenizer: the tokenizer that `spec` names.
        when: `auto`: if gigatoken is installed and certified; `on`: always, or raise; `off`: never.
        input_bytes: size of the input; for small inputs no new certificate is made.
        store: None: the user's cache folder.
        notify: called with a sentence before a step that takes long, and when gigatoken is not used.

    Raises:
        UserError: `on`, and gigatoken cannot be used.
    """
    slow = TokenizerPlan(spec, None, check)
    if when == "off" or (when == "auto" and not isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)):
        return slow
    certificate, problem = _find_certificate(tokenizer, when, input_bytes, store or CertificateStore(), notify)
    if certificate is not None and certificate.certified:
        return replace(slow, certificate=certificate)
    if certificate is not None:
        problem = f"gigatoken is not used, because it disagrees with the library on {spec}: {certificate.reason}"
        notify(problem)
    if when == "on":
        raise UserError(f"the fast tokenizer cannot be used for {spec}: {problem}")
    return slow


def _find_certificate(
    tokenizer: Tokenizer, when: WhenFast, input_bytes: int, store: CertificateStore, notify: Callable[[str], None]
) -> tuple[Certificate | None, str]:
    if not isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer):
        return None, "gigatoken does not support this kind"
    versions = library_versions(tokenizer)
    if versions is None:
        return None, f"the package gigatoken is not installed; {install_command('fast')}"
    certificate = store.load(tokenizer.fingerprint, versions)
    if certificate is None and (when == "on" or input_bytes >= PAYS_FROM_BYTES):
        notify("comparing gigatoken with the tokenizer's own library, once per tokenizer")
        certificate = make_certificate(tokenizer)
        store.save(tokenizer.fingerprint, versions, certificate)
    return certificate, "the input is too small for a new certificate to pay off"


def library_versions(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> str | None:
    """Return the versions for which a certificate is valid; None if gigatoken is not installed."""
    try:
        names = ("gigatoken", tokenizer.library)
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    except importlib.metadata.PackageNotFoundError:
        return None


def make_certificate(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> Certificate:
    """Compare gigatoken with a tokenizer's own library; takes seconds."""
    try:
        fast = load_fast(tokenizer)
    except Exception as error:  # noqa: BLE001 (its parser raises many types; any error means: cannot be used)
        return Certificate(False, f"gigatoken cannot load it: {error}")
    return certify(tokenizer.encode_batch, fast, tokenizer.pieces(), tokenizer.special_texts())


def revoke_certificate(spec: str, certificate: Certificate, reason: str) -> None:
    """Record in the store that gigatoken gave wrong ids."""
    tokenizer = load_tokenizer(spec)
    assert isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)
    versions = library_versions(tokenizer)
    if versions is not None:
        revoked = replace(certificate, certified=False, reason=reason)
        CertificateStore().save(tokenizer.fingerprint, versions, revoked)


def load_fast(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> EncodeOne:
    """Return gigatoken's encoder of one text for a tokenizer's file."""
    import gigatoken

    is_sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    load = gigatoken.Tokenizer.from_sentencepiece if is_sentencepiece else gigatoken.Tokenizer.from_json
    # one call and one array per document: the fastest way from Python
    encode: EncodeOne = load(tokenizer.content).backend.encode
    return encode


def build_tokenizer(plan: TokenizerPlan) -> Tokenizer:
    """Build the tokenizer of a plan, in the process that is going to use it."""
    tokenizer = load_tokenizer(plan.spec)
    if plan.certificate is None:
        return tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)
    return CheckedTokenizer(tokenizer, load_fast(tokenizer), plan.certificate, plan.check)


class CheckedTokenizer(Tokenizer):
    """Tokenizer that encodes safe documents with gigatoken, compares some of them, and leaves the rest to the library.

    Args:
        slow: the library's tokenizer.
        fast: gigatoken's encoder of one text.
    """

    def __init__(self, slow: Tokenizer, fast: EncodeOne, certificate: Certificate, check: Check = "sample") -> None:
        assert certificate.certified
        self.vocab_size, self.eod_id, self.fingerprint = slow.vocab_size, slow.eod_id, slow.fingerprint
        self._slow, self._fast, self._check = slow, fast, check
        # `re` looks up the first 65,536 characters in one table, but tries the ranges above one by one. So a quick
        # pattern takes every character above for a suspect, and only texts with a suspect meet the slow pattern.
        low = [(first, min(last, 0xFFFF)) for first, last in certificate.unsafe_ranges if first <= 0xFFFF]
        self._suspect_character = _character_class([*low, (0x10000, 0x10FFFF)]).search
        self._unsafe_character = _character_class(certificate.unsafe_ranges).search
        texts = certificate.unsafe_texts
        self._unsafe_text = re.compile("|".join(map(re.escape, texts))).search if texts else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the library's ids of many texts."""
        return self._slow.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self._slow.decode(ids)

    def encode_arrays(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the ids of many texts, one array of unsigned integers per text.

        Raises:
            FastTokenizerMismatchError: gigatoken and the library disagree.
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
        if text.isascii():  # certificates without safe ASCII do not exist
            return False
        others = text.encode().translate(None, _ASCII).decode()  # far quicker than searching through the ASCII as well
        return self._suspect_character(others) is not None and self._unsafe_character(others) is not None

    def _compare(self, texts: Sequence[str]) -> None:
        if not texts:
            return
        if self._check == "sample":  # the choice follows from the block alone, so every run checks the same text
            chosen = texts[zlib.crc32(f"{len(texts)} {texts[0][:64]}".encode()) % len(texts)]
            start = zlib.crc32(chosen[:64].encode()) % max(1, len(chosen) - _SAMPLE_CHARACTERS)
            texts = [chosen[start : start + _SAMPLE_CHARACTERS]]
        for text, slow_ids in zip(texts, self._slow.encode_batch(texts), strict=True):
            if not np.array_equal(self._fast(text), slow_ids):
                raise FastTokenizerMismatchError(f"gigatoken and the library disagree on {text[:200]!r}")


def _character_class(ranges: Sequence[tuple[int, int]]) -> re.Pattern[str]:
    if not ranges:
        return re.compile("(?!)")  # matches nothing
    return re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]")
