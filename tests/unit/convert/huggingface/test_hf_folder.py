"""Reading Hugging Face folders: correct bytes from valid folders, a refusal that names the file otherwise."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_cpt.convert.huggingface import untrusted_json
from megatron_cpt.convert.huggingface.folder import HfFolder
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.hf_models import build_hf_model, hf_tensors, save_hf_model, tiny_config


def write_raw(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder, **options):
    with pytest.raises(RefusedError) as refused:
        HfFolder(folder, **options)
    return str(refused.value)


def opened(folder):
    """Return the folder, or None and the message of the refusal."""
    try:
        return HfFolder(folder), ""
    except RefusedError as refused:
        return None, str(refused)


# ------------------------------------------------------------------------------------------- valid folders


@pytest.mark.parametrize(
    ("dtype", "shards"), [(torch.float32, "5GB"), (torch.bfloat16, "20KB"), (torch.float16, "20KB")]
)
def test_what_transformers_writes_is_read(tmp_path, dtype, shards):
    save_hf_model(tmp_path, "llama", dtype=dtype, max_shard_size=shards)
    expected = hf_tensors(build_hf_model(tiny_config("llama")))
    folder = HfFolder(tmp_path)
    assert folder.config["num_hidden_layers"] == 2
    assert sorted(folder.tensors) == sorted(expected)
    assert len({info.file for info in folder.tensors.values()}) == len(list(tmp_path.glob("*.safetensors")))
    for name, tensor in expected.items():
        assert folder.tensors[name].shape == tuple(tensor.shape)
        assert folder.tensors[name].num_bytes == tensor.numel() * dtype.itemsize
        assert torch.equal(folder.read(name), tensor.to(dtype))
        assert torch.equal(folder.read(name, slice(3, 7)), tensor.to(dtype)[3:7])


def test_scalars_empty_tensors_and_all_types(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "long": torch.tensor([[1, -2]]),
        "double": torch.tensor([1e300]),
        "fp8": torch.tensor([1.5]).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = HfFolder(tmp_path)
    for name, tensor in tensors.items():
        read = folder.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert read.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist() if tensor.ndim else read == tensor


def test_the_hub_cache_of_links_is_read(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert HfFolder(snapshot).read("w").tolist() == [1, 1]


def test_memory_grows_only_by_the_rows_that_are_read(tmp_path):
    rows, width = 128, 1 << 18  # 128 MiB, a hole in a sparse file
    file = tmp_path / "model.safetensors"
    write_raw(file, {"w": entry("F32", [rows, width], 0, rows * width * 4)})
    os.truncate(file, file.stat().st_size + rows * width * 4)
    folder, process = HfFolder(tmp_path), psutil.Process()
    before, most = process.memory_info().rss, 0
    for row in range(0, rows, 4):
        assert folder.read("w", slice(row, row + 4)).shape == (4, width)
        most = max(most, process.memory_info().rss)
    assert most - before < 32 << 20


# ------------------------------------------------------------------------------------------ malformed headers

VALID = {"a": entry("F32", [2], 0, 8), "b": entry("BF16", [2, 1], 8, 12)}


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"b": entry("BF16", [2, 1], 4, 8)}, 8, "b overlaps a"),
        ({"b": entry("BF16", [2, 1], 10, 14)}, 14, "b leaves a gap after a"),
        ({"a": entry("F32", [2], 4, 12), "b": entry("BF16", [2, 1], 12, 16)}, 16, "a leaves a gap after the header"),
        ({}, 11, "b ends at byte"),
        ({}, 13, "1 bytes after b belong to no tensor"),
        ({"b": entry("BF16", [2, 2], 8, 12)}, 12, r"b: 4 bytes, but BF16 \[2, 2\] takes 8"),
        ({"b": entry("BF16", [1 << 62, 1 << 62], 8, 12)}, 12, "b: 4 bytes, but"),
        ({"b": entry("BF16", [-2, -1], 8, 12)}, 12, r"b: shape \[-2, -1\]"),
        ({"b": entry("BF16", [2.0, 1], 8, 12)}, 12, r"b: shape \[2.0, 1\]"),
        ({"b": entry("BF16", "21", 8, 12)}, 12, "b: shape '21'"),
        ({"b": entry("Q4", [2, 1], 8, 12)}, 12, "b: dtype 'Q4'"),
        ({"b": entry(["BF16"], [2, 1], 8, 12)}, 12, "b: dtype"),
        ({"b": entry("BF16", [2, 1], 12, 8)}, 12, "b: data_offsets"),
        ({"b": entry("BF16", [2, 1], True, 12)}, 12, "b: data_offsets"),
        ({"b": {"dtype": "BF16", "shape": [2, 1]}}, 12, "b: data_offsets None"),
        ({"b": [0, 4]}, 12, "b: its entry"),
    ],
)
def test_a_header_that_lies_is_refused_by_tensor(tmp_path, changes, data, message):
    write_raw(tmp_path / "model.safetensors", {**VALID, **changes}, b"\0" * data)
    with pytest.raises(RefusedError, match=f"model.safetensors: .*{message}"):
        HfFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\1\2\3", "3 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", "says its header has 9223372036854775808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "says its header has 3 bytes"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
        (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "has a twice"),
    ],
)
def test_what_is_no_header_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert message in refusal(tmp_path)


def test_a_header_of_a_million_tensors_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    entry = b'{"dtype":"U8","shape":[],"data_offsets":[0,0]}'
    header = b"{" + b",".join(b'"%d":%s' % (number, entry) for number in range(1_200_000)) + b"}"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    monkeypatch.setattr(untrusted_json, "json", None)
    assert "model.safetensors: its header: 4,799,999 values, above the limit of 2,000,000" in refusal(tmp_path)


def test_a_shape_of_many_dimensions_is_refused_before_it_is_multiplied(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": entry("U8", [99999] * 500_000, 0, 4)}, b"\0" * 4)
    message = refusal(tmp_path)
    assert "a: shape [99999, 99999, 99999, 99999, 99999, 99999, ...], which must be a list of at most 64" in message


def test_a_file_cut_after_it_was_opened(tmp_path):
    save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    folder = HfFolder(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(RefusedError, match=r"model.safetensors: ends inside w"):
        folder.read("w")


@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    file = folder / "model.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.sampled_from([len(content), len(content), 0, 7, 40, len(content) - 1])) :]
    file.write_bytes(content)
    found, message = opened(folder)
    if found is None:
        assert str(file) in message
        return
    for name, info in found.tensors.items():
        assert tuple(found.read(name).shape) == info.shape
        assert 0 < info.start <= info.stop <= len(content)


# ------------------------------------------------------------------------------------------- invalid folders


def two_shards(folder):
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    save_file({"b": torch.ones(1)}, folder / "two.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors'.*there is no such file"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "one.safetensors: has no b"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "two.safetensors: has no c"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "one.safetensors: holds a, which the index expects in two"),
        ({"a": "one.safetensors", "x": "two.safetensors"}, "two.safetensors: holds b, which the index does not list"),
        ({"a": "../one.safetensors"}, "not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": "sub/one.safetensors"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": ""}, "not a plain file name"),
        ({"a": "one.safe\0tensors"}, "not a plain file name"),
        ({"a": 1}, "names 1 as a file"),
        ({}, "no weight_map"),
        (["one.safetensors"], "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, message):
    two_shards(tmp_path)
    index(tmp_path, weight_map)
    with pytest.raises(RefusedError, match=message):
        HfFolder(tmp_path)


def test_one_tensor_in_two_shards(tmp_path):
    two_shards(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    message = refusal(tmp_path)
    assert message.startswith("a: in two shards")
    assert "one.safetensors" in message
    assert "two.safetensors" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "secret").write_text('{"weight_map": {}}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).symlink_to("../secret")
    assert "leads out of the folder" in refusal(folder)
    os.unlink(tmp_path / "secret")
    assert "leads out of the folder" in refusal(folder)  # also a dangling link


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refusal(tmp_path)


def test_a_config_that_is_a_link_out_or_no_object(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RefusedError, match=r"config.json"):
        _ = HfFolder(tmp_path).config
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(RefusedError, match=r"config.json: not a JSON object"):
        _ = HfFolder(tmp_path).config
    os.unlink(tmp_path / "config.json")
    (tmp_path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(RefusedError, match="leads out of the folder"):
        _ = HfFolder(tmp_path).config


def test_no_folder_and_no_weights(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        HfFolder(tmp_path / "nothing")
    save_file({"w": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    message = refusal(tmp_path)
    assert "no model.safetensors" in message
    assert "consolidated.safetensors without an index" in message


# ------------------------------------------------------------------------------------------------- pickles


def test_pickled_weights_only_when_allowed(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.arange(6.0).reshape(2, 3).t().to(torch.bfloat16)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "pytorch_model.bin: pickled weights can carry code" in message
    folder = HfFolder(tmp_path, allow_pickle=True)
    for name, tensor in tensors.items():
        assert folder.tensors[name].shape == (3, 2)
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read(name, slice(1, 3)), tensor[1:3])
        assert folder.read(name).is_contiguous()


def test_pickled_shards_of_old_and_new_format(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin", _use_new_zipfile_serialization=False)
    torch.save({"b": torch.zeros(3)}, tmp_path / "two.bin")
    weight_map = {"a": "one.bin", "b": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = HfFolder(tmp_path, allow_pickle=True)
    assert [folder.read(name).tolist() for name in ("a", "b", "a")] == [[1, 1], [0, 0, 0], [1, 1]]


class Command:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.ones(2), "b": Command()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert re.search(r"pytorch_model\.bin: (refused|holds more than tensors)", refusal(tmp_path, allow_pickle=True))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}])
def test_a_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert str(tmp_path / "pytorch_model.bin") in refusal(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    "value",
    [
        b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R",  # 8 GiB of zeros
        b"((X\x07\0\0\0storagectorch\nByteStorage\nX\1\0\0\0aX\3\0\0\0cpu\x8a\x05\0\0\0\0\x02NtQ",
    ],
)
def test_an_old_pickle_that_builds_more_than_the_file_holds(tmp_path, value, monkeypatch):
    """torch.load would allocate all of it."""
    content = io.BytesIO()
    torch.save({"a": torch.ones(2)}, content, _use_new_zipfile_serialization=False)
    content.seek(0)
    for _ in range(3):  # the mark, the version and the machine
        pickle.load(content)  # noqa: S301 - written above
    start = content.getvalue()[: content.tell()]
    (tmp_path / "pytorch_model.bin").write_bytes(start + b"\x80\x02" + value + b".")
    monkeypatch.setattr(torch, "load", None)
    assert re.search(r"pytorch_model\.bin: refused: it", refusal(tmp_path, allow_pickle=True))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not really", b"\x80\x02garbage"])
def test_a_damaged_pickle(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert str(tmp_path / "pytorch_model.bin") in refusal(tmp_path, allow_pickle=True)
