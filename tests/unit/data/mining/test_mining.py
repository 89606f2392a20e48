"""Document mining: planted paraphrases are found, held-out copies are not let through, every way gives equal bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_cpt.data.mining.mining import mine
from megatron_cpt.data.mining.mining_job import MiningOptions
from megatron_cpt.data.mining.ranges import cut_ranges, run_here, run_on_ray
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.tokenfile.document_list import open_listed_datasets, read_document_list
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.data.tokenfile.sidecar import Origin, read_sidecar
from megatron_cpt.errors import CptError, RefusedError, UserError
from tests.helpers.stand_in_ray import install_ray
from tests.helpers.static_model import plant
from tests.unit.data.mining.conftest import EOD, write_lines, write_texts


def pair(folder, name) -> list[bytes]:
    return [(folder / f"{name}.{end}").read_bytes() for end in ("bin", "idx")]


def text_of(dataset, number) -> str:
    return bytes(dataset.document(number)[:-1].astype(np.uint8)).decode()


def mined_texts(prefix) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [text_of(dataset, number) for number in range(dataset.num_documents)]


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if ".mine" in path.name]


def test_planted_paraphrases_are_found_with_their_query(mining, planted, tmp_path):
    report = mining("mined.docs")
    found = read_document_list(tmp_path / "mined.docs")
    half = len(planted.documents) // 2
    by_place = {
        int(dataset) * half + int(document): int(query)
        for dataset, document, query in zip(found.dataset, found.document, found.query, strict=True)
    }
    hits = [by_place.get(place) == number for number, place in enumerate(planted.planted)]
    assert sum(hits) >= 0.95 * len(hits)
    assert report.chosen == found.num_chosen == report.near
    assert report.recall == 1
    assert [corpus.mined_documents for corpus in report.corpora] == [len(found.chosen_of(i)) for i in (0, 1)]
    assert len(report.examples) == 20
    distances = [example.distance for example in report.examples]
    assert distances == sorted(distances)
    first = report.examples[0]
    assert first.query_text == planted.queries[first.query]
    assert set(first.text.split()) & set(first.query_text.split())
    datasets = open_listed_datasets(tmp_path / "mined.docs", found)
    assert text_of(datasets[0], int(found.chosen_of(0)[0])) in planted.documents
    assert not leftovers(tmp_path)


def test_a_pair_has_the_listed_documents_and_a_sidecar(mining, planted, tmp_path):
    mining("mined.docs")
    report = mining("mined")
    found = read_document_list(tmp_path / "mined.docs")
    half = len(planted.documents) // 2
    places = found.dataset * half + found.document
    assert mined_texts(tmp_path / "mined") == [planted.documents[place] for place in places]
    sidecar = read_sidecar(IndexedDataset(tmp_path / "mined").header)
    assert (sidecar.origin.tokenizer, sidecar.origin.eod_id, sidecar.origin.made_by["k"]) == ("byte", EOD, 5)
    assert sum(corpus.mined_tokens for corpus in report.corpora) == IndexedDataset(tmp_path / "mined").num_tokens


def test_the_nearest_documents_are_the_ones_of_a_plain_computation(mining, planted, static_model, tmp_path):
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(static_model.partition(":")[2])
    vectors = [model.encode([text[:1000] for text in texts]) for texts in (planted.queries, planted.documents)]
    nearest = np.argsort(-(vectors[0] @ vectors[1].T), axis=1)[:, :5]
    mining("mined.docs")
    found = read_document_list(tmp_path / "mined.docs")
    assert (found.dataset * (len(planted.documents) // 2) + found.document).tolist() == np.unique(nearest).tolist()


def test_workers_shards_and_engines_give_the_same_bytes(mining, tmp_path):
    mining("one")
    mining("two", workers=2)
    for index in (2, 0, 1):
        report = mining("shards", shard=Shard(index, 3))
        assert report.output is None
    mining("shards", join=3)
    mining("engine", workers=None, engine=lambda plan, ranges: run_here(plan, ranges[::-1]))
    assert pair(tmp_path, "one") == pair(tmp_path, "two") == pair(tmp_path, "shards") == pair(tmp_path, "engine")
    assert not leftovers(tmp_path)


def test_an_interrupted_call_is_resumed(mining, tmp_path):
    mining("whole.docs")
    done = []

    def stops(plan, ranges):
        for number, result in enumerate(run_here(plan, ranges)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        mining("resumed.docs", workers=None, engine=stops)
    damaged = sorted((tmp_path / "resumed.docs.mine").glob("*.near"))[0]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    mining("resumed.docs", progress=lambda finished, total: done.append(finished))
    assert done[:3] == [320, 480, 600]  # two of three ranges are intact
    assert (tmp_path / "resumed.docs").read_bytes() == (tmp_path / "whole.docs").read_bytes()


def test_an_interrupted_call_with_other_settings_is_refused(mining, tmp_path):
    mining("mined", shard=Shard(0, 2))
    with pytest.raises(UserError, match=r"mined\.mine-0-of-2: holds an interrupted run with other settings .*k"):
        mining("mined", shard=Shard(0, 2), k=6)
    mining("mined", shard=Shard(0, 2), k=6, restart=True)
    mining("mined", shard=Shard(1, 2))
    with pytest.raises(UserError, match=r"mined\.mine-0-of-2: made with other settings than this call \(k\)"):
        mining("mined", join=2)


def test_a_shard_that_is_missing_or_not_finished(mining, tmp_path):
    mining("mined", shard=Shard(0, 2))
    with pytest.raises(UserError, match=r"mined\.mine-1-of-2: missing or not finished"):
        mining("mined", join=2)


KILLED = """
import sys
from megatron_cpt.data.mining.mining import mine
from megatron_cpt.data.mining.mining_job import MiningOptions
if __name__ == "__main__":
    queries, web, code, output, embedder = sys.argv[1:]
    options = MiningOptions(workers=2, k=5, range_documents=20, overwrite=True)
    mine([queries], [web, code], output, embedder=embedder, options=options)
