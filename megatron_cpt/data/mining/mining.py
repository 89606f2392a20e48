"""Document mining: the nearest documents of each question, as a dataset or as a list of documents.

    embed the queries -> mine every range (`ranges.py`) -> merge -> unite -> drop copies and held-out text -> write

The result of each range is a file of the work folder OUTPUT.mine, recorded in its journal. A killed call is resumed by
the same call, and the output is identical byte for byte. A shard stops after its ranges; `join` reads the ranges of all
shards and does the rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.data.contamination.overlap import NGRAM, HeldOutSet
from megatron_cpt.data.mining.mining_job import JOURNAL, MiningJob, MiningOptions, as_datasets, prepare_mining
from megatron_cpt.data.mining.mining_output import record_published, require_free_output, require_no_input
from megatron_cpt.data.mining.mining_report import MiningReport, begin_report, describe_mined
from megatron_cpt.data.mining.ranges import decode_result, default_workers, run_in_processes
from megatron_cpt.data.mining.search import Neighbors, sample_queries
from megatron_cpt.data.mining.selection import Mined, find_copies, find_held_out, locate, unite
from megatron_cpt.data.mining.texts import DocumentTexts, input_files, read_held_out, read_origin
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.tokenfile.document_list import (
    ENDING,
    DocumentList,
    describe_dataset,
    is_document_list,
    write_document_list,
)
from megatron_cpt.data.tokenfile.reader import join_tokenizers
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter, require_file_name
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import close_durably, publish_or_remove
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.resumable import DurableJournal, ResumableFolder, differing_names, read_settings
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.files.whole_io import exists, open_writer, read_file

_RANGES = "ranges.json"  # the number of ranges; recorded first


def mine(
    queries: Sequence[str],
    corpus: Sequence[str],
    output: str | os.PathLike[str],
    *,
    embedder: str,
    options: MiningOptions = MiningOptions(),  # noqa: B008 - immutable
) -> MiningReport:
    """Write the documents of a corpus that are nearest to any query.

        report = mine(["data/qa"], ["data/web", "data/code"], "data/mined.docs", embedder="model2vec:static")

    Args:
        queries: datasets, or text files in the formats of `preprocess`.
        corpus: datasets, globs of them, or text files, which are encoded first.
        output: a prefix of .bin/.idx, or a document list, whose name ends in `.docs`.
        embedder: KIND:DIR, see `load_embedder`.
        options: everything else.

    Raises:
        UserError: a file is missing, the output exists, or there is nothing to mine.
        RefusedError: a file is damaged, tokenizers differ, mined documents overlap with held-out ones, or none is left.
        ChangedFileError: a file changed while it was read.
    """
    started, target = time.monotonic(), os.fspath(output)
    require_file_name(target.removesuffix(ENDING))
    if options.workers is not None and options.engine is not None:
        raise UserError("workers: only for the engine that runs processes here")
    folder = work_folder(target, options.shard)
    with os_errors_as_cpt_errors(folder):
        _check_output(queries, corpus, target, options)
        with as_datasets(corpus, target, options) as prefixes:
            job = prepare_mining(queries, prefixes, target, embedder, options)
            for _ in read_held_out(options.held_out, job.tokenizer, options.held_out_keys):
                pass  # a mistake ends the call here instead of after the search
            report = _mine_shards(job, folder) if options.join is None else _join(job, options.join)
    return replace(report, seconds=time.monotonic() - started)


def work_folder(output: str, shard: Shard | None = None) -> Path:
    """Return the work folder of a call."""
    return Path(f"{output}.mine" + (f"-{shard.index}-of-{shard.count}" if shard else ""))


def _check_output(queries: Sequence[str], corpus: Sequence[str], output: str, options: MiningOptions) -> None:
    """Refuse an output that is an input, or exists, unless an interrupted call of this job has published it."""
    require_no_input(output, input_files(queries, corpus, options.held_out))
    if options.shard is None and not options.overwrite:
        first = None if options.join is None else Shard(0, options.join)
        require_free_output(output, None if options.restart else work_folder(output, first))


def _mine_shards(job: MiningJob, path: Path) -> MiningReport:
    """Mine the ranges of a shard; without one, mine all and write the output."""
    options, shard = job.options, job.options.shard
    ranges = job.ranges(shard)
    with ResumableFolder(path, job.settings(shard), progress_file=JOURNAL, should_restart=options.restart) as folder:
        journal = DurableJournal(folder.path / JOURNAL)
        if not journal.lines:  # a shard without ranges is finished, too
            _save(journal, folder.path / _RANGES, orjson.dumps(len(ranges)))
        finished = journal.verified_parts(folder.path)
        missing = [work for work in ranges if work.name not in finished]
        total = sum(work.stop - work.first for work in ranges)
        done = total - sum(work.stop - work.first for work in missing)
        engine = options.engine or run_in_processes(options.workers or default_workers(len(missing)))
        options.progress(done, total)
        for work, content in engine(job.plan, missing) if missing else ():
            _save(journal, folder.path / work.name, content)
            done += work.stop - work.first
            options.progress(done, total)
        _check_unchanged(job)
        if shard is not None:
            return replace(begin_report(job, None), documents=total)
        report = _write_output(job, [folder.path])
        folder.remove()
    return report


def _save(journal: DurableJournal, path: Path, content: bytes) -> None:
    with open_writer(path) as file:
        file.write(content)
        close_durably(file)
    journal.record({"file": path.name, "size": len(content), "checksum": Checksum(content).hexdigest()})


def _join(job: MiningJob, count: int) -> MiningReport:
    """Write the output of finished shards; their work folders are removed at the end."""
    shards = [Shard(index, count) for index in range(count)]
    folders = [work_folder(job.output, shard) for shard in shards]
    for shard, path in zip(shards, folders, strict=True):
        settings = read_settings(path)
        names = {_RANGES, *(work.name for work in job.ranges(shard))}
        if settings is not None and (different := differing_names(settings, job.settings(shard))):
            raise UserError(f"{path}: made with other settings than this call ({', '.join(different)}); run it again")
        if settings is None or not names <= DurableJournal(path / JOURNAL).verified_parts(path).keys():
            raise UserError(f"{path}: missing or not finished; run this shard (again) first")
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(ResumableFolder(path, job.settings(shard), progress_file=JOURNAL))
            for shard, path in zip(shards, folders, strict=True)
        ]
        report = _write_output(job, folders)
        for folder in opened:
            folder.remove()
    return report


def _write_output(job: MiningJob, folders: Sequence[Path]) -> MiningReport:
    neighbors, recall = _merge(job, folders)
    near = unite(neighbors)
    near = replace(near, queries=job.used[near.queries])
    texts, starts = [DocumentTexts(dataset, job.tokenizer) for dataset in job.datasets], job.starts

    def read_ids(number: int) -> npt.NDArray[Any]:
        dataset, document = locate(np.array([number]), starts)
        return texts[int(dataset[0])].ids(int(document[0]))

    def query_ids(number: int) -> npt.NDArray[Any]:
        return np.array(job.tokenizer.encode(job.query_texts[number]), np.int64)

    job.options.notify(f"comparing {len(near):,} documents with their queries and with each other")
    copies = find_copies(near, read_ids, query_ids)
    chosen = near.select(~(copies.of_query | copies.of_document))
    report = replace(
        begin_report(job, job.output),
        recall=recall,
        near=len(near),
        copies_of_queries=int(copies.of_query.sum()),
        copies_of_documents=int(copies.of_document.sum()),
    )
    chosen, report = _without_held_out(job, chosen, read_ids, report)
    if not len(chosen):
        raise RefusedError(
            f"{job.output}: no document is left of the {len(near):,} nearest: {report.copies_of_queries:,} are "
            f"near-duplicates of their query, {report.copies_of_documents:,} of a nearer document, and "
            f"{report.overlapping or 0:,} share {NGRAM} consecutive ids with held-out documents; nothing is written"
        )
    report = describe_mined(job, texts, chosen, report)
    _check_unchanged(job)
    _publish(job, chosen, folders[0])
    return report


def _merge(job: MiningJob, folders: Sequence[Path]) -> tuple[Neighbors, float]:
    """Return the neighbors of each query in the whole corpus, and the measured recall."""
    num_queries, k = len(job.plan.queries), job.plan.k
    rows = sample_queries(num_queries)
    found, exact = Neighbors.none(num_queries, k), Neighbors.none(len(rows), k)
    for work in job.ranges(None):
        path = next(path for folder in folders if exists(path := folder / work.name))
        content = read_file(path)
        here, sampled = decode_result(content, num_queries, k, job.starts[work.dataset] + work.first)
        found, exact = found.merge(here), exact.merge(sampled)
    return found, Neighbors(found.distances[rows], found.documents[rows]).recall(exact)


def _without_held_out(
    job: MiningJob, chosen: Mined, read_ids: Callable[[int], npt.NDArray[Any]], report: MiningReport
) -> tuple[Mined, MiningReport]:
    """Search the held-out documents in the chosen ones, and drop these if that is wanted.

    Raises:
        RefusedError: they overlap, and `overlap` is "refuse".
    """
    options = job.options
    if not options.held_out:
        return chosen, report
    eod_id = read_origin(job.datasets[0]).eod_id
    documents = read_held_out(options.held_out, job.tokenizer, options.held_out_keys)
    held_out = HeldOutSet(documents, eod_id=job.tokenizer.eod_id if eod_id is None else eod_id)
    is_hit, found = find_held_out(chosen, read_ids, held_out)
    count, names = int(is_hit.sum()), [document.name for document in found]
    if count and options.overlap == "refuse":
        raise RefusedError(
            f"{count:,} of {len(chosen):,} mined documents share {NGRAM} consecutive ids with {len(names):,} held-out "
            f"documents, such as {', '.join(names[:3])}: a model trained on them has seen its test; drop "
            "them with --overlap drop, or accept them with --overlap keep"
        )
    report = replace(report, overlapping=count, found_held_out=names)
    return chosen.select(~is_hit) if options.overlap == "drop" else chosen, report


def _publish(job: MiningJob, chosen: Mined, folder: Path) -> None:
    if not job.options.overwrite:  # the search may have taken hours
        require_free_output(job.output, folder)
    before_publish = partial(record_published, folder)
    dataset_of, number_of = locate(chosen.documents, job.starts)
    if is_document_list(job.output):
        described = [describe_dataset(dataset) for dataset in job.datasets]
        os.makedirs(os.path.dirname(job.output) or ".", exist_ok=True)
        found = DocumentList(described, dataset_of, number_of, chosen.distances, chosen.queries)
        write_document_list(job.output, found, before_publish=before_publish)
        return
    made_by = {"k": job.plan.k, "embedder": job.embedder.digest, "queries": len(job.query_texts)}
    origin = join_tokenizers(job.datasets, "mine", made_by, allow_mixed=False)
    dtype = job.datasets[0].dtype
    with IndexedDatasetWriter(job.output, dtype, origin=origin) as writer:
        for index, number in zip(dataset_of.tolist(), number_of.tolist(), strict=True):
            writer.add_document(job.datasets[index].document(number))
        renames = writer.finish()
        before_publish(renames)
        publish_or_remove(renames)


def _check_unchanged(job: MiningJob) -> None:
    for dataset in job.datasets:
        dataset.check_unchanged()
