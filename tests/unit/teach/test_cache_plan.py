"""Plan of a cache: which files, how large, and options outside their range."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_cpt.config import RunConfig
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.errors import UserError
from megatron_cpt.prepare import load_run
from megatron_cpt.teach.cache_plan import CachePlan, TeachOptions, check_space, plan_cache
from tests.helpers.runs import small_run, write_source


def plan(run: RunConfig, **options: Any) -> CachePlan:
    saved: Any = SimpleNamespace(path=Path("runs/teacher"))
    return plan_cache(
        saved, run, run, TeachOptions(**options), digest="d", documents=DocumentOptions(), tokenizer_fingerprint=None
    )


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return small_run(tmp_path)


def load(path: Path, **changes: Any) -> RunConfig:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))
    return load_run(path)


def test_sources_with_a_teacher_are_taught(run_file: Path) -> None:
    assert [file.source for file in plan(load(run_file)).header.files] == ["web", "code", "qa"]
    section = {"cache": "cache", "weight": 0.0, "sources": {"code": 0}}
    with_teacher = load(run_file, teacher=section)
    assert [file.source for file in plan(with_teacher).header.files] == ["web", "qa"]
    assert [file.source for file in plan(with_teacher, sources=["code"]).header.files] == ["code"]


def test_a_shared_file_is_taught_once_and_a_short_one_not(run_file: Path) -> None:
    run = yaml.safe_load(run_file.read_text())
    folder = run_file.parent / "data"
    write_source(folder / "short", stride=1, documents=1)
    run["sources"]["code"]["path"] = [str(folder / "web"), str(folder / "short")]
    sources = load(run_file, sources=run["sources"], seq_length=512)
    assert [file.prefix.rpartition("/")[2] for file in plan(sources).header.files] == ["web", "qa"]


def test_size_and_work(run_file: Path) -> None:
    made = plan(load(run_file), sources=["web"])
    (file,) = made.header.files
    assert (made.header.window, made.header.stride) == (32, 16)
    assert made.header.num_bytes == (file.tokens - 1) * made.header.records.num_bytes
    assert made.forward_tokens == made.header.grid(0).num_windows * 32
    assert "1 file x" in made.describe()
    assert "FLOP, under 1s on one H100" in made.describe()
    larger = load(run_file, model={"preset": "nemotron4_15b", "vocab": 257}, precision={"compute": "bf16"})
    assert "FLOP, 2s on one H100" in plan(larger, sources=["web"]).describe()
    with pytest.raises(UserError, match="the disk has 10 bytes free"):
        check_space(made, Path("cache"), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k: 0"),
        ({"top_k": 10**6}, "--top-k: 1000000"),
        ({"window": 0}, "--window: 0"),
        ({"stride": 33}, "--stride: 33; give 1 to 32"),
        ({"stride": 0}, "--stride: 0"),
        ({"sources": ["wbe"]}, "--source: wbe; the run has web, code, qa"),
    ],
)
def test_options_outside_their_range_are_refused(run_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(load(run_file), **options)


def test_fill_in_middle_is_refused(run_file: Path) -> None:
    run = yaml.safe_load(run_file.read_text())
    run["sources"]["code"]["fim"] = {"rate": 0.5, "prefix_id": 1, "middle_id": 2, "suffix_id": 3}
    moved = load(run_file, sources=run["sources"], documents={"eod_id": 256})
    with pytest.raises(UserError, match=r"sources.code.fim: fill-in-the-middle moves tokens"):
        plan(moved)
    assert [file.source for file in plan(moved, sources=["qa"]).header.files] == ["qa"]
