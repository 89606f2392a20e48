"""More than 4 GB of state, saved at TP 2 x PP 2 and loaded at TP 1 x PP 1 with hardly any extra memory."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, small_run, train_here

GIB = 1 << 30
MODEL = "model={layers: 12, hidden: 1408, ffn_hidden: 5632, heads: 16, vocab: 8192}"  # 309 M parameters, 14 bytes each


@pytest.mark.long
def test_a_large_checkpoint_is_loaded_in_another_layout_without_a_second_copy(tmp_path: Path) -> None:
    overrides = [MODEL, "precision.compute=bf16", "batch.global=2", "batch.micro=1", "stop_at_step=1"]
    path = small_run(tmp_path)
    saved, again = tmp_path / "saved", tmp_path / "again"
    four = [*overrides, f"output={saved}", "parallel={tensor: 2, pipeline: 2}"]
    run_ranks(4, train_here, str(path), four, timeout=1200)
    size = sum(file.stat().st_size for file in newest(saved).iterdir())
    assert size > 4 * GIB
    ((before, after, kept),) = run_ranks(1, _load_and_save, str(path), [*overrides, f"output={saved}"], str(again))
    print(
        f"{size / GIB:.2f} GiB: {kept / GIB:.2f} GiB held by the model, {(after - before) / GIB:+.2f} GiB at the peak"
    )
    # A load reads into the tensors of model and optimizer; beside them it needs a few buffers only.
    assert after - before < kept + 0.15 * size
    assert _checksums(newest(saved)) == _checksums(again / "checkpoints" / "step-00000001")


def _load_and_save(path: str, overrides: list[str], target: str) -> tuple[int, int, int]:
    """Return the resident bytes before a load, at its peak, and the bytes of model and optimizer."""
    from megatron_cpt.backend import process_groups
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.run_files import record
    from megatron_cpt.train.setup import setup

    prepared = prepare_run(path, overrides, need_files=True)
    with process_groups(prepared.config.parallel) as ranks:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = _peak()
        session = setup(prepared.config, prepared.plan, ranks, eod_id=None)
        after, held = _peak(), _held()
        folder = Path(target) / "checkpoints"
        save_checkpoint(folder, session.state.step, session.model.chunks, session.optimizer, record(session))
        session.saver.close()
    return before, after, held


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def _held() -> int:
    """Return the bytes in the storages of all tensors."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield one tensor after the other, so that this process stays small."""
    import torch.distributed.checkpoint as dcp

    for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("rng."):
            one = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
            dcp.load(one, storage_reader=dcp.FileSystemReader(path), no_dist=True)
            yield name, one[name]


def _checksums(path: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in _tensors(path)
    }
