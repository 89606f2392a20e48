"""Parts of a save, each tested separately."""

from __future__ import annotations

import errno
import io
import itertools
import math
import mmap
import resource
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_cpt.backend import cpu

cpu.install()

from megatron_cpt.checkpoint import layout  # noqa: E402
from megatron_cpt.checkpoint.manifest import digest, find_faults  # noqa: E402
from megatron_cpt.checkpoint.saving.publish import Retention, delete, publish  # noqa: E402
from megatron_cpt.checkpoint.saving.staging import StagingBuffer  # noqa: E402
from megatron_cpt.checkpoint.saving.torch_save import AbandonedError, HashedStream  # noqa: E402
from megatron_cpt.checkpoint.saving.write_plan import ShardEntry, _divided  # noqa: E402
from megatron_cpt.checkpoint.saving.writer import write_files  # noqa: E402
from megatron_cpt.checkpoint.state.optimizer_shards import boxes  # noqa: E402
from tests.helpers.faults import FailingDisk  # noqa: E402

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def _entry(name: str, data: torch.Tensor | io.BytesIO) -> ShardEntry:
    kind = WriteItemType.TENSOR if isinstance(data, torch.Tensor) else WriteItemType.BYTE_IO
    return ShardEntry(WriteItem(MetadataIndex(name), kind), data)


@given(SHAPES, st.data())
def test_boxes_tile_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start, end = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    whole = np.arange(size).reshape(shape)
    found: list[int] = []
    pieces = boxes(shape, start, end)
    for first, offsets, lengths in pieces:
        assert first == len(found)
        found += whole[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))].ravel().tolist()
    assert found == list(range(start, end))
    assert len(pieces) <= 2 * len(shape) - 1


def test_staged_copies_do_not_follow_their_originals() -> None:
    staging = StagingBuffer()
    base = torch.arange(12.0)
    tensors = [base[2:5], base.view(3, 4).t(), base.bfloat16(), torch.tensor(7), torch.empty(0, 3)]
    expected = [tensor.clone() for tensor in tensors]
    copies = staging.copy(tensors)
    held = staging.num_bytes
    base.zero_()
    for copy, value in zip(copies, expected, strict=True):
        assert copy.is_contiguous()
        assert copy.dtype == value.dtype
        assert torch.equal(copy, value)
    again = staging.copy(tensors[:2])
    assert staging.num_bytes == held, "the memory of the previous save is reused"
    assert again[0].data_ptr() == copies[0].data_ptr()


def _tensor(num_bytes: int, kind: str) -> torch.Tensor:
    """Return a tensor with different values; as a column it is not contiguous."""
    values = torch.arange(num_bytes) % 251
    if kind == "column":
        return values.to(torch.uint8)[:, None].repeat(1, 2)[:, 1]
    return values.to({"bytes": torch.uint8, "floats": torch.float32, "halves": torch.bfloat16}[kind])


TENSORS = st.lists(st.tuples(st.integers(0, 12_000), st.sampled_from(["bytes", "floats", "halves", "column"])))


