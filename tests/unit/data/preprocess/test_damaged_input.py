"""Damage to an input file is refused and named; it is never one bad line among others."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_cpt.cli import main
from megatron_cpt.data.preprocess import preprocess_run
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.join import join_shards
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import RefusedError

PACKERS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
KEEP = PreprocessOptions(allow_damaged_input=True, max_bad="100%")


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def documents(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer("byte")
    return [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [rng.bytes(60).hex() for _ in range(count)]  # they do not pack well, so half of the bytes is half of them


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "cut by 30 bytes", "noise", "foreign", "empty"])
def test_a_damaged_archive(tmp_path, packing, damage):
    texts = random_texts(20_000)
    data = bytearray(PACKERS[packing](jsonl(texts)))
    half = len(data) // 2
    if damage == "cut":
        del data[half:]
    elif damage == "cut by 30 bytes":
        del data[-30:]
    elif damage == "noise":
        data[half : half + 100] = np.random.default_rng(1).bytes(100)
    else:
        data[:] = jsonl(["not packed at all"] * 30) if damage == "foreign" else b""
    name = f"a.jsonl{packing}"
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["next file"]))
    inputs = [tmp_path / name, tmp_path / "b.jsonl"]
    with pytest.raises(RefusedError, match=rf"a\.jsonl\{packing}: truncated or corrupt after .*--allow-damaged-input"):
        preprocess(inputs, tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad="100%"))
    assert sorted(os.listdir(tmp_path)) == [name, "b.jsonl"]
    report = preprocess(inputs, tmp_path / "p", tokenizer="byte", options=KEEP)
    kept = documents(tmp_path / "p")
    assert kept[-1] == "next file"
    if damage == "noise":  # a checksum shows it late, so a few lines before may be wrong
        assert kept[: len(kept) // 3] == texts[: len(kept) // 3]
    else:
        assert kept[:-1] == texts[: len(kept) - 1]
        assert report.bad_lines == 0  # the rest of the truncated line is no bad line either
    (problem,) = report.damaged
    assert problem.startswith(f"{tmp_path / name}: truncated or corrupt after ")
    if damage == "cut":
        assert 0.3 * len(texts) < len(kept) < 0.7 * len(texts)
        assert f" bytes and {len(kept) - 1:,} lines: " in problem
    if damage in ("foreign", "empty"):
        assert kept == ["next file"]


def test_a_cut_shard_is_named_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        data = PACKERS[".zst"](jsonl(random_texts(3000)))
        Path(f"{name}.jsonl.zst").write_bytes(data[:20_000] if name == "b" else data)
    arguments = ["preprocess", "--input", "*.jsonl.zst", "--output-prefix", "p", "--tokenizer", "byte"]
    assert main([*arguments, "--max-bad", "0.1%"]) == 3
    assert "b.jsonl.zst: truncated or corrupt after 20,000 bytes and " in capsys.readouterr().err
    assert not list(tmp_path.glob("p*"))
    assert main([*arguments, "--allow-damaged-input"]) == 0
    assert "damaged: b.jsonl.zst: truncated or corrupt after 20,000 bytes and " in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 3000, None])
def test_damaged_parquet(tmp_path, cut):
    pq.write_table(pa.table({"text": random_texts(1000)}), tmp_path / "a.parquet", row_group_size=100)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    if cut is None:
        data[20_000:30_000] = bytes(10_000)  # the footer is there, a page is not
    else:
        del data[cut:]
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["next file"]))
    inputs = [tmp_path / "a.parquet", tmp_path / "b.jsonl"]
    place = "after 0 bytes" if cut == 0 else r"after \d+ rows: [^;]*[^.;]; replace the file"
    with pytest.raises(RefusedError, match=rf"a\.parquet: truncated or corrupt {place}"):
        preprocess(inputs, tmp_path / "p", tokenizer="byte")
    report = preprocess(inputs, tmp_path / "p", tokenizer="byte", options=KEEP)
    assert len(report.damaged) == 1
    assert documents(tmp_path / "p")[-1] == "next file"


def test_progress_is_kept_and_the_run_goes_on_with_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_run, "SAVE_SECONDS", 0.0)
    (tmp_path / "a.jsonl").write_bytes(jsonl(random_texts(200)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(["cut off"]))[:-8])
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    with pytest.raises(RefusedError):
        preprocess(inputs, tmp_path / "p", tokenizer="byte", options=PreprocessOptions(block_bytes=2000))
    assert (tmp_path / "p.preprocess" / "state.json").exists()
    options = PreprocessOptions(block_bytes=2000, allow_damaged_input=True)
    assert len(preprocess(inputs, tmp_path / "p", tokenizer="byte", options=options).damaged) == 1
    assert documents(tmp_path / "p")[:200] == random_texts(200)


def test_shards_name_their_damaged_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl(random_texts(500)))[:-9])
    for index in range(2):
        options = PreprocessOptions(shard=Shard(index, 2), allow_damaged_input=True)
        preprocess([tmp_path / "*.gz"], tmp_path / "p", tokenizer="byte", options=options)
    report = join_shards(tmp_path / "p", 2)
    assert [Path(problem.split(":")[0]).name for problem in report.damaged] == ["a.jsonl.gz", "b.jsonl.gz"]


class TestShareOfBadLines:
    def test_bytes_count_as_well_as_lines(self, tmp_path):
        array = json.dumps(["lost " * 10] * 30_000)  # one line of 1.7 MB that is not documents
        (tmp_path / "a.jsonl").write_bytes(jsonl(random_texts(2000)) + array.encode() + b"\n")
        for limit in ("0.5%", None):
            with pytest.raises(RefusedError, match=r"of \d+ bytes are bad"):
                preprocess(
                    [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad=limit)
                )
        report = preprocess(
            [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad="90%")
        )
        assert report.bad_lines == 1
        assert report.bad_bytes > 0.8

    @pytest.mark.parametrize(("bad", "passes"), [(10, True), (11, False)])
    def test_default(self, tmp_path, bad, passes):
        (tmp_path / "a.jsonl").write_bytes(jsonl(["good"] * 1000) + b"{}\n" * bad)
        if passes:
            assert preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte").bad_lines == bad
        else:
            with pytest.raises(RefusedError, match=r"11 of 1011 lines are bad, more than 0\.1000%.*raise --max-bad"):
                preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
            assert os.listdir(tmp_path) == ["a.jsonl"]

    def test_the_summary_names_share_and_reasons(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a.jsonl").write_bytes(jsonl(["good"] * 197) + b"{\n{}\n{}\n")
        assert main(["preprocess", "--input", "a.jsonl", "--output-prefix", "p", "--tokenizer", "byte"]) == 0
        out = capsys.readouterr().out
        assert "skipped: 3 bad lines, listed in p.bad.jsonl\n  1.50% of the lines, 0.15% of the bytes: " in out
        assert "of the bytes: has no key 'text' (2), not JSON (1)\n" in out


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    import subprocess
    import sys

    (tmp_path / "a.jsonl").write_bytes(jsonl(["text " * 1000] * 200))
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from megatron_cpt.cli import main\n"
        "sys.exit(main(['preprocess', '--input', 'a.jsonl', '--output-prefix', 'p', '--tokenizer', 'byte']))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "p.preprocess/0.tokens: File too large; raise the limit" in done.stderr
    assert "run the same command again to resume" in done.stderr
    preprocess(["a.jsonl"], "p", tokenizer="byte")
    assert len(documents(tmp_path / "p")) == 200  # the same command has resumed
