"""A cache made at TP 2 serves a run at PP 2 with another seed and blend, and gives the losses of the teacher itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.data import IndexedDatasetWriter
from megatron_cpt.data.teacher_cache.cache_header import HEADER_FILE, file_name
from megatron_cpt.errors import CptError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import read_metrics, train_here

LENGTH = 32
SPANS = 20


def write_run(folder: Path, base: Path) -> Path:
    """Write a run.yaml whose files have no token to spare, so that samples are the windows of a teacher."""
    rng = np.random.default_rng(0)
    for name in ("web", "code"):
        with IndexedDatasetWriter(str(folder / name), np.uint16) as writer:
            for tokens in (100, SPANS * LENGTH + 1 - 100):
                writer.add_document((np.cumsum(rng.integers(0, 3, tokens)) % 256).astype(np.uint16))
    run = yaml.safe_load((base / "run.yaml").read_text())
    del run["stop_at_step"]  # of the base run
    run |= {
        "output": str(folder / "out"),
        "init": {"from": str(base)},
        "sources": {name: {"path": str(folder / name)} for name in ("web", "code")},
        "phases": [{"name": "all", "blend": {"web": 0.5, "code": 0.5}}],
        "tokens": 3 * 8 * LENGTH,
        "checkpoint": {"at_end": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def teach(
    run_file: str,
    teacher: str,
    cache: str,
    overrides: Sequence[str],
    num_batches: int | None = None,
) -> None:
    """Make a cache; with `num_batches` an error ends it after so many batches of one row."""
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.teach import make_cache
    from megatron_cpt.teach.cache_plan import TeachOptions

    if num_batches is not None:
        make_cache._ROWS_IN_FLIGHT = 1
    calls = []

    def advance(done: int, total: int) -> None:
        calls.append(done)
        assert done <= total
        if len(calls) == num_batches:
            raise CptError("interrupted")

    prepared = prepare_run(run_file, need_files=False)
    options = TeachOptions(257, stride=LENGTH, overrides=overrides)
    make_cache.make_cache(teacher, prepared, cache, options, advance=advance)


def teach_and_train(run_file: str, teacher: str, folder: str) -> None:
    """Make a cache at TP 2, then train at PP 2 with it and with the teacher itself."""
    teach(run_file, teacher, f"{folder}/cache", ["parallel.tensor=2"])
    changes = ["parallel.pipeline=2", "seed=2", "phases=[{name: all, blend: {web: 0.25, code: 0.75}}]"]
    for name, section in (("cached", f"cache: {folder}/cache"), ("online", f"from: {teacher}")):
        words = [*changes, f"output={folder}/{name}", f"teacher={{{section}, weight: 0.5, sources: {{web: 0.5}}}}"]
        assert train_here(run_file, words) == 0


@pytest.fixture(scope="module")
def taught_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("teach"), base)


@pytest.fixture(scope="module")
def teacher(taught_run: Path) -> Path:
    """A run whose weights differ from the start of the student."""
    output = taught_run.parent / "teacher"
    run_ranks(1, train_here, str(taught_run), [f"output={output}", "checkpoint.at_end=true", "schedule.max_lr=0.01"])
    return output


def test_a_cache_serves_another_layout_seed_and_blend(taught_run: Path, teacher: Path, tmp_path: Path) -> None:
    run_ranks(2, teach_and_train, str(taught_run), str(teacher), str(tmp_path))
    cached, online = read_metrics(tmp_path / "cached"), read_metrics(tmp_path / "online")
    assert len(cached) == len(online) == 3
    assert cached[0]["loss"] == online[0]["loss"]
    assert online[0]["kl"] > 1e-2
    for one, other in zip(cached, online, strict=True):
        for key in ("kl_by_source", "loss_by_source"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_an_interrupted_call_resumes_with_equal_bytes(
    taught_run: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, teach, str(taught_run), str(teacher), str(tmp_path / "whole"), [])
    with pytest.raises(AssertionError, match="interrupted"):
        run_ranks(1, teach, str(taught_run), str(teacher), str(tmp_path / "cache"), [], 1)
    partial = tmp_path / "cache.partial"
    records = partial / file_name(0)
    content = bytearray(records.read_bytes())
    assert content != (tmp_path / "whole" / file_name(0)).read_bytes()
    content[1000] ^= 1  # and a disk that lost something
    records.write_bytes(content)
    run_ranks(1, teach, str(taught_run), str(teacher), str(tmp_path / "cache"), [])
    assert not partial.exists()
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted([file_name(0), file_name(1), HEADER_FILE])
    for name in names:
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    # the same command again has nothing to do; another one does not touch the cache
    words = [
        "teach",
        str(teacher),
        "--run",
        str(taught_run),
        "--output",
        str(tmp_path / "cache"),
        "--stride",
        str(LENGTH),
    ]
    assert main([*words, "--top-k", "257"]) == 0
    assert "no new ones" in capsys.readouterr().out
    assert main([*words, "--top-k", "9"]) == 2
    assert "is a cache of another teacher, other files or other options" in capsys.readouterr().err
    assert main([*words, "--top-k", "258"]) == 2
    assert "give 1 to 257" in capsys.readouterr().err


def test_plan_writes_nothing(
    taught_run: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teach", str(teacher), "--run", str(taught_run), "--output", str(tmp_path / "cache"), "--plan"]
    assert main(words) == 0
    assert "1.28K tokens of 2 files x 262 bytes (top 64 of 257) = 335 KB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_become_the_cache(
    taught_run: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    run_ranks(1, teach, str(taught_run), str(teacher), str(whole), [])
    os.truncate(whole / file_name(1), 1000)
    with pytest.raises(AssertionError, match="it was cut or replaced"):
        run_ranks(1, teach, str(taught_run), str(teacher), str(whole), [])
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(AssertionError, match="is a link, which the finished cache cannot replace"):
        run_ranks(1, teach, str(taught_run), str(teacher), str(link), [])
    (checkpoint,) = (teacher / "checkpoints").glob("step-*")
    with pytest.raises(AssertionError, match="is an input; choose another output"):
        run_ranks(1, teach, str(taught_run), str(teacher), str(checkpoint / "cache"), [])
    assert not list(tmp_path.glob("*.partial"))


def test_a_refused_teacher_leaves_nothing(taught_run: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"model\.layers=8: not possible here"):
        run_ranks(1, teach, str(taught_run), str(teacher), str(tmp_path / "cache"), ["model.layers=8"])
    assert not list(tmp_path.iterdir())
