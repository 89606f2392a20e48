"""Large inputs: interrupted, sharded, shuffled and split runs of preprocess write identical bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.data.preprocess import preprocess_run as module
from megatron_cpt.data.preprocess.buckets import count_buckets
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.join import join_shards
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError, UserError

SMALL = {"block_bytes": 2000}


@pytest.fixture
def inputs(tmp_path) -> Path:
    """Three JSONL files with one bad line each, and a parquet file: about 60 small blocks."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = random.Random(1)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        lines = [json.dumps({"text": f"{name} {i} " + "ä" * rng.randrange(100), "title": str(i)}) for i in range(300)]
        lines[rng.randrange(300)] = "{broken"
        data = "\n".join(lines).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    pq.write_table(pa.table({"text": ["p", None, "q"], "title": ["1", "2", "3"]}), folder / "d.parquet")
    return folder


def content(prefix) -> dict[str, bytes]:
    """Return the published files of a run by their name without the prefix."""
    prefix = Path(prefix)
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.glob(f"{prefix.name}*")
        if path.is_file()
    }


def documents(prefix) -> list[bytes]:
    data = IndexedDataset(prefix)
    return [data.document(i).astype(np.uint8).tobytes() for i in range(data.num_documents)]


class StopError(Exception):
    pass


def stop_after(blocks: int):
    left = [blocks]

    def progress(*_):
        left[0] -= 1
        if left[0] < 0:
            raise StopError

    return progress


@pytest.mark.parametrize("options", [{}, {"shuffle": 5}, {"split_tokens": 20_000}, {"key": ["title", "text"]}])
def test_stopped_often_it_gives_the_same_bytes(tmp_path, inputs, options, monkeypatch):
    whole = preprocess(
        [inputs],
        tmp_path / "whole" / "p",
        tokenizer="byte",
        options=PreprocessOptions(append_eod=True, **SMALL, **options),
    )
    monkeypatch.setattr(module, "SAVE_SECONDS", -1)  # after every block
    stops = 0
    while True:
        try:
            report = preprocess(
                [inputs],
                tmp_path / "cut" / "p",
                tokenizer="byte",
                options=PreprocessOptions(append_eod=True, **SMALL, progress=stop_after(7), **options),
            )
            break
        except StopError:
            stops += 1
            assert not [name for name in content(tmp_path / "cut" / "p") if name.endswith((".bin", ".idx"))]
    assert stops > 3
    assert content(tmp_path / "cut" / "p") == content(tmp_path / "whole" / "p")
    assert (report.documents, report.tokens, report.bad_lines) == (whole.documents, whole.tokens, whole.bad_lines)


def test_what_was_not_saved_is_done_again_and_not_twice(tmp_path, inputs):
    preprocess([inputs], tmp_path / "whole" / "p", tokenizer="byte", options=PreprocessOptions(**SMALL))
    for _ in range(2):  # nothing is saved within ten seconds, but something is written
        with pytest.raises(StopError):
            preprocess(
                [inputs],
                tmp_path / "cut" / "p",
                tokenizer="byte",
                options=PreprocessOptions(**SMALL, progress=stop_after(9)),
            )
    preprocess([inputs], tmp_path / "cut" / "p", tokenizer="byte", options=PreprocessOptions(**SMALL))
    assert content(tmp_path / "cut" / "p") == content(tmp_path / "whole" / "p")


@pytest.mark.parametrize("options", [{}, {"shuffle": 5}, {"split_tokens": 20_000}, {"key": ["title", "text"]}])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_joined_shards_are_the_whole(tmp_path, inputs, options, count):
    preprocess(
        [inputs],
        tmp_path / "whole" / "p",
        tokenizer="byte",
        options=PreprocessOptions(append_eod=True, **SMALL, **options),
    )
    for index in reversed(range(count)):
        preprocess(
            [inputs],
            tmp_path / "s" / "p",
            tokenizer="byte",
            options=PreprocessOptions(append_eod=True, **SMALL, shard=Shard(index, count), **options),
        )
    assert not list((tmp_path / "s").glob("*.bin"))
    report = join_shards(tmp_path / "s" / "p", count)
    assert content(tmp_path / "s" / "p") == content(tmp_path / "whole" / "p")
    assert report.bad_lines == 4
    assert report.documents == sum(IndexedDataset(prefix).num_documents for prefix in report.prefixes)


