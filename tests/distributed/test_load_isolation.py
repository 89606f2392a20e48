"""A load changes nothing in torch or megatron-core that other threads of the process use."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner, filesystem

from megatron_cpt.backend import process_groups
from megatron_cpt.prepare import prepare_run
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest

TIMEOUT = 60


def _owners() -> Iterator[Any]:
    """Yield the modules and classes that a load once replaced attributes of, and their relatives."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import cached_metadata_filesystem_reader
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.optimizer import distrib_optimizer, optimizer

    modules = (torch, torch.serialization, pickle, filesystem, default_planner, dcp, dist_checkpointing)
    yield from (*modules, torch_strategy, distrib_optimizer, optimizer, cached_metadata_filesystem_reader)
    for module in (filesystem, default_planner, torch_strategy, distrib_optimizer, optimizer, torch.serialization):
        yield from (value for value in vars(module).values() if isinstance(value, type))


def _attributes() -> dict[tuple[str, str], int]:
    """Return the identity of every attribute of these modules and classes."""
    found = {}
    for owner in _owners():
        name = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}:{owner.__qualname__}"
        found.update({(name, attribute): id(value) for attribute, value in list(vars(owner).items())})
    return found


def _changed(before: dict[tuple[str, str], int], after: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Return what differs; a module may gain names, since any thread may import a submodule of it."""
    modules = {owner for owner, _ in before if owner in sys.modules}
    keys = [key for key in {**before, **after} if key in before or key[0] not in modules]
    return sorted(key for key in keys if before.get(key) != after.get(key))


def _use_torch(folder: Path) -> None:
    """Load with torch what only an unpatched torch loads: objects of any class, and a checkpoint of other names."""
    assert torch.load(folder / "object.pt", weights_only=False) == {"third": Fraction(1, 3)}
    found = {"weight": torch.zeros(7), "object": None}
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder / "dcp"), no_dist=True)
    assert found["weight"].equal(torch.arange(7.0))
    assert found["object"] == Fraction(1, 3)
    metadata = dcp.FileSystemReader(folder / "dcp").read_metadata()
    assert set(metadata.state_dict_metadata) == {"weight", "object"}


def load_beside_torch(run: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Load a checkpoint while another thread uses torch; return what changed in the middle of the load and after it."""
    from megatron_cpt.checkpoint.loading.find_valid import find_valid
    from megatron_cpt.checkpoint.loading.load import load_training
    from megatron_cpt.model.build_model import build_model
    from megatron_cpt.optim.build_optimizer import build_optimizer

    is_reading, has_used_torch, is_loaded = threading.Event(), threading.Event(), threading.Event()
    in_the_middle: list[dict[tuple[str, str], int]] = []
    failures: list[BaseException] = []
    num_uses = 0

    def in_a_reading_thread(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event == "open" else ""
        if path.startswith(checkpoint) and path.endswith(".distcp") and not is_reading.is_set():
            in_the_middle.append(_attributes())
            is_reading.set()
            has_used_torch.wait(TIMEOUT)

    def use_torch() -> None:
        nonlocal num_uses
        try:
            while not is_loaded.is_set():
                was_reading = is_reading.is_set()
                _use_torch(Path(folder))
                num_uses += was_reading
                if was_reading:
                    has_used_torch.set()
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failures.append(error)
            has_used_torch.set()

    config = prepare_run(run, need_files=True).config
    with process_groups(config.parallel):
        chunks = build_model(config).chunks
        optimizer = build_optimizer(config.optimizer, config.schedule, config.parallel, config.precision, chunks)
        _use_torch(Path(folder))  # imports what it needs
        before = _attributes()
        sys.addaudithook(in_a_reading_thread)
        other = threading.Thread(target=use_torch)
        other.start()
        try:
            load_training(find_valid(checkpoint), chunks, optimizer, with_rng=True)
        finally:
            is_loaded.set()
            other.join()
    return {
        "failures": [repr(failure) for failure in failures],
        "uses": num_uses,
        "middle": [_changed(before, middle) for middle in in_the_middle],
        "after": _changed(before, _attributes()),
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_another_thread_sees_torch_and_megatron_core_unchanged(run_file: Path, base: Path, tmp_path: Path) -> None:
    torch.save({"third": Fraction(1, 3)}, tmp_path / "object.pt")
    state = {"weight": torch.arange(7.0), "object": Fraction(1, 3)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    (found,) = run_ranks(1, load_beside_torch, str(run_file), str(newest(base)), str(tmp_path))
    assert found["failures"] == []
    assert found["middle"], "no shard was read"  # one entry per thread that opened the first shards
    assert not any(found["middle"])
    assert found["after"] == []
    assert found["uses"] >= 1
