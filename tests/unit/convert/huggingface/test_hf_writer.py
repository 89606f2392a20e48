"""Writing Hugging Face folders: read back by safetensors and transformers, shards, threads, resuming after a crash."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from megatron_cpt.convert.huggingface import writer as hf_writer
from megatron_cpt.convert.huggingface.folder import HfFolder
from megatron_cpt.convert.huggingface.writer import HfWriter
from megatron_cpt.errors import UserError
from tests.helpers.command import run_forked
from tests.helpers.hf_models import build_hf_model, hf_tensors, tiny_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]


def plan_of(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def read_by_safetensors(folder):
    """Return every tensor, read by the safetensors package."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - not a dict
    return tensors


def same_bytes(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


def some_tensors():
    return {f"t{n}": torch.randn(n + 1, 3).to(DTYPES[n % 3]) for n in range(6)}


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    types=st.lists(st.sampled_from(DTYPES), min_size=8, max_size=8),
    shard_bytes=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_any_tensors_in_any_order_and_pieces(tmp_path_factory, shapes, types, shard_bytes, seed):
    path = tmp_path_factory.mktemp("writer") / "model"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"tensor.{n}": torch.randint(0, 99, shape, generator=generator).to(dtype)
        for n, (shape, dtype) in enumerate(zip(shapes, types, strict=False))
    }
    writer = HfWriter(path, plan_of(tensors), shard_bytes)
    for name in reversed(list(tensors)):
        tensor = tensors[name]
        if tensor.ndim and tensor.shape[0] > 1:
            cut = 1 + seed % (tensor.shape[0] - 1)
            writer.write_rows(name, cut, tensor[cut:])
            writer.write_rows(name, 0, tensor[:cut])
        else:
            writer.write_rows(name, 0, torch.atleast_1d(tensor))
    assert not path.exists()
    assert writer.finish() == path
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]

    found = read_by_safetensors(path)
    assert sorted(found) == sorted(tensors)
    assert all(same_bytes(found[name], tensor) for name, tensor in tensors.items())
    folder = HfFolder(path)
    assert all(same_bytes(folder.read(name), tensor) for name, tensor in tensors.items())
    sizes = {}
    for info in folder.tensors.values():
        sizes.setdefault(info.file, []).append(info.num_bytes)
    for held in sizes.values():
        assert sum(held) <= shard_bytes or sum(size > 0 for size in held) == 1


def test_names_and_index_are_those_that_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build_hf_model(tiny_config("qwen3"))
    tensors = hf_tensors(model)
    writer = HfWriter(tmp_path / "model", plan_of(tensors), shard_bytes=30_000)
    model.config.save_pretrained(writer.folder)
    for name, tensor in tensors.items():
        writer.write_rows(name, 0, tensor)
    folder = writer.finish()
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert set(index["weight_map"].values()) == set(files)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded.eval()(tokens).logits, AutoModelForCausalLM.from_pretrained(folder)(tokens).logits)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_small_model_is_one_file(tmp_path):
    writer = HfWriter(tmp_path / "model", {"w": ((2,), torch.float32)})
    writer.write_rows("w", 0, torch.ones(2))
    writer.finish()
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_an_unfinished_folder_is_not_published(tmp_path):
    writer = HfWriter(tmp_path / "model", {"w": ((4,), torch.float32), "v": ((1,), torch.float32)})
    writer.write_rows("w", 1, torch.ones(3))
    with pytest.raises(AssertionError, match="not written"):
        writer.finish()
    with pytest.raises(AssertionError, match="twice"):
        writer.write_rows("w", 3, torch.ones(1))
    with pytest.raises(AssertionError, match="planned"):
        writer.write_rows("v", 0, torch.ones(1, dtype=torch.bfloat16))
    assert not (tmp_path / "model").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    writer = HfWriter(tmp_path / "model", {"w": ((1,), torch.float32)})  # an empty folder is accepted
    writer.write_rows("w", 0, torch.ones(1))
    writer.finish()
    with pytest.raises(UserError, match="exists"):
        HfWriter(tmp_path / "model", {"w": ((1,), torch.float32)})


def test_threads_share_a_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "_SYNC_BYTES", 100)
    tensors = {f"t{n}": torch.randn(40, 5) for n in range(8)}
    writer = HfWriter(tmp_path / "model", plan_of(tensors), 3000)

    def work(offset):
        for name, tensor in tensors.items():
            for row in range(offset, 40, 4):
                writer.write_rows(name, row, tensor[row : row + 1])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_by_safetensors(writer.finish())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# ------------------------------------------------------------------------------------------ resuming


def _write_and_die(path: Path) -> None:
    hf_writer._SYNC_BYTES = 40
    torch.manual_seed(0)
    tensors = {f"t{n}": torch.randn(n + 1, 3) for n in range(6)}
    writer = HfWriter(path, plan_of(tensors), 100, source="a")
    for name in ["t0", "t1", "t2", "t3"]:
        writer.write_rows(name, 0, tensors[name])
    writer.write_rows("t4", 0, tensors["t4"][:2])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def work_of_a_killed_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    assert run_forked(_write_and_die, folder / "model").returncode == -9
    return folder / "model.partial"


@pytest.fixture
def killed(work_of_a_killed_process, tmp_path):
    """Return the target of a writer that was killed after 4.5 of 6 tensors, and the tensors."""
    shutil.copytree(work_of_a_killed_process, tmp_path / "model.partial")
    torch.manual_seed(0)
    return tmp_path / "model", {f"t{n}": torch.randn(n + 1, 3) for n in range(6)}


def test_a_killed_writer_is_continued(killed):
    path, tensors = killed
    assert not path.exists()
    writer = HfWriter(path, plan_of(tensors), 100, source="a")
    assert writer.done >= {"t1", "t2", "t3"}
    assert not writer.done & {"t4", "t5"}
    for name in tensors.keys() - writer.done:
        writer.write_rows(name, 0, tensors[name])
    found = read_by_safetensors(writer.finish())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_work_of_another_plan_or_source_is_discarded(killed):
    path, tensors = killed
    for max_bytes in (100, 200):
        assert HfWriter(path, plan_of(tensors), max_bytes, source="b").done == frozenset()
        gc.collect()  # the writer keeps its lock until then


def test_an_incomplete_line_of_the_journal_is_ignored(killed, monkeypatch):
    monkeypatch.setattr(hf_writer, "_SYNC_BYTES", 1)
    path, tensors = killed
    journal = path.with_name("model.partial") / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-3])
    writer = HfWriter(path, plan_of(tensors), 100, source="a")
    assert writer.done == {name for line in lines[1:-1] for name in json.loads(line)["value"]}
    for name in tensors.keys() - writer.done:
        writer.write_rows(name, 0, tensors[name])
    writer.close()
    assert HfWriter(path, plan_of(tensors), 100, source="a").done == tensors.keys()


def test_a_missing_shard_restarts_from_scratch(killed):
    path, tensors = killed
    os.unlink(next(path.with_name("model.partial").glob("*.safetensors")))
    assert HfWriter(path, plan_of(tensors), 100, source="a").done == frozenset()
