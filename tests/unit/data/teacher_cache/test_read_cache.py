"""Reading of a cache: contiguous ranges, and refusals of everything that is not as it was written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data.teacher_cache.cache_header import HEADER_FILE, file_name, read_header
from megatron_cpt.data.teacher_cache.read_cache import TeacherCache
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError
from tests.helpers.faults import flip_bit
from tests.helpers.runs import write_source
from tests.helpers.teacher_caches import expected_records, write_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for stride, name in enumerate(("web", "qa"), start=1):
        write_source(tmp_path / name, stride=stride, documents=4)
    return write_cache(tmp_path / "cache", {name: tmp_path / name for name in ("web", "qa")})


def test_any_range_is_read(cache: Path) -> None:
    opened = TeacherCache(cache)
    everything = expected_records(opened.header, 1)
    first, second = opened.read(1, [0, len(everything) - 5], 5)
    assert (first == everything[:5]).all()
    assert (second == everything[-5:]).all()


def test_a_file_is_found_by_its_content(cache: Path) -> None:
    opened = TeacherCache(cache)
    for suffix in (".bin", ".idx"):
        (cache.parent / f"moved{suffix}").write_bytes((cache.parent / f"qa{suffix}").read_bytes())
    assert opened.require("other_name", IndexedDataset(str(cache.parent / "moved"))) == 1


def test_another_file_is_refused_with_the_command(cache: Path) -> None:
    write_source(cache.parent / "new", stride=7, documents=4)
    with pytest.raises(RefusedError, match=r"no records of source new, file .*new, from token 0.*megatron-cpt teach"):
        TeacherCache(cache).require("new", IndexedDataset(str(cache.parent / "new")))
    write_source(cache.parent / "qa", stride=7, documents=4)
    with pytest.raises(RefusedError, match="had other content when the cache was made"):
        TeacherCache(cache).require("qa", IndexedDataset(str(cache.parent / "qa")))


def test_a_flipped_bit_is_refused_at_its_token(cache: Path) -> None:
    opened = TeacherCache(cache)
    size = opened.header.records.num_bytes
    flip_bit(cache / file_name(1), 8 * (23 * size + 9))
    opened.read(1, [10], 13)
    with pytest.raises(RefusedError, match=r"source qa, file .*qa, token 23 is damaged"):
        opened.read(1, [10], 14)


@pytest.mark.parametrize("name", [HEADER_FILE, file_name(1)])
def test_a_fifo_is_refused_instead_of_waited_for(cache: Path, name: str) -> None:
    (cache / name).unlink()
    os.mkfifo(cache / name)
    with pytest.raises(RefusedError, match=f"{name}: missing"):
        TeacherCache(cache)


def test_exchanged_files_are_refused(cache: Path) -> None:
    opened = TeacherCache(cache)
    (cache / file_name(0)).write_bytes((cache / file_name(1)).read_bytes())
    with pytest.raises(RefusedError, match="damaged"):
        opened.read(0, [0], 1)


def test_a_cut_or_missing_file_is_refused_when_the_cache_is_opened(cache: Path) -> None:
    os.truncate(cache / file_name(1), 100)
    with pytest.raises(RefusedError, match=r"00001.topk: has 100 bytes instead of"):
        TeacherCache(cache)
    (cache / file_name(1)).unlink()
    with pytest.raises(RefusedError, match=r"00001.topk: missing"):
        TeacherCache(cache)


def test_a_file_that_is_cut_later_is_refused_by_the_read(cache: Path) -> None:
    opened = TeacherCache(cache)
    os.truncate(cache / file_name(1), 2 * opened.header.records.num_bytes)
    with pytest.raises(RefusedError, match="token 2 is damaged or missing"):
        opened.read(1, [0], 5)


@pytest.mark.parametrize("change", [b"", b"{}", b"garbage"])
def test_a_damaged_header_is_refused(cache: Path, change: bytes) -> None:
    (cache / HEADER_FILE).write_bytes(change)
    with pytest.raises(RefusedError, match="no finished cache"):
        TeacherCache(cache)


def test_every_flipped_bit_of_the_header_is_refused(cache: Path) -> None:
    content = (cache / HEADER_FILE).read_bytes()
    for bit in range(0, 8 * (len(content) - 1), 5):
        flip_bit(cache / HEADER_FILE, bit)
        with pytest.raises(RefusedError):
            read_header(cache)
        (cache / HEADER_FILE).write_bytes(content)


def test_keys_differ_by_teacher_options_and_file(tmp_path: Path) -> None:
    write_source(tmp_path / "web", stride=1, documents=4)
    write_source(tmp_path / "qa", stride=2, documents=4)
    prefixes = {name: tmp_path / name for name in ("web", "qa")}
    headers = [
        read_header(write_cache(tmp_path / str(number), prefixes, **changes))
        for number, changes in enumerate([{}, {"teacher": "sha256:1"}, {"stride": 2}, {"top_k": 3}])
    ]
    keys = [header.key(index) for header in headers for index in range(2)]
    assert len(set(keys)) == 8
    assert len({header.digest for header in headers}) == 4
    assert np.unique([header.records.num_bytes for header in headers]).tolist() == [18, 22]
