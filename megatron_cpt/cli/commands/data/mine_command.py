"""`megatron-cpt mine`: the documents of a corpus that are nearest to questions and answers."""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.commands.data.preprocess_command import ENGINE_HELP, RAY_HELP, WorkEngine

if TYPE_CHECKING:
    from megatron_cpt.data.mining.mining_report import MiningReport

QUERIES_HELP = "Questions with answers: prefixes of .bin/.idx, or .jsonl, .parquet and the like."
CORPUS_HELP = "Documents to choose from: prefixes of .bin/.idx, globs, or text files, which are encoded first."
OUTPUT_HELP = "Writes P.bin and P.idx; or, if it ends in .docs, a list of the chosen documents."
EMBEDDER_HELP = "model2vec:DIR (CPU) or sentence-transformers:DIR (GPU)."
TOKENIZER_HELP = "Tokenizer of the ids. [default: the one that the sidecars name]"
KEY_HELP = "Fields of the queries' text files; several are joined by line ends. [default: text]"
HELD_OUT_HELP = "Documents that no mined one may overlap with: prefixes of .bin/.idx, or JSON Lines with a field text."
OVERLAP_HELP = "Mined documents that share 13 ids with a held-out one: refuse (status 3), drop or keep them."
SEARCH_HELP = "flat is exact; ivf-pq is approximate, its recall is measured and printed."
SHARD_HELP = "Mine part i of n (i from 0); `slurm`: the part of this task or array job. Afterwards: --join n."
JOIN_HELP = "Join N shards; give the other options as for the shards."


class Search(enum.StrEnum):
    """Values of --search."""

    FLAT = "flat"
    IVF_PQ = "ivf-pq"


class Overlapping(enum.StrEnum):
    """Values of --overlap."""

    REFUSE = "refuse"
    DROP = "drop"
    KEEP = "keep"


def mine(
    queries: Annotated[list[str], typer.Option("--queries", metavar="Q ...", help=QUERIES_HELP)],
    corpus: Annotated[list[str], typer.Option("--corpus", metavar="PREFIX ...", help=CORPUS_HELP)],
    output: Annotated[str, typer.Option("--output", metavar="P", help=OUTPUT_HELP)],
    embedder: Annotated[str, typer.Option("--embedder", metavar="KIND:DIR", help=EMBEDDER_HELP)],
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    key: Annotated[list[str] | None, typer.Option("--key", metavar="K ...", help=KEY_HELP)] = None,
    corpus_key: Annotated[
        str, typer.Option("--corpus-key", metavar="K", help="Field of the corpus's text files.")
    ] = "text",
    k: Annotated[int, typer.Option("--k", metavar="N", min=1, help="Nearest documents per query.")] = 50,
    characters: Annotated[
        int, typer.Option("--characters", metavar="N", min=1, help="Characters of a document that are embedded.")
    ] = 1000,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", metavar="PREFIX_OR_JSONL ...", help=HELD_OUT_HELP)
    ] = None,
    overlap: Annotated[Overlapping, typer.Option("--overlap", help=OVERLAP_HELP)] = Overlapping.REFUSE,
    search: Annotated[Search, typer.Option("--search", help=SEARCH_HELP)] = Search.FLAT,
    recall: Annotated[
        float, typer.Option("--recall", metavar="SHARE", help="Share of the neighbors that ivf-pq must find.")
    ] = 0.97,
    range_documents: Annotated[
        int, typer.Option("--range-documents", metavar="N", min=1, help="Documents per unit of work.")
    ] = 16384,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Worker processes. [default: all cores]")
    ] = None,
    shard: Annotated[str | None, typer.Option("--shard", metavar="i/n", help=SHARD_HELP)] = None,
    join: Annotated[int | None, typer.Option("--join", metavar="N", min=1, help=JOIN_HELP)] = None,
    engine: Annotated[WorkEngine, typer.Option("--engine", help=ENGINE_HELP)] = WorkEngine.LOCAL,
    ray_address: Annotated[str | None, typer.Option("--ray-address", metavar="ADDR", help=RAY_HELP)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard earlier progress, start from scratch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the complete report as JSON.")] = False,
) -> None:
    """Choose the documents that are nearest to questions and answers.

    Run the same command again to resume an interrupted run.
    """
    import os

    from megatron_cpt.cli.mining_progress import mining_progress
    from megatron_cpt.cli.missing_package import require_module
    from megatron_cpt.data.mining.mining import mine as mine_documents
    from megatron_cpt.data.mining.mining_job import MiningOptions
    from megatron_cpt.data.mining.ranges import run_on_ray
    from megatron_cpt.data.preprocess.inputs import parse_shard

    require_module("faiss")
    on_ray = engine is WorkEngine.RAY
    if on_ray:
        require_module("ray")
    elif ray_address is not None:
        raise typer.BadParameter("is used by --engine ray alone", param_hint="--ray-address")
    part = None if shard is None else parse_shard(shard, os.environ)
    with mining_progress() as (show, notify):
        options = MiningOptions(
            tokenizer=tokenizer,
            query_keys=key or ["text"],
            corpus_key=corpus_key,
            k=k,
            characters=characters,
            method=search.value,
            recall=recall,
            held_out=held_out or [],
            overlap=overlap.value,
            workers=None if on_ray else workers,
            engine=run_on_ray(ray_address, workers) if on_ray else None,
            shard=part,
            join=join,
            range_documents=range_documents,
            overwrite=overwrite,
            restart=restart,
            progress=show,
            notify=notify,
        )
        report = mine_documents(queries, corpus, output, embedder=embedder, options=options)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif part is not None:
        print(f"shard {part.index} of {part.count} is ready; when all shards are ready, run --join {part.count}")
    else:
        _print_report(report)


def _print_report(report: MiningReport) -> None:
    tokens = sum(corpus.mined_tokens for corpus in report.corpora)
    print(
        f"{report.output}: {report.chosen:,} of {report.documents:,} documents, {tokens:,} tokens, mined for "
        f"{report.queries:,} queries with k = {report.k} by {report.embedder} in {report.seconds:.1f} s"
    )
    if report.empty_queries:
        print(f"skipped: {report.empty_queries:,} queries with no word that the embedder knows")
    for corpus in report.corpora:
        print(
            f"  {corpus.path}: {corpus.mined_documents:,} of {corpus.documents:,} documents, {corpus.mined_tokens:,} "
            f"of {corpus.tokens:,} tokens"
        )
    share = "all exact neighbors" if report.recall >= 1 else f"{report.recall:.1%} of the exact neighbors"
    print(f"search: {report.method}, found {share} of a sample of queries; {report.near:,} different documents")
    print(
        f"dropped: {report.copies_of_queries:,} near-duplicates of their query, {report.copies_of_documents:,} of a "
        "nearer document (80 % of their 13-grams are in it)"
    )
    if report.overlapping is not None:
        verb = "kept" if report.overlap == "keep" else "dropped"
        print(f"held-out: {verb} {report.overlapping:,} documents, with text of {len(report.found_held_out):,} ones")
    if report.distance_quantiles:
        quantiles = ", ".join(f"{percent}% {value:.3f}" for percent, value in report.distance_quantiles.items())
        print(f"distance to the nearest query (1 - cosine): {quantiles}")
    for example in report.examples:
        print(f"  {example.distance:.3f}  query {example.query}: {_line(example.query_text)}")
        print(f"         {example.path}[{example.document}]: {_line(example.text)}")


def _line(text: str) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:100]}..."
