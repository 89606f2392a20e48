"""Validation of a dataset: every fault with its file, place and value, and warnings about the documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.data.inspect.check_documents import DocumentReport, check_documents
from megatron_cpt.data.inspect.check_index import examine_index
from megatron_cpt.data.inspect.findings import Finding, fault, listed
from megatron_cpt.data.inspect.scan_ids import IdScan, scan_ids
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.header import IndexHeader
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError


@dataclass(frozen=True)
class CheckReport:
    """Result of the validation of a dataset.

    Attributes:
        header: header of the `.idx`; None if it cannot be parsed.
        vocab_size: size of the vocabulary that ids were compared with; None: they were not compared.
        scan: statistics of all ids; None if they could not be read.
        documents: statistics of all documents; None if the index is invalid.
        fingerprint: fingerprint of the dataset, as checkpoints record it; None if the index is invalid.
        findings: faults and warnings, in the order they were found.
    """

    prefix: str
    header: IndexHeader | None
    vocab_size: int | None
    scan: IdScan | None
    documents: DocumentReport | None
    fingerprint: str | None
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> list[Finding]:
        """Findings that make the dataset invalid."""
        return [finding for finding in self.findings if finding.level == "fault"]

    @property
    def is_valid(self) -> bool:
        """True if there are no faults, so that the dataset can be used for training."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        header, documents = self.header, self.documents
        return {
            "prefix": self.prefix,
            "sound": self.is_valid,
            "dtype": header and header.dtype.name,
            "documents": header and header.num_documents,
            "sequences": header and header.num_sequences,
            "tokens": header and header.num_tokens,
            "vocab_size": self.vocab_size,
            "ids": self.scan and (asdict(self.scan) | {"gigabytes_per_second": self.scan.gigabytes_per_second}),
            "empty_documents": documents and documents.num_empty,
            "duplicate_documents": documents and documents.num_duplicates,
            "eod_id": documents and documents.eod_id,
            "documents_without_eod": documents and documents.num_without_eod,
            "fingerprint": self.fingerprint,
            "findings": [asdict(finding) | {"message": str(finding)} for finding in self.findings],
        }


def check_dataset(
    prefix: str,
    *,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    duplicates: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Validate a PREFIX.bin/PREFIX.idx pair completely.

    Args:
        vocab_size: ids must be below it; None: ids are not compared.
        eod_id: documents must end with it; None: the most frequent last id is used, and other documents get a warning.
        progress: called with the number of bytes after each block of the `.bin`.

    Raises:
        UserError: a file is missing or not readable.
    """
    header, findings = examine_index(prefix)
    scan, documents, digest = None, None, None
    index_is_valid = header is not None and not findings
    if header is not None and header.dtype.kind in "iu":
        try:
            scan = scan_ids(f"{prefix}.bin", header.dtype, header.num_tokens, vocab_size, progress=progress)
            findings += _ids_outside(prefix, scan, vocab_size, index_is_valid)
        except RefusedError as error:
            findings.append(fault("unreadable", f"{prefix}.bin", str(error).removeprefix(f"{prefix}.bin: ")))
            index_is_valid = False
    if index_is_valid:
        dataset = IndexedDataset(prefix)
        documents = check_documents(dataset, eod_id=eod_id, duplicates=duplicates)
        findings += documents.findings
        digest = fingerprint([dataset])
    return CheckReport(prefix, header, vocab_size, scan, documents, digest, tuple(findings))


def _ids_outside(prefix: str, scan: IdScan, vocab_size: int | None, index_is_valid: bool) -> list[Finding]:
    """Return findings for ids outside the vocabulary, with their documents if the index is valid."""
    if not scan.num_outside:
        return []
    dataset = IndexedDataset(prefix) if index_is_valid else None
    bound = f"outside of the vocabulary of {vocab_size}" if vocab_size is not None else "negative"
    named = []
    for offset, token in scan.first_outside:
        document = f" of document {dataset.document_at(offset)}" if dataset is not None else ""
        named.append((f"token {offset}{document}", token, f"id {token} is {bound}"))
    return list(listed("fault", "vocabulary", f"{prefix}.bin", scan.num_outside, named))