@given(st.lists(TENSORS, min_size=1, max_size=3))
def test_staged_tensors_come_back_identical_and_no_copy_touches_two_pieces(saves: list[list[tuple[int, str]]]) -> None:
    piece = mmap.PAGESIZE
    staging, copy_, copied = StagingBuffer(piece), torch.Tensor.copy_, []

    def note(target: torch.Tensor, source: torch.Tensor, **options: bool) -> torch.Tensor:
        copied.append((target.data_ptr(), target.nbytes))
        return copy_(target, source, **options)

    for save in saves:
        tensors = [_tensor(size, kind) for size, kind in save]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", note)
            copies = staging.copy(tensors)
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
        assert all(copy.is_contiguous() and copy.dtype == t.dtype for copy, t in zip(copies, tensors, strict=True))
        base = staging._memory.data_ptr()
        assert all((at - base) // piece == (at + max(size, 1) - 1 - base) // piece for at, size in copied)
        copied.clear()
    largest = max(sum(_tensor(*one).nbytes for one in save) for save in saves)
    count = max(len(save) for save in saves)
    assert largest <= staging.num_bytes <= largest + 63 * count
    staging.close()
    assert staging.num_bytes == 0


class _CudaStandIn:
    """Records what is pinned; fails from the piece with the number `fails_at`."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.pinned: dict[int, int] = {}
        self.fails_at = fails_at

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        assert address % mmap.PAGESIZE == 0
        assert flags == 0
        if len(self.pinned) == self.fails_at:
            return 2  # cudaErrorMemoryAllocation
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0

    def synchronize(self) -> None:
        """Stand in for the stream as well."""


def _staging_with(cuda: _CudaStandIn, monkeypatch: pytest.MonkeyPatch) -> StagingBuffer:
    staging = StagingBuffer(mmap.PAGESIZE)
    staging._stream = cuda
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    return staging


def test_the_memory_is_pinned_in_pieces_once_and_released_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, page = _CudaStandIn(), mmap.PAGESIZE
    staging = _staging_with(cuda, monkeypatch)
    staging.reserve([2 * page, page + 1])
    assert list(cuda.pinned.values()) == [page, page, page, 64]
    assert list(cuda.pinned) == [staging._memory.data_ptr() + number * page for number in range(4)]
    before = dict(cuda.pinned)
    staging.copy([torch.ones(3 * page, dtype=torch.uint8)])
    assert cuda.pinned == before, "a save that fits pins nothing"
    staging.copy([torch.ones(5 * page, dtype=torch.uint8)])
    assert sum(cuda.pinned.values()) == 5 * page
    staging.close()
    assert cuda.pinned == {}


def test_memory_that_cannot_be_pinned_is_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = _CudaStandIn(fails_at=1)
    staging = _staging_with(cuda, monkeypatch)
    tensor = torch.arange(10_000)
    (copy,) = staging.copy([tensor])
    assert torch.equal(copy, tensor)
    assert "of host memory could be pinned (CUDA error 2)" in caplog.text
    assert len(cuda.pinned) == 1
    staging.close()
    assert cuda.pinned == {}


def test_files_hold_what_was_planned_and_their_checksums(tmp_path: Path) -> None:
    base, bf16 = torch.randn(1000, 300), torch.randn(40, 9).bfloat16()
    entries = {
        "__0_0.distcp": [_entry("view", base[10:20]), _entry("bytes", io.BytesIO(b"plain"))],
        "__0_1.distcp": [
            _entry("large", base),
            _entry("bf16", bf16[:, 3]),
            _entry("scalar", torch.tensor(3)),
        ],
    }
    written = write_files(tmp_path, entries, threading.Event())
    assert written.files == {name: digest(tmp_path / name) for name in entries}
    tensors = {e.item.index.fqn: e.data for content in entries.values() for e in content}
    for place in written.places:
        info = place.storage_data
        raw = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        if place.index.fqn == "bytes":
            assert raw == b"plain"
        else:
            assert torch.equal(torch.load(io.BytesIO(raw), weights_only=True), tensors[place.index.fqn])
            assert place.index.fqn != "view" or info.length < 20_000, "a view is saved without the rest of its storage"


def test_no_second_checksum_is_computed(tmp_path: Path) -> None:
    """torch's option holds per thread, and threads write the files."""
    (place,) = write_files(tmp_path, {"__0_0.distcp": [_entry("x", torch.ones(9))]}, threading.Event()).places
    raw = (tmp_path / "__0_0.distcp").read_bytes()[: place.storage_data.length]
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    assert torch.serialization.get_crc32_options()


def test_a_file_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_files(tmp_path, {"__0_0.distcp": [_entry("large", torch.zeros(100_000))]}, threading.Event())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_an_abandoned_save_ends_at_once(tmp_path: Path) -> None:
    abandon = threading.Event()
    abandon.set()
    with pytest.raises(AbandonedError):
        write_files(tmp_path, {"__0_0.distcp": [_entry("large", torch.zeros(100_000))]}, abandon)
    assert (tmp_path / "__0_0.distcp").stat().st_size < 100_000


@given(st.lists(st.integers(0, 200_000), max_size=12), st.integers(0, 255))
def test_a_stream_is_written_and_hashed_in_order(lengths: list[int], seed: int) -> None:
    pieces = [bytes([seed, number]) * (length // 2) for number, length in enumerate(lengths)]

    class Memory(io.BytesIO):
        def fileno(self) -> int:
            return 1

    memory, position = Memory(), [0]
    stream = HashedStream(memory, threading.Event())  # type: ignore[arg-type]
    stream._write_through = memory.write  # type: ignore[assignment,method-assign]
    for piece in pieces:
        assert stream.tell() == position[0]
        position[0] += stream.write(piece)
    stream.flush()
    assert memory.getvalue() == b"".join(pieces)
    assert stream.checksum() == xxhash.xxh3_128_hexdigest(b"".join(pieces))


def test_entries_are_spread_over_files_of_one_size() -> None:
    entries = [_entry(str(size), torch.zeros(size, dtype=torch.uint8)) for size in (7, 1, 5, 3, 4)]
    files = _divided(entries, rank=3)
    assert {name: sum(e.num_bytes for e in content) for name, content in files.items()} == {
        "__3_0.distcp": 10,
        "__3_1.distcp": 10,
    }
    assert _divided([], rank=0) == {}


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(), []),
        (Retention(keep=2), [10, 20, 30]),
        (Retention(keep=2, keep_every=20), [10, 30]),
        (Retention(keep=9), []),
        (Retention(keep_every=20), []),
    ],
)
def test_which_checkpoints_go(retention: Retention, gone: list[int]) -> None:
    """Steps 10 to 50 exist, and 60, from which the run has rolled back to 40."""
    paths = [Path(layout.checkpoint_name(step)) for step in (10, 20, 30, 40, 50, 60)]
    assert retention.outdated(paths, paths[4]) == [Path(layout.checkpoint_name(step)) for step in gone]


