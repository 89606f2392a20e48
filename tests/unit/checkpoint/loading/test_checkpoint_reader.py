"""Reading tensors into the run's memory: any box into any target, with the values that torch reads."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.checkpoint.loading import reader
from megatron_cpt.checkpoint.loading.reader import plan_reads, read_box, read_boxes
from megatron_cpt.checkpoint.loading.stored_state import StoredBox, read_stored_state
from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.errors import RefusedError

DTYPES = (
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _stored(folder: Path, tensor: torch.Tensor, leading: int = 0) -> StoredTensor:
    """Save the tensor into a file, between other bytes."""
    content = io.BytesIO()
    torch.save(tensor, content)
    path = folder / "__0_0.distcp"
    path.write_bytes(b"\x01" * leading + content.getvalue() + b"\x02" * 7)
    found = open_torch_file(path, leading, len(content.getvalue()))
    assert isinstance(found, StoredTensor)
    return found


def _target(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Return memory for a box: contiguous, as columns of a wider tensor, or with reversed dimensions."""
    if kind == "columns" and shape:
        return torch.zeros((*shape[:-1], shape[-1] + 3), dtype=dtype)[..., 1 : shape[-1] + 1]
    if kind == "reversed" and len(shape) > 1:
        return torch.zeros(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
    return torch.zeros(shape, dtype=dtype)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_box_of_any_tensor_into_any_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", data.draw(st.sampled_from([1, 64, 500, 8 << 20]), "piece"))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4), "shape"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    offsets = tuple(data.draw(st.integers(0, size), "offset") for size in shape)
    lengths = tuple(
        data.draw(st.integers(0, size - offset), "length") for size, offset in zip(shape, offsets, strict=True)
    )
    tensor = _random(shape, dtype, seed=len(shape))
    wanted = dtype if data.draw(st.booleans(), "same dtype") else torch.float32
    target = _target(lengths, wanted, data.draw(st.sampled_from(["whole", "columns", "reversed"]), "target"))
    read_box(_stored(tmp_path, tensor, data.draw(st.integers(0, 200), "leading")), offsets, target)
    box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(target, box.to(wanted))


def test_what_lies_beside_the_box_in_the_target_is_left_alone(tmp_path: Path) -> None:
    target = torch.full((4, 6), -1.0)
    read_box(_stored(tmp_path, torch.ones(8, 8)), (2, 3), target[1:3, 2:5])
    expected = torch.full((4, 6), -1.0)
    expected[1:3, 2:5] = 1
    assert torch.equal(target, expected)


def test_one_element_of_a_column(tmp_path: Path) -> None:
    target = torch.zeros(4, 2, dtype=torch.bfloat16)
    read_box(_stored(tmp_path, torch.arange(6, dtype=torch.bfloat16)), (5,), target.t()[1, 2:3])
    assert target.flatten().tolist() == [0, 0, 0, 0, 0, 5, 0, 0]


@pytest.mark.parametrize(("offsets", "shape"), [((3, 0), (2, 5)), ((0, 1), (4, 5)), ((-1, 0), (1, 5)), ((0,), (4,))])
def test_a_box_that_the_tensor_does_not_have_is_refused(
    tmp_path: Path, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    with pytest.raises(RefusedError, match=r"__0_0\.distcp: a tensor of shape \(4, 5\) has no box of .* do not belong"):
        read_box(_stored(tmp_path, torch.ones(4, 5)), offsets, torch.zeros(shape))


def test_a_file_that_ends_in_the_middle_of_a_box_is_refused(tmp_path: Path) -> None:
    stored = _stored(tmp_path, torch.ones(100, 100))
    with open(stored.path, "r+b") as file:
        file.truncate(stored.offset + 20_000)
    read_box(stored, (0, 0), torch.zeros(50, 100))
    for target in (torch.zeros(51, 100), torch.zeros(60, 99)):
        with pytest.raises(RefusedError, match="ends in the middle of a tensor; the file was cut"):
            read_box(stored, (0, 0), target)


def _saved(folder: Path) -> dict[str, Any]:
    state = {
        "whole": _random((300, 7), torch.bfloat16, 0),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flags": _random((9,), torch.bool, 1),
        "eighths": torch.arange(16.0).to(torch.float8_e4m3fn),
        "step": 7,
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return state


def _read_all(folder: Path, found: dict[str, torch.Tensor]) -> None:
    """Read whole tensors of a checkpoint of torch into `found`."""
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "common_backend": "torch"}')
    torch.save({"step": 7}, folder / "common.pt")
    stored = read_stored_state(folder)
    assert stored.common == {"step": 7}
    assert stored.shapes == {name: tuple(target.shape) for name, target in found.items()}
    reads = [
        read for name, target in found.items() for read in plan_reads(target, (0,) * target.ndim, stored.boxes[name])
    ]
    read_boxes(reads)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_torch_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    expected = _saved(tmp_path)
    expected.pop("step")
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    found["whole"] = torch.zeros(300, 7)  # of another dtype than the stored one
    _read_all(tmp_path, found)
    for key, value in expected.items():
        assert torch.equal(found[key].float(), value.float()), key


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_cut_file_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(5000), "b": torch.ones(5000)}
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:30_000])
    with pytest.raises(RefusedError, match=r"\.distcp: .*(cut|damaged)"):
        _read_all(tmp_path, {name: torch.zeros(5000) for name in tensors})


@given(data=st.data())
def test_a_box_is_filled_from_any_division_of_the_tensor(data: Any) -> None:
    """Every element of the target is read once, from its own place."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "shape"))
    boxes: list[StoredBox] = [StoredBox((0,) * len(shape), shape, Path("x"), 0, 0)]
    for _ in range(data.draw(st.integers(0, 5), "cuts")):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1), "box"))
        axis = data.draw(st.integers(0, len(shape) - 1), "axis")
        at = data.draw(st.integers(0, box.sizes[axis]), "at")
        first, second = list(box.sizes), list(box.sizes)
        first[axis], second[axis] = at, box.sizes[axis] - at
        beyond = list(box.offsets)
        beyond[axis] += at
        boxes += [replace(box, sizes=tuple(first)), replace(box, offsets=tuple(beyond), sizes=tuple(second))]
    offsets = tuple(data.draw(st.integers(0, size), "offset") for size in shape)
    lengths = [data.draw(st.integers(0, size - at), "length") for size, at in zip(shape, offsets, strict=True)]
    tensor = torch.arange(math.prod(shape)).view(shape)
    target = torch.full(lengths, -1)
    reads = plan_reads(target, offsets, boxes)
    assert sum(read.target.numel() for read in reads) == target.numel()
    for read in reads:
        stored = tensor[_slices(read.source.offsets, read.source.sizes)]
        read.target.copy_(stored[_slices(read.offsets, read.target.shape)])
    assert torch.equal(target, tensor[_slices(offsets, lengths)])


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
