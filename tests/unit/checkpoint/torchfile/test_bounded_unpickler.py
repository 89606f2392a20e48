"""Pickles of a few bytes that would take gigabytes or hours are refused at once."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint.torchfile import unpickle
from megatron_cpt.checkpoint.torchfile.torch_file import load_torch_file, open_torch_file
from megatron_cpt.checkpoint.torchfile.unpickle import PlainUnpickler, read_metadata
from megatron_cpt.errors import RefusedError


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _call(name: str, argument: bytes) -> bytes:
    return _global("builtins", name) + argument + pickle.TUPLE1 + pickle.REDUCE


_LONG_LIST = pickle.EMPTY_LIST + pickle.MARK + pickle.NONE * 100_000 + pickle.APPENDS + pickle.BINPUT + b"\0"
_COPIES = (pickle.BINGET + b"\1" + pickle.BINGET + b"\0" + pickle.TUPLE1 + pickle.REDUCE + pickle.POP) * 100_000
BOMBS = {
    "bytearray of a size": _call("bytearray", pickle.dumps(10**10, 2)[2:-1]),
    "length of a bytearray": pickle.BYTEARRAY8 + struct.pack("<Q", 10**12),
    "length of bytes": pickle.BINBYTES8 + struct.pack("<Q", 10**12),
    "length of a text": pickle.BINUNICODE8 + struct.pack("<Q", 10**12),
    "length of a frame": pickle.FRAME + struct.pack("<Q", 10**12),
    "index into the memo": pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + b"x",
    "text of text": _call("str", pickle.EMPTY_LIST),
    "number from text": _call("int", pickle.SHORT_BINUNICODE + b"\x019"),
    "copies of a list": _LONG_LIST + _global("builtins", "set") + pickle.BINPUT + b"\1" + _COPIES,
    "empty sets": pickle.EMPTY_SET * 200_000,
    "nested tuples as a key": pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.TUPLE1 * 10**6 + b"Ns",
    "a changed class": _global("builtins", "set") + pickle.EMPTY_DICT + pickle.BUILD,
    "an instruction of Python 2": pickle.MARK + pickle.INST + b"builtins\nset\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(name: str, tmp_path: Path, monkeypatch) -> None:
    if name == "empty sets":
        monkeypatch.setattr(unpickle, "_MAX_VALUES", 100_000)
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\4" + BOMBS[name] + pickle.STOP)
    with pytest.raises(RefusedError, match=r"\.metadata: (refused|damaged)"):
        read_metadata(tmp_path)


def test_plain_values_of_every_kind_come_back() -> None:
    values = [{1, 2}, frozenset({3}), slice(1, 2), bytearray(b"ab"), 1 + 2j, {"a": (1, (2, (3,)))}, b"x", [None, True]]
    for protocol in (2, 4, 5):
        expected = [value for value in values if protocol > 2 or not isinstance(value, bytes | bytearray)]
        assert PlainUnpickler(pickle.dumps(expected, protocol)).load() == expected


def _torch_file(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def test_tensors_with_impossible_shapes_are_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(torch.zeros(3, 2), content)
    for shape in (b"K\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"N"):
        damaged = content.getvalue().replace(b"K\x03K\x02\x86", shape + b"K\x02\x86", 1)
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(RefusedError):
            open_torch_file(tmp_path / "x.pt")


def test_a_file_in_memory_equals_what_was_saved(tmp_path: Path) -> None:
    saved = {"a": [torch.arange(6).view(2, 3), (1, "x")], "b": {"c": torch.tensor(2.5)}, "d": None}
    found = load_torch_file(_torch_file(tmp_path / "x.pt", saved))
    assert torch.equal(found["a"][0], saved["a"][0])
    assert (found["a"][1], found["d"], found["b"]["c"].item()) == ((1, "x"), None, 2.5)


def test_objects_and_endless_lists_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"holds pathlib\.\w+Path, which no checkpoint needs"):
        load_torch_file(_torch_file(tmp_path / "x.pt", {"a": Path("b")}))
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(RefusedError, match="RecursionError"):
        load_torch_file(_torch_file(tmp_path / "y.pt", endless))
