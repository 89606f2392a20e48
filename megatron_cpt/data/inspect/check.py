"""Validation of a dataset: every fault with its file, place and value, and warnings about the documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_cpt.data.inspect.check_documents import DocumentReport, check_documents
from megatron_cpt.data.inspect.check_index import examine_index
from megatron_cpt.data.inspect.findings import MOST_NAMED, Finding, fault, listed
from megatron_cpt.data.inspect.scan_ids import IdScan, scan_ids
from megatron_cpt.data.tokenfile.document_list import is_document_list, listed_prefixes
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.header import IndexHeader
from megatron_cpt.data.tokenfile.listed_documents import ListedDocuments
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenfile.sidecar import Sidecar, content_faults, name_tokenizer, read_sidecar, sidecar_path
from megatron_cpt.data.tokenizers.tokenizer import read_fingerprint
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
        sidecar: content of the PREFIX.json; None without one, or if the index is invalid.
        findings: faults and warnings, in the order they were found.
    """

    prefix: str
    header: IndexHeader | None
    vocab_size: int | None
    scan: IdScan | None
    documents: DocumentReport | None
    fingerprint: str | None
    sidecar: Sidecar | None
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
            "likely_eod_id": documents and documents.likely_eod_id,
            "tokenizer": self.sidecar and self.sidecar.origin.tokenizer,
            "tokenizer_fingerprint": self.sidecar and self.sidecar.origin.fingerprint,
            "content_verified": self.sidecar is not None and "content" not in {one.kind for one in self.findings},
            "documents_without_eod": documents and documents.num_without_eod,
            "fingerprint": self.fingerprint,
            "findings": [asdict(finding) | {"message": str(finding)} for finding in self.findings],
        }


def check_dataset(
    prefix: str,
    *,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    tokenizer: str | None = None,
    seq_length: int | None = None,
    duplicates: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Validate a PREFIX.bin/PREFIX.idx pair completely, or a document list without its pairs.

    Args:
        vocab_size: ids must be below it; None: ids are not compared.
        eod_id: documents must end with it; None: the sidecar's.
        tokenizer: KIND:PATH that the sidecar must name by its fingerprint; None: it is not compared.
        seq_length: tokens that a sample trains on; a dataset that is too short for one gets a warning.
        progress: called with the number of bytes after each block of the `.bin`; a sidecar adds a second read.

    Raises:
        UserError: a file is missing or not readable.
    """
    if is_document_list(prefix):
        return _check_list(prefix)
    header, findings = examine_index(prefix)
    scan, documents, digest, sidecar = None, None, None, None
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
        try:
            sidecar = read_sidecar(dataset.header)
        except RefusedError as error:
            path = sidecar_path(prefix)
            findings.append(fault("sidecar", path, str(error).removeprefix(f"{path}: ")))
        else:
            digest = fingerprint([dataset])
        if sidecar is not None:
            findings += _compare_sidecar(prefix, sidecar, tokenizer, progress)
            eod_id = sidecar.origin.eod_id if eod_id is None else eod_id
        elif scan is not None:
            findings += _long_runs(prefix, scan, dataset)
        documents = check_documents(dataset, eod_id=eod_id, duplicates=duplicates)
        findings += documents.findings
        if seq_length is not None and dataset.num_tokens <= seq_length:
            problem = f"{dataset.num_tokens:,} tokens are too few for a sample of {seq_length + 1:,}: it is never read"
            findings.append(Finding("warning", "too_short", f"{prefix}.bin", "", dataset.num_tokens, problem))
    return CheckReport(prefix, header, vocab_size, scan, documents, digest, sidecar, tuple(findings))


def with_listed_pairs(prefixes: Sequence[str]) -> list[str]:
    """Return the datasets, with the pairs that document lists choose from behind their lists, each once.

    Raises:
        UserError: there is no such list.
        RefusedError: a list is damaged.
    """
    found = []
    for prefix in prefixes:
        found.append(prefix)
        if is_document_list(prefix):
            found += listed_prefixes(prefix)
    return list(dict.fromkeys(found))


def _check_list(path: str) -> CheckReport:
    """Compare a document list with its pairs; they are validated by reports of their own."""
    try:
        dataset = ListedDocuments(path)
    except RefusedError as error:
        finding = fault("list", path, str(error).removeprefix(f"{path}: "))
        return CheckReport(path, None, None, None, None, None, None, (finding,))
    return CheckReport(path, dataset.header, None, None, None, fingerprint([dataset]), None, ())


def _compare_sidecar(
    prefix: str, sidecar: Sidecar, tokenizer: str | None, progress: Callable[[int], None] | None
) -> Iterator[Finding]:
    """Yield a fault for each file whose content differs from the sidecar, and for another tokenizer."""
    for path, problem in content_faults(prefix, sidecar, progress):
        yield fault("content", path, problem)
    fingerprint_now = read_fingerprint(tokenizer) if tokenizer is not None else None
    if tokenizer is not None and fingerprint_now not in (None, sidecar.origin.fingerprint):
        problem = f"its ids are of tokenizer {sidecar.origin.name}, not of {name_tokenizer(tokenizer, fingerprint_now)}"
        yield fault("tokenizer", f"{prefix}.bin", problem, value=sidecar.origin.tokenizer)


def _long_runs(prefix: str, scan: IdScan, dataset: IndexedDataset) -> Iterator[Finding]:
    """Return findings for long runs of one id: a fault if the file has nothing else, else warnings."""
    level: Literal["fault", "warning"] = "warning"
    named = []
    for offset, count, token in scan.long_runs[:MOST_NAMED]:
        place = f"token {offset} of document {dataset.document_at(offset)}"
        named.append((place, token, f"id {token} stands {count:,} times in a row; the file may be damaged"))
        level = "fault" if count == dataset.num_tokens else level
    return listed(level, "run_of_one_id", f"{prefix}.bin", len(scan.long_runs), named)


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
