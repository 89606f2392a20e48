"""Errors of the operating system during a conversion: one message without traceback, and the work can be resumed."""

from __future__ import annotations

import errno
import functools
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.manifest import find_faults
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.convert.verify import verify_tensors
from megatron_cpt.errors import CptError, RefusedError
from tests.helpers.command import run_command
from tests.helpers.hf_models import save_hf_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a tiny model in several shards, with a tokenizer file that is larger than any of its tensors."""
    folder = save_hf_model(tmp_path_factory.mktemp("hf") / "llama", "llama", max_shard_size="60KB")
    (folder / "tokenizer.json").write_text(" " * 300_000)
    return folder


@pytest.fixture(scope="module")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "c"
    import_checkpoint(hf, path)
    return path


def run_limited(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `megatron-cpt convert` in a process that may write no file larger than `limit` bytes."""
    prepare = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    return run_command(["convert", *arguments], prepare=prepare)


@pytest.mark.parametrize("kind", ["import", "export"])
@pytest.mark.parametrize("limit", [10_000, 200_000], ids=["weights", "tokenizer"])
def test_a_limit_on_file_sizes(tmp_path: Path, hf: Path, checkpoint: Path, kind: str, limit: int) -> None:
    source, aside = (hf, tmp_path / ".out.tmp") if kind == "import" else (checkpoint, tmp_path / "out.partial")
    arguments = (kind, str(source), str(tmp_path / "out"), "--shard-size", "30KB")
    ended = run_limited(limit, *arguments)
    assert ended.returncode == 1
    named = "tokenizer.json" if limit == 200_000 else ".distcp" if kind == "import" else ".safetensors"
    (line,) = ended.stderr.splitlines()
    assert f"{named}: File too large; raise the limit on file sizes (ulimit -f)" in line
    assert f"Finished parts are kept in {aside}; run the same command again to resume" in line
    assert not (tmp_path / "out").exists()

    if kind == "import":
        report = import_checkpoint(source, tmp_path / "out", ImportOptions(target=Target(shard_bytes=30_000)))
        assert not find_faults(tmp_path / "out")
    else:
        report = export_checkpoint(source, tmp_path / "out", ExportOptions(shard_bytes=30_000))
    assert (report.num_kept > 0) == (limit == 200_000)
    pair = (hf, tmp_path / "out") if kind == "import" else (tmp_path / "out", checkpoint)
    assert verify_tensors(*pair, advance=lambda _, __: None).is_equal
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def call_after_12_steps(action: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a progress callback that runs `action` at its 12th call."""
    calls = []

    def advance(count: int, _: int) -> None:
        calls.append(count)
        if len(calls) == 12:
            action()

    return advance


def test_a_source_that_vanishes(tmp_path: Path, hf: Path) -> None:
    options = ImportOptions(target=Target(shard_bytes=1), workers=1)
    away = hf.with_name("away")
    with pytest.raises(
        CptError, match=r"\.safetensors: No such file.*do not move or delete files.*again to resume"
    ) as error:
        import_checkpoint(hf, tmp_path / "c", options, advance=call_after_12_steps(lambda: hf.rename(away)))
    assert error.value.exit_status == 1
    away.rename(hf)
    assert import_checkpoint(hf, tmp_path / "c", options).num_kept > 5
    assert verify_tensors(hf, tmp_path / "c", advance=lambda _, __: None).is_equal


@pytest.mark.parametrize("side", ["hf", "checkpoint"])
def test_a_block_that_cannot_be_read(hf: Path, checkpoint: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's error names no file, our message does."""
    bad, real = (".safetensors" if side == "hf" else ".distcp"), os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        is_rows = buffers[0].nbytes % (48 * 4) == 0  # rows of 48 numbers; headers and metadata have other sizes
        if is_rows and os.readlink(f"/proc/self/fd/{fd}").endswith(bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CptError, match=rf"{bad}: Input/output error; the disk does not") as error:
        verify_tensors(hf, checkpoint, advance=lambda _, __: None)
    assert error.value.exit_status == 1


def test_a_source_that_is_refused_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(checkpoint), str(broken)], check=True)
    data = bytearray((broken / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "__0_0.distcp").write_bytes(data)
    with pytest.raises(RefusedError, match=r"__0_0\.distcp: checksum differs"):
        export_checkpoint(broken, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
