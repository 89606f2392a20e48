"""Is a data set sound? Every fault by file, place and value, and what is worth knowing about a sound one."""

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
    """What is known of a data set after a check.

    Attributes:
        prefix: the path without `.bin` or `.idx`.
        header: what the `.idx` says; None where it says nothing that can be understood.
        vocab_size: what the ids were held against; None: nothing.
        scan: what the ids are like; None where they could not be read.
        documents: what the documents are like; None where the index is not sound.
        fingerprint: what a checkpoint knows this data set by; None where it is not sound.
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
        """What makes it unsound."""
        return [finding for finding in self.findings if finding.level == "fault"]

    @property
    def is_valid(self) -> bool:
        """Whether it may be trained on."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
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
            "findings": [finding.to_dict() | {"message": str(finding)} for finding in self.findings],
        }


def check_dataset(
    prefix: str,
    *,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    duplicates: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Check one PREFIX.bin/PREFIX.idx pair through and through.

    Args:
        prefix: path without `.bin` or `.idx`.
        vocab_size: ids must be below it; None: the largest is only reported.
        eod_id: documents must end with it; None: the id that most of them end with is found out, and the others are
            warned of.
        duplicates: whether to look for documents that are the same.
        progress: called with the bytes of every block of the `.bin` that was read.

    Raises:
        UserError: a file is missing or may not be read.
    """
    header, findings = examine_index(prefix)
    scan, documents, digest = None, None, None
    index_is_valid = header is not None and not findings
    if header is not None and header.dtype.kind in "iu":
        try:
            scan = scan_ids(f"{prefix}.bin", header.dtype, header.num_tokens, vocab_size, progress=progress)
            findings += _outside(prefix, scan, vocab_size, index_is_valid)
        except RefusedError as error:
            findings.append(fault("unreadable", f"{prefix}.bin", str(error).removeprefix(f"{prefix}.bin: ")))
            index_is_valid = False
    if index_is_valid:
        dataset = IndexedDataset(prefix)
        documents = check_documents(dataset, eod_id=eod_id, duplicates=duplicates)
        findings += documents.findings
        digest = fingerprint([dataset])
    return CheckReport(prefix, header, vocab_size, scan, documents, digest, tuple(findings))


def _outside(prefix: str, scan: IdScan, vocab_size: int | None, index_is_valid: bool) -> list[Finding]:
    """Ids outside of the vocabulary, with their documents where the index can tell."""
    if not scan.num_outside:
        return []
    dataset = IndexedDataset(prefix) if index_is_valid else None
    bound = f"outside of the vocabulary of {vocab_size}" if vocab_size is not None else "negative"
    named = []
    for offset, token in scan.first_outside:
        document = f" of document {dataset.document_at(offset)}" if dataset is not None else ""
        named.append((f"token {offset}{document}", token, f"id {token} is {bound}"))
    return list(listed("fault", "vocabulary", f"{prefix}.bin", scan.num_outside, named))
