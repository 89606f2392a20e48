"""Certificates that a fast tokenizer gives the same ids as the library it replaces; made once per tokenizer.

No finite number of probes proves that two programs agree on every text. The probes are chosen where tokenizers differ:

- character classes: each code point of the planes that text is written in, in several neighborhoods;
- splits at class boundaries: every string of three representatives of the classes, and many longer strings;
- merges: each piece of the vocabulary;
- special tokens.

Characters and special tokens that give other ids are listed in the certificate. The library encodes the documents that
hold one of them, or a code point that was never probed. Any other difference means: not certified.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import orjson

from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import read_file

PROBES_VERSION = 1
_PROBED = (
    range(0x0, 0xD800),
    range(0xE000, 0x32000),
    range(0xE0000, 0xE0200),
)  # all other code points are unassigned or private
_GROUP = 64
_MOST_UNSAFE = 50_000
_BATCH = 4096
# One of each class that pretokenizers distinguish: blanks, line ends, cases, numbers, punctuation, scripts
_REPRESENTATIVES = (
    *" \n\r\t\x00\u0085\u00a0\u2028\u3000",
    *"aAéßǅ中のไﬁ\u0301",
    *"1٣½",
    *("'", "s", "ll", ".", "-", "_", "/", "\u2581", "😀", "\u200d"),
)

EncodeBatch = Callable[[Sequence[str]], Sequence[Sequence[int]]]
EncodeOne = Callable[[str], "np.typing.NDArray[np.uint32]"]


@dataclass(frozen=True)
class Certificate:
    """Result of the comparison for one tokenizer.

    Attributes:
        certified: whether the fast tokenizer may encode documents without unsafe characters and texts.
        reason: why it may not.
        unsafe_ranges: code points [first, last] that give other ids or were not probed; never ASCII.
        unsafe_texts: special tokens that give other ids.
        num_probes: number of compared strings.
    """

    certified: bool
    reason: str = ""
    unsafe_ranges: list[tuple[int, int]] = field(default_factory=list)
    unsafe_texts: list[str] = field(default_factory=list)
    num_probes: int = 0
    seconds: float = 0.0


class _Comparison:
    """Comparison of two encoders that counts its probes."""

    def __init__(self, slow: EncodeBatch, fast: EncodeOne) -> None:
        self._slow = slow
        self._fast = fast
        self.num_probes = 0

    def different(self, probes: Iterable[str]) -> Iterator[str]:
        """Yield the probes that give different ids."""
        iterator = iter(probes)
        while batch := list(itertools.islice(iterator, _BATCH)):
            self.num_probes += len(batch)
            for probe, ids in zip(batch, self._slow(batch), strict=True):
                if not np.array_equal(self._fast(probe), ids):
                    yield probe


def certify(slow: EncodeBatch, fast: EncodeOne, pieces: Sequence[str], special_texts: Sequence[str]) -> Certificate:
    """Compare two encoders.

    Args:
        slow: the library's encoder of many texts; it is right by definition.
        fast: the encoder to certify, one text at a time.
        pieces: the text of each piece of the vocabulary.
    """
    started = time.monotonic()
    comparison = _Comparison(slow, fast)

    def finished(ok: bool, reason: str = "") -> Certificate:
        seconds = time.monotonic() - started
        return Certificate(ok, reason, _as_ranges(unsafe), unsafe_texts, comparison.num_probes, seconds)

    unsafe: set[int] = set()
    unsafe_texts = [text for text in special_texts if any(comparison.different([text, f"a{text}b", f" {text} {text}"]))]
    unsafe = _unsafe_code_points(comparison)
    if any(code < 128 for code in unsafe) or len(unsafe) > _MOST_UNSAFE:
        return finished(False, f"{len(unsafe)} characters give other ids, the first is U+{min(unsafe):04X}")
    risky = {chr(code) for code in unsafe}
    for probe in comparison.different(itertools.chain(pieces, _mixed_probes(unsafe))):
        if risky.isdisjoint(probe) and not any(text in probe for text in unsafe_texts):
            return finished(False, f"other ids for {probe[:200]!r}")
    return finished(True)


def _unsafe_code_points(comparison: _Comparison) -> set[int]:
    groups = [codes[i : i + _GROUP] for codes in _PROBED for i in range(0, len(codes), _GROUP)]
    by_probe = {"".join(map(_in_neighborhoods, group)): group for group in groups}
    unsafe: set[int] = set()
    for probe in list(comparison.different(by_probe)):
        group = by_probe[probe]
        alone = {ord(text[1]) for text in comparison.different(map(_in_neighborhoods, group))}
        unsafe.update(alone or group)
    return unsafe


def _in_neighborhoods(code: int) -> str:
    c = chr(code)
    return f"a{c}a {c}1{c}{c}.{c}\n{c}"


def _mixed_probes(unsafe: set[int]) -> Iterator[str]:
    """Yield class boundaries, random text of safe characters, and real prose: the same strings every time."""
    from pydoc_data.topics import topics  # Python's own manual: half a megabyte of prose, code and tables

    rng = random.Random(PROBES_VERSION)
    yield from ("".join(chosen) for chosen in itertools.product(_REPRESENTATIVES, repeat=3))
    yield from ("".join(rng.choices(_REPRESENTATIVES, k=rng.randrange(4, 80))) for _ in range(10_000))
    characters = [chr(code) for codes in _PROBED for code in codes if code not in unsafe]
    yield from ("".join(rng.choices(characters, k=60)) for _ in range(3_000))
    ascii_characters = [chr(code) for code in range(9, 127)]
    yield from ("".join(rng.choices(ascii_characters, k=300)) for _ in range(2_000))
    yield from ("a" * 3000, " " * 3000, "\n" * 3000, "=" * 3000, "1" * 3000, "中" * 3000, "ab " * 3000, "")
    yield from topics.values()


def _as_ranges(codes: set[int]) -> list[tuple[int, int]]:
    """Return the ranges of these code points and of all code points that are never probed."""
    not_probed = [(before.stop, after.start - 1) for before, after in itertools.pairwise(_PROBED)]
    ranges = [*not_probed, (_PROBED[-1].stop, 0x10FFFF)]
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return sorted(ranges)


class CertificateStore:
    """Folder of certificates (default: in the user's cache), one file per tokenizer and versions of the libraries."""

    def __init__(self, folder: Path | None = None) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self._folder = folder or Path(cache, "megatron_cpt", "certificates")

    def load(self, fingerprint: str, versions: str) -> Certificate | None:
        """Return the certificate; None if it is missing or cannot be read."""
        try:
            content = orjson.loads(read_file(self._path(fingerprint, versions)))
            content["unsafe_ranges"] = [(first, last) for first, last in content["unsafe_ranges"]]
            return Certificate(**content)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save(self, fingerprint: str, versions: str, certificate: Certificate) -> None:
        """Store a certificate; if the folder cannot be written, later runs make it again."""
        content = orjson.dumps(asdict(certificate), option=orjson.OPT_INDENT_2)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(fingerprint, versions), content, has_several_writers=True)

    def _path(self, fingerprint: str, versions: str) -> Path:
        digest = hashlib.sha256(f"{fingerprint} {versions} probes {PROBES_VERSION}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"