class TestJoin:
    def test_a_shard_that_is_missing(self, tmp_path, inputs):
        preprocess([inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(shard=Shard(0, 2)))
        with pytest.raises(UserError, match=r"p\.preprocess-1-of-2: missing or not finished"):
            join_shards(tmp_path / "p", 2)

    def test_other_settings(self, tmp_path, inputs):
        preprocess([inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(shard=Shard(0, 2)))
        preprocess(
            [inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(shard=Shard(1, 2), append_eod=True)
        )
        with pytest.raises(UserError, match=r"other settings than .* \(encode\)"):
            join_shards(tmp_path / "p", 2)

    def test_bad_lines_of_all_count(self, tmp_path, inputs):
        for index in range(2):
            preprocess(
                [inputs],
                tmp_path / "p",
                tokenizer="byte",
                options=PreprocessOptions(shard=Shard(index, 2), max_bad="0.1%"),
            )
        with pytest.raises(RefusedError, match=r"4 of 903 lines are bad, more than 0\.1000%"):
            join_shards(tmp_path / "p", 2, max_bad="0.1%")
        assert join_shards(tmp_path / "p", 2, max_bad="1%").bad_lines == 4

    def test_killed_in_the_middle_of_publishing(self, tmp_path, inputs, monkeypatch):
        preprocess([inputs], tmp_path / "whole" / "p", tokenizer="byte")
        for index in range(2):
            preprocess(
                [inputs], tmp_path / "s" / "p", tokenizer="byte", options=PreprocessOptions(shard=Shard(index, 2))
            )
        replace = os.replace

        def killed(source, target):
            if str(target).endswith("p.idx"):
                raise StopError
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(StopError):
            join_shards(tmp_path / "s" / "p", 2)
        monkeypatch.undo()
        join_shards(tmp_path / "s" / "p", 2)
        assert content(tmp_path / "s" / "p") == content(tmp_path / "whole" / "p")


class TestShuffle:
    def test_it_is_a_permutation_by_the_seed(self, tmp_path, inputs):
        for name, seed in (("none", None), ("one", 1), ("again", 1), ("two", 2)):
            preprocess([inputs], tmp_path / name, tokenizer="byte", options=PreprocessOptions(shuffle=seed, **SMALL))
        none, one, again, two = (documents(tmp_path / name) for name in ("none", "one", "again", "two"))
        assert one == again
        assert sorted(one) == sorted(none) == sorted(two)
        assert len({tuple(none), tuple(one), tuple(two)}) == 3
        places = np.array([none.index(document) for document in one])
        assert (
            abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.15
        )  # 4.5 standard deviations for 900 documents

    def test_many_buckets(self, tmp_path, inputs, monkeypatch):
        preprocess([inputs], tmp_path / "one", tokenizer="byte", options=PreprocessOptions(shuffle=3, **SMALL))
        monkeypatch.setattr("megatron_cpt.data.preprocess.pipeline.count_buckets", lambda text_bytes: 64)
        monkeypatch.setattr("megatron_cpt.data.preprocess.buckets._MAX_BUFFERED", 3000)
        preprocess([inputs], tmp_path / "many", tokenizer="byte", options=PreprocessOptions(shuffle=3, **SMALL))
        assert content(tmp_path / "one") == content(tmp_path / "many")

    @pytest.mark.parametrize(
        ("size", "buckets"), [(0, 1), (1 << 28, 1), ((1 << 28) + 1, 2), (1 << 40, 4096), (1 << 50, 4096)]
    )
    def test_buckets_fit_memory(self, size, buckets):
        assert count_buckets(size) == buckets


def test_split_pairs_hold_all_documents_in_order(tmp_path, inputs):
    preprocess([inputs], tmp_path / "one", tokenizer="byte", options=PreprocessOptions(**SMALL))
    report = preprocess(
        [inputs], tmp_path / "split", tokenizer="byte", options=PreprocessOptions(split_tokens=20_000, **SMALL)
    )
    assert [Path(prefix).name for prefix in report.prefixes] == [f"split-{i:05}" for i in range(len(report.prefixes))]
    assert [one for prefix in report.prefixes for one in documents(prefix)] == documents(tmp_path / "one")
    sizes = [IndexedDataset(prefix).num_tokens for prefix in report.prefixes]
    assert len(sizes) > 3
    assert max(sizes) <= 20_000
    assert min(sizes[:-1]) > 20_000 - 300  # no document is longer than that


def test_a_document_larger_than_a_pair_has_one_for_itself(tmp_path):
    rows = [json.dumps({"text": "x" * n}) for n in (5, 300, 5, 5)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    report = preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(split_tokens=100)
    )
    assert [IndexedDataset(prefix).num_tokens for prefix in report.prefixes] == [5, 300, 10]


def test_several_keys_give_a_data_set_each(tmp_path):
    rows = [{"text": "a", "title": "t"}, {"title": "only"}, {"text": "only"}, {"text": 3, "title": "u"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(key=["text", "title"])
    )
    assert documents(tmp_path / "p_text") == [b"a", b"only"]
    assert documents(tmp_path / "p_title") == [b"t", b"only", b"u"]
    assert report.bad_lines == 3


class TestMaxBad:
    @pytest.mark.parametrize(
        ("limit", "passes"), [("25%", True), ("24.9%", False), (1, True), ("0", False), (None, True)]
    )
    def test_limits(self, tmp_path, limit, passes):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{\n{"text": "b"}\n{"text": "c"}\n')
        if passes:
            assert (
                preprocess(
                    [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad=limit)
                ).bad_lines
                == 1
            )
            return
        with pytest.raises(RefusedError, match=r"a\.jsonl:3: not JSON"):
            preprocess(
                [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad=limit)
            )
        assert os.listdir(tmp_path) == ["a.jsonl"]

    @pytest.mark.parametrize("limit", ["many", "-1", "101%", "1.5"])
    def test_mistakes(self, tmp_path, limit):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}')
        with pytest.raises(UserError, match="give a number of lines"):
            preprocess(
                [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad=limit)
            )


class TestResumeSummary:
    def test_other_settings_are_refused_without_restart(self, tmp_path, inputs, monkeypatch):
        monkeypatch.setattr(module, "SAVE_SECONDS", -1)
        with pytest.raises(StopError):
            preprocess(
                [inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(**SMALL, progress=stop_after(3))
            )
        with pytest.raises(UserError, match=r"other settings \(different: encode\).*--restart"):
            preprocess([inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(append_eod=True, **SMALL))
        preprocess(
            [inputs],
            tmp_path / "p",
            tokenizer="byte",
            options=PreprocessOptions(append_eod=True, **SMALL, restart=True),
        )
        assert documents(tmp_path / "p")[0].endswith(b"\x00")  # 256, cut to a byte

    def test_a_changed_input_is_noticed(self, tmp_path, inputs, monkeypatch):
        monkeypatch.setattr(module, "SAVE_SECONDS", -1)
        with pytest.raises(StopError):
            preprocess(
                [inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(**SMALL, progress=stop_after(3))
            )
        os.utime(inputs / "a.jsonl", (1, 1))
        with pytest.raises(UserError, match=r"input .*a\.jsonl: changed since the run in .* was interrupted"):
            preprocess([inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(**SMALL))

    def test_two_at_once(self, tmp_path, inputs):
        def second(*_):
            with pytest.raises(UserError, match="another process is working on it"):
                preprocess([inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(**SMALL))
            raise StopError

        with pytest.raises(StopError):
            preprocess([inputs], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(**SMALL, progress=second))


def test_killed_at_random_moments_it_gives_the_same_bytes(tmp_path):
    """kill -9 of a run with workers, at random moments."""
    rng = random.Random(2)
    rows = [{"text": "".join(rng.choices("abc äö", k=2000))} for _ in range(3000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preprocess(
        [tmp_path / "a.jsonl"],
        tmp_path / "whole" / "p",
        tokenizer="byte",
        options=PreprocessOptions(block_bytes=1 << 16),
    )
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from megatron_cpt.data.preprocess import preprocess_run\n"
        "from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess\n"
        "preprocess_run.SAVE_SECONDS = 0.02\n"
        "if __name__ == '__main__':\n"
        "    options = PreprocessOptions(workers=2, block_bytes=1 << 16)\n"
        "    preprocess([sys.argv[1]], sys.argv[2], tokenizer='byte', options=options)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "a.jsonl"), str(tmp_path / "cut" / "p")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    started, kills = time.monotonic(), 0
    pair = [tmp_path / "cut" / f"p.{end}" for end in ("bin", "idx")]
    state = tmp_path / "cut" / "p.preprocess" / "state.json"
    while True:
        process = subprocess.Popen(command, env=environment)
        before = state.read_bytes() if state.exists() else b""
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:  # until it has saved some progress
            time.sleep(0.01)
            if state.exists() and kills < 3 and state.read_bytes() != before:
                break
        time.sleep(rng.random() * 0.05)
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert not pair[1].exists() or pair[0].exists()
            continue
        assert process.wait() == 0
        break
    assert kills >= 2
    assert time.monotonic() - started < 100
    assert content(tmp_path / "cut" / "p") == content(tmp_path / "whole" / "p")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Files of 20 MB and of 60 MB, each read by a fresh process."""
    line = json.dumps({"text": "some text " * 400}).encode() + b"\n"
    peaks = []
    for megabytes in (20, 60):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("wb") as file:
            for _ in range(megabytes * 10**6 // (len(line) * 100)):
                file.write(line * 100)
        code = (
            "import sys, resource; from megatron_cpt.data.preprocess.pipeline import preprocess; "
            "preprocess([sys.argv[1]], sys.argv[2], tokenizer='byte'); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(path), str(tmp_path / f"p{megabytes}")]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        peaks.append(int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))
    assert peaks[1] < peaks[0] + 20_000  # KiB


def test_the_same_bytes_as_ever():
    """A seed gives the same order in every numpy version."""
    digest = hashlib.sha256(np.random.PCG64([1, 2, 3]).random_raw(4).tobytes()).hexdigest()
    assert digest == hashlib.sha256(np.random.Generator(np.random.PCG64([1, 2, 3])).bytes(32)).hexdigest()


def test_what_does_not_fit_the_shared_memory_comes_by_the_pipe(tmp_path, inputs):
    """Some blocks of 200 bytes hold a line whose ids take 20 times as many bytes."""
    long = "\n".join(json.dumps({"text": "x" * n}) for n in (3, 4000, 5, 4000, 4000, 1))
    (inputs / "e.jsonl").write_text(long)
    tiny = {"block_bytes": 200}
    preprocess([inputs], tmp_path / "one", tokenizer="byte", options=PreprocessOptions(append_eod=True, **tiny))
    preprocess(
        [inputs], tmp_path / "two", tokenizer="byte", options=PreprocessOptions(append_eod=True, **tiny, workers=2)
    )
    assert content(tmp_path / "one") == content(tmp_path / "two")