"""


@pytest.mark.long
def test_kill_9_at_random_moments_gives_the_same_bytes(mining, static_model, tmp_path):
    mining("whole", range_documents=20)
    script = tmp_path / "call.py"
    script.write_text(KILLED)
    arguments = [tmp_path / "qa.jsonl", tmp_path / "web", tmp_path / "code", tmp_path / "killed", static_model]
    command = [sys.executable, str(script), *map(str, arguments)]
    folder = tmp_path / "killed.mine"
    kills = 0
    for wanted in sorted(random.sample(range(1, 50), 3)):  # of 60 ranges
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None and len(list(folder.glob("*.near"))) < wanted:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills  # on a fast machine a call may end first
    subprocess.run(command, check=True)
    assert pair(tmp_path, "killed") == pair(tmp_path, "whole")
    assert not leftovers(tmp_path)


def test_a_dataset_or_file_that_the_corpus_names_twice(static_model, planted, tmp_path, monkeypatch):
    """Copies of its documents would take half of the k places."""
    monkeypatch.chdir(tmp_path)
    write_texts("web", planted.documents[:20])
    write_lines(tmp_path / "web.jsonl", [{"text": text} for text in planted.documents[:20]])
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": planted.queries[0]}])
    (tmp_path / "link").symlink_to(tmp_path)
    for corpus in (["web", "web"], ["web", "./web.bin"], ["w*", "link/web"], ["web.jsonl", "link/web.jsonl"]):
        with pytest.raises(UserError, match=r"corpus: .*web\S* is named more than once; give it once"):
            mine([queries], corpus, "mined", embedder=static_model, options=MiningOptions(workers=1, tokenizer="byte"))


@pytest.mark.parametrize("k", [10**9, 10**20])
def test_a_k_above_the_number_of_documents_is_cut(static_model, planted, tmp_path, k):
    corpus = write_texts(tmp_path / "web", planted.documents[:20])
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": text} for text in planted.queries])
    notes: list[str] = []
    options = MiningOptions(workers=1, k=k, notify=notes.append)
    report = mine([queries], [corpus], tmp_path / "mined.docs", embedder=static_model, options=options)
    assert (report.k, report.near) == (20, 20)
    assert f"k is 20 instead of {k:,}: the corpus has no more documents" in notes


def test_near_duplicates_are_dropped(static_model, tmp_path, planted):
    query, others = planted.queries[0], planted.documents[:50]
    near = planted.documents[planted.planted[0]]
    added = f"{near} w1 w2"
    corpus = write_texts(tmp_path / "web", [*others, near, query, near, added, f"{query} w3"])
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": query}])
    report = mine([queries], [corpus], tmp_path / "mined", embedder=static_model, options=MiningOptions(k=5, workers=1))
    assert (report.near, report.copies_of_queries, report.copies_of_documents) == (5, 2, 2)
    assert mined_texts(tmp_path / "mined") == [near]


@pytest.fixture
def held_out(tmp_path, planted) -> str:
    """Held-out documents of which the corpus holds one completely, and a part of another."""
    copied, partly = planted.documents[planted.planted[3]], planted.documents[planted.planted[4]]
    rows = [{"text": copied}, {"text": f"w9 w8 {partly[20:80]} w7"}, {"text": "w1 w3 w5 w7 w9 w11 w13 w15 w17"}]
    return write_lines(tmp_path / "test.jsonl", rows)


def test_held_out_documents_are_refused(mining, held_out, tmp_path):
    with pytest.raises(RefusedError, match=r"2 of \d+ mined documents share 13 .*2 held-out documents.*--overlap drop"):
        mining("mined", held_out=[held_out])
    assert not (tmp_path / "mined.idx").exists()
    assert leftovers(tmp_path) == ["mined.mine"]  # another choice takes up the finished search


@pytest.mark.parametrize("name", ["mined", "mined.docs"])
def test_a_dataset_beside_the_work_of_a_refused_call_is_not_replaced(mining, held_out, tmp_path, name):
    with pytest.raises(RefusedError):
        mining(name, held_out=[held_out])
    paths = [tmp_path / name] if name.endswith(".docs") else [tmp_path / f"{name}.{end}" for end in ("bin", "idx")]
    for path in paths:
        path.write_bytes(b"somebody's")
    with pytest.raises(UserError, match="exists already; choose another output, or replace it: --overwrite"):
        mining(name, held_out=[held_out], overlap="keep")
    assert {path.read_bytes() for path in paths} == {b"somebody's"}
    mining(name, held_out=[held_out], overlap="keep", overwrite=True)
    assert b"somebody's" not in {path.read_bytes() for path in paths}


def test_a_dataset_that_appears_during_the_search_is_not_replaced(mining, tmp_path):
    with pytest.raises(UserError, match=r"mined\.idx: exists already"):
        mining("mined", progress=lambda done, total: (tmp_path / "mined.idx").write_bytes(b"somebody's"))
    assert (tmp_path / "mined.idx").read_bytes() == b"somebody's"


@pytest.mark.parametrize("shards", [None, 2])
@pytest.mark.parametrize("name", ["mined", "mined.docs"])
def test_a_call_that_was_killed_after_its_output_had_its_name_is_resumed(mining, tmp_path, monkeypatch, name, shards):
    mining(f"whole_{name}")
    options = {} if shards is None else {"join": shards}
    for index in range(shards or 0):
        mining(name, shard=Shard(index, shards))
    with monkeypatch.context() as patch:
        patch.setattr("megatron_cpt.files.resumable.ResumableFolder.remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mining(name, **options)
    ends = [""] if name.endswith(".docs") else [".bin", ".idx"]
    assert all((tmp_path / f"{name}{end}").exists() for end in ends)
    with pytest.raises(UserError, match="--overwrite"):
        mining(name, restart=True, **options)
    mining(name, **options)
    for end in ends:
        assert (tmp_path / f"{name}{end}").read_bytes() == (tmp_path / f"whole_{name}{end}").read_bytes()
    assert not leftovers(tmp_path)


def interrupt(folder) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("role", ["corpus", "queries", "held-out"])
def test_an_output_that_is_an_input_is_refused_even_with_overwrite(static_model, planted, tmp_path, role):
    names = {each: write_texts(tmp_path / each, planted.documents[:20]) for each in ("corpus", "queries", "held-out")}
    (tmp_path / "link").symlink_to(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.[bi]*")}
    for shard in (None, Shard(0, 2)):
        options = MiningOptions(workers=1, overwrite=True, held_out=[names["held-out"]], shard=shard)
        with pytest.raises(UserError, match="is an input too; choose another output"):
            mine(
                [names["queries"]], [names["corpus"]], tmp_path / "link" / role, embedder=static_model, options=options
            )
    assert {path: path.read_bytes() for path in tmp_path.glob("*.[bi]*")} == before


def test_held_out_documents_are_dropped_or_kept(mining, held_out, planted, tmp_path):
    kept = mining("kept", held_out=[held_out], overlap="keep")
    dropped = mining("dropped", held_out=[held_out], overlap="drop")
    assert (kept.overlapping, dropped.overlapping, dropped.chosen) == (2, 2, kept.chosen - 2)
    assert len(dropped.found_held_out) == 2
    removed = set(mined_texts(tmp_path / "kept")) - set(mined_texts(tmp_path / "dropped"))
    assert removed == {planted.documents[planted.planted[number]] for number in (3, 4)}


def test_an_output_without_a_document_is_refused(static_model, tmp_path, planted):
    """The corpus is the held-out text; an empty list would pass `check`, and no run could read it."""
    text = planted.documents[0]
    corpus = write_texts(tmp_path / "web", [text])
    queries, test = (
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text + end}])
        for name, end in (("qa", " w1 w2 w3 w4 w5 w6 w7 w8 w9 " * 20), ("test", ""))
    )
    options = MiningOptions(k=5, workers=1, held_out=[test], overlap="drop")
    with pytest.raises(RefusedError, match="no document is left of the 1 nearest"):
        mine([queries], [corpus], tmp_path / "mined.docs", embedder=static_model, options=options)
    assert not (tmp_path / "mined.docs").exists()


def test_queries_of_several_fields_and_text_files_as_corpus(static_model, planted, tmp_path):
    rows = [{"question": text[: len(text) // 2], "answer": text[len(text) // 2 :]} for text in planted.queries[:5]]
    queries = write_lines(tmp_path / "qa.jsonl", rows)
    corpus = write_lines(tmp_path / "web.jsonl", [{"body": text} for text in planted.documents])
    options = MiningOptions(
        k=3, workers=1, tokenizer="byte", query_keys=["question", "answer"], corpus_key="body", range_documents=1000
    )
    report = mine([queries], [corpus], tmp_path / "mined", embedder=static_model, options=options)
    found = mined_texts(tmp_path / "mined")
    assert {planted.documents[place] for place in planted.planted[:5]} <= set(found)
    assert report.corpora[0].documents == len(planted.documents)
    assert read_sidecar(IndexedDataset(tmp_path / "mined").header).origin.eod_id == EOD
    assert not leftovers(tmp_path)
    for output, more in (("mined.docs", {}), ("shard", {"shard": Shard(0, 2)})):
        with pytest.raises(UserError, match="encode the text first: megatron-cpt preprocess"):
            mine(
                [queries],
                [corpus],
                tmp_path / output,
                embedder=static_model,
                options=MiningOptions(tokenizer="byte", query_keys=["question"], **more),
            )


def test_queries_from_a_dataset(static_model, planted, tmp_path):
    corpus = write_texts(tmp_path / "web", planted.documents[:500])
    queries = write_texts(tmp_path / "qa", planted.queries[:4])
    report = mine([queries], [corpus], tmp_path / "mined.docs", embedder=static_model, options=MiningOptions(workers=1))
    assert report.queries == 4
    assert report.examples[0].query_text in planted.queries


def test_empty_documents_and_unknown_words_are_near_to_nothing(static_model, planted, tmp_path):
    corpus = write_texts(tmp_path / "web", ["", "unknown", *planted.documents[:3]])
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": "strange words"}, {"text": planted.queries[0]}])
    report = mine([queries], [corpus], tmp_path / "mined.docs", embedder=static_model, options=MiningOptions(workers=1))
    assert (report.queries, report.empty_queries, report.chosen) == (2, 1, 3)
    assert set(read_document_list(tmp_path / "mined.docs").query.tolist()) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": "none.jsonl"}, "none.jsonl: no such file"),
        ({"corpus": "none"}, "none: no such file"),
        ({"embedder": "word2vec:x"}, "embedder 'word2vec:x': not a known KIND:DIR"),
        ({"embedder": "model2vec:nowhere"}, "nowhere is no folder"),
        ({"embedder": "model2vec:."}, "not such a model"),
        ({"output": "web"}, "web: is an input too"),
        ({"output": "qa.docs"}, "qa.docs: exists already"),
        ({"k": 0}, "k: 0; give a whole number of at least 1"),
        ({"range_documents": 10**20}, "range_documents: 10+; give a whole number of at most 2147483647"),
        ({"characters": 10**20}, "characters: 10+; give a whole number of at most"),
        ({"workers": 10**20}, "workers: 10+; give a whole number of at most"),
        ({"join": 10**20}, "join: 10+; give a whole number of at most 1000000"),
        ({"shard": Shard(0, 10**20)}, "shard: 10+ shards; give at most 1000000"),
        ({"recall": 1.5}, "recall: 1.5; give a share"),
        ({"overlap": "maybe"}, "overlap: 'maybe'; give one of refuse, drop, keep"),
        ({"tokenizer": "null:300"}, "web: its ids are of tokenizer byte, not of null:300"),
        ({"held_out": ["none"]}, "none.idx|no such file: none"),
        ({"held_out": ["none.jsonl"]}, "no such file: none.jsonl"),
        (
            {"held_out": ["qa.docs"]},
            "held-out qa.docs: a document list cannot be used here; give the prefixes of whole",
        ),
        ({"held_out": ["qa.jsonl"], "held_out_keys": ["blank"]}, "qa.jsonl: no line has text under blank"),
        ({"held_out": ["empty.jsonl"]}, "empty.jsonl: no line has text under text"),
        ({"held_out": ["empty"]}, "empty: has no tokens"),
        ({"held_out": ["other"]}, "held-out other: its ids are of tokenizer other, not of the corpus's"),
        ({"corpus": "qa.docs"}, "corpus qa.docs: a document list cannot be used here; give the prefixes of whole"),
        ({"corpus": "*.docs"}, "corpus .*docs: a document list cannot be used here"),
        ({"queries": "qa.docs"}, "queries qa.docs: a document list cannot be used here; give the prefixes of whole"),
        ({"query_keys": ["question"]}, "has no key 'question'.*--key"),
        ({"query_keys": ["blank"]}, "the embedder knows no word of any of them"),
    ],
)
def test_bad_input(static_model, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    write_texts("web", ["w1 w2"])
    write_lines(tmp_path / "qa.jsonl", [{"text": "w1", "blank": " "}])
    (tmp_path / "qa.docs").touch()
    write_lines(tmp_path / "empty.jsonl", [{"text": ""}, {"text": None}])
    origins = {"empty": None, "other": Origin(tokenizer="other", fingerprint="other")}
    for name, documents in (("empty", []), ("other", [[1, 2]])):
        with IndexedDatasetWriter(name, "<u2", origin=origins[name]) as writer:
            for document in documents:
                writer.add_document(document)
    monkeypatch.setattr("megatron_cpt.data.mining.mining._mine_shards", pytest.fail)  # refused before the search
    before = sorted(path.name for path in tmp_path.iterdir())
    names = {"queries": "qa.jsonl", "corpus": "web", "output": "mined", "embedder": static_model}
    call = names | {name: value for name, value in change.items() if name in names}
    with pytest.raises(CptError, match=message):
        mine(
            [call["queries"]],
            [call["corpus"]],
            call["output"],
            embedder=call["embedder"],
            options=MiningOptions(**{name: value for name, value in change.items() if name not in names}),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_ids_of_another_vocabulary_are_refused(static_model, tmp_path, make_dataset):
    dataset = make_dataset("web", [[1, 2, 300]])
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": "w1"}])
    options = MiningOptions(workers=1, tokenizer="byte")
    with pytest.raises(RefusedError, match=r"web\.bin: .*ids outside the vocabulary of 257"):
        mine([queries], [dataset.prefix], tmp_path / "mined", embedder=static_model, options=options)
    with pytest.raises(UserError, match="no sidecar names the tokenizer of the ids; give --tokenizer"):
        mine([queries], [dataset.prefix], tmp_path / "mined", embedder=static_model)


def test_shards_have_every_range_once():
    whole = cut_ranges([5, 0, 7], range_documents=2)
    assert [(each.dataset, each.first, each.stop) for each in whole][:3] == [(0, 0, 2), (0, 2, 4), (0, 4, 5)]
    assert [each for i in range(5) for each in cut_ranges([5, 0, 7], Shard(i, 5), 2)] == whole


@pytest.mark.long
def test_paraphrases_among_50_000_documents(static_model, tmp_path):
    planted = plant(50_000, 200)
    held_out = [planted.documents[place] for place in planted.planted[:20]]  # copies of held-out documents
    corpus = write_texts(tmp_path / "web", planted.documents)
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": text} for text in planted.queries])
    test = write_lines(tmp_path / "test.jsonl", [{"text": text} for text in held_out])
    options = MiningOptions(workers=2, held_out=[test], overlap="drop")
    for method in ("flat", "ivf-pq"):
        name = tmp_path / f"{method}.docs"
        report = mine(
            [queries],
            [corpus],
            name,
            embedder=static_model,
            options=MiningOptions(**{**options.__dict__, "method": method}),
        )
        found = set(read_document_list(name).document.tolist())
        assert not found & set(planted.planted[:20])
        assert len(found & set(planted.planted[20:])) >= 0.95 * 180
        assert report.recall >= 0.95


def test_ray_gives_the_same_bytes(mining, tmp_path, monkeypatch):
    stand_in = install_ray(monkeypatch)
    mining("here")
    mining("ray", workers=None, engine=run_on_ray(None, 2))
    assert stand_in.tasks > 2
    assert pair(tmp_path, "ray") == pair(tmp_path, "here")