def _publish(folder: Path, step: int, retention: Retention) -> Path:
    final = folder / layout.checkpoint_name(step)
    aside = folder / f".{final.name}.tmp"
    aside.mkdir(parents=True)
    for name in ("state.json", "run.yaml", "metadata.json"):
        (aside / name).write_text("{}")
    written = write_files(aside, {"__0_0.distcp": [_entry("a", torch.full((9,), step))]}, threading.Event())
    delete(publish(aside, final, Metadata({}), [written], retention))
    return final


def test_a_latest_that_cannot_be_written_does_not_take_back_what_is_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest").mkdir()
    final = _publish(tmp_path, 2, Retention(keep=1))
    assert find_faults(final) == []
    (warning,) = caplog.messages
    assert f"{final} is saved, but updating `latest` or retiring older checkpoints failed" in warning
    assert "latest" in warning


def test_publishing_replaces_prunes_and_tidies(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.tmp").mkdir()
    (tmp_path / ".step-00000002.deleted").mkdir()
    (tmp_path / ".step-00000002.deleted" / "half").write_text("left by a kill")
    for step in (2, 4, 6, 4):
        final = _publish(tmp_path, step, Retention(keep=2))
        assert find_faults(final) == []
        assert (tmp_path / "latest").read_text() == f"{final.name}\n"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000004", "step-00000006"], "the later, corrupt one is not touched"


def test_an_error_of_the_disk_at_any_change_costs_no_published_checkpoint(tmp_path: Path) -> None:
    """Every change of a file while a second checkpoint is written and published fails once."""
    disk = FailingDisk(tmp_path)
    with disk.fails_at(None):
        _publish(tmp_path / "count", 4, Retention())
    assert disk.changes > 15
    num_changes, failures = disk.changes, []
    for at, error in zip(range(num_changes), itertools.cycle((errno.EDQUOT, errno.EROFS, errno.EIO)), strict=False):
        folder = tmp_path / f"{at}"
        first = _publish(folder, 2, Retention())
        try:
            with disk.fails_at(at, error):
                second = _publish(folder, 4, Retention())
            assert find_faults(second) == []
        except OSError as caught:
            failures.append((caught.errno == error, str(folder) in str(caught.filename)))
        for path in layout.list_checkpoints(folder):
            assert find_faults(path) == []
        assert first in layout.list_checkpoints(folder)
        shutil.rmtree(folder / ".step-00000004.tmp", ignore_errors=True)
        assert find_faults(_publish(folder, 4, Retention(keep=1))) == []
        assert {path.name for path in folder.iterdir()} == {"latest", "step-00000004"}
    assert failures == [(True, True)] * len(failures)
    assert len(failures) > num_changes / 2


def test_a_shard_that_is_shorter_than_it_was_written_is_not_published(tmp_path: Path) -> None:
    aside = tmp_path / ".step-00000001.tmp"
    aside.mkdir()
    written = write_files(aside, {"__0_0.distcp": [_entry("a", torch.zeros(9000))]}, threading.Event())
    with open(aside / "__0_0.distcp", "r+b") as file:
        file.truncate(100)
    with pytest.raises(OSError, match=r"__0_0\.distcp: 100 bytes, "):
        publish(aside, tmp_path / "step-00000001", Metadata({}), [written], Retention())
    assert layout.list_checkpoints(tmp_path) == []
