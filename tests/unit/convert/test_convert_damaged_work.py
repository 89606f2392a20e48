"""Conversions: work of an interrupted call that is damaged, and sources that change while they are read."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from megatron_cpt.checkpoint.manifest import find_faults
from megatron_cpt.cli import main
from megatron_cpt.convert import exporter, importer, verify
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.huggingface import writer
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron import megatron_lm_export
from megatron_cpt.convert.megatron.megatron_lm_export import export_megatron_lm
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.errors import UserError
from megatron_cpt.files.identity import ChangedFileError
from tests.helpers.damage import DAMAGES, draw_examples, files_below, harm
from tests.helpers.hf_models import save_hf_model

EXAMPLES = [4, pytest.param(100, marks=pytest.mark.long)]


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_model(tmp_path_factory.mktemp("hf") / "mistral", "mistral", max_shard_size="60KB")


@pytest.fixture(scope="module")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "step-00000001"
    import_checkpoint(hf, path, ImportOptions(target=Target(shard_bytes=1)))
    return path


def do_import(hf: Path, checkpoint: Path, target: Path) -> int:
    return import_checkpoint(hf, target, ImportOptions(target=Target(shard_bytes=1), workers=1)).num_kept


def do_export(hf: Path, checkpoint: Path, target: Path) -> int:
    return export_checkpoint(checkpoint, target, ExportOptions(shard_bytes=60_000, workers=1)).num_kept


def do_export_megatron(hf: Path, checkpoint: Path, target: Path) -> int:
    export_megatron_lm(checkpoint, target, verify="none", workers=1)
    return 1


CONVERSIONS: dict[str, Callable[[Path, Path, Path], int]] = {
    "import": do_import,
    "export": do_export,
    "export to Megatron-LM": do_export_megatron,
}


def work_folder(kind: str, target: Path) -> Path:
    return target.with_name("out.partial") if kind == "export" else target.with_name(".out.tmp")


def call_after(count: int, function: Callable, action: Callable[[], None]) -> Callable:
    """Return a function that calls `action` once, before the call with this number."""
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            action()
        return function(*arguments, **options)

    return wrapped


def kill() -> None:
    raise Killed


def interrupt(kind: str, hf: Path, checkpoint: Path, target: Path) -> None:
    """Leave the work folder of a conversion that died in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_SYNC_BYTES", 1)
        for module, name in (
            (importer, "write_file"),
            (exporter, "read_block"),
            (megatron_lm_export, "copy_file"),
        ):
            patch.setattr(module, name, call_after(6, getattr(module, name), kill))
        with pytest.raises(Killed):
            CONVERSIONS[kind](hf, checkpoint, target)


def assert_equal(kind: str, first: Path, second: Path) -> None:
    """Compare all files byte for byte, except pickles and the manifest with their checksums, which is verified."""
    names = {path.relative_to(first).as_posix() for path in files_below(first)}
    assert names == {path.relative_to(second).as_posix() for path in files_below(second)}
    _, differing, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not errors
    assert {Path(name).name for name in differing} <= {".metadata", "common.pt", "manifest.json"}
    if kind == "import":
        assert find_faults(second) == []


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_goes_on_from_damaged_work_to_the_same_files(hf, checkpoint, tmp_path, kind, examples):
    (tmp_path / "quiet").mkdir()
    CONVERSIONS[kind](hf, checkpoint, tmp_path / "quiet" / "out")
    (tmp_path / "work").mkdir()
    target = tmp_path / "work" / "out"
    interrupt(kind, hf, checkpoint, target)
    shutil.copytree(tmp_path / "work", tmp_path / "copy")
    assert CONVERSIONS[kind](hf, checkpoint, target) > 0  # intact work is kept

    def check(data: st.DataObject) -> None:
        shutil.rmtree(tmp_path / "work")
        shutil.copytree(tmp_path / "copy", tmp_path / "work")
        harm(data.draw(st.sampled_from(files_below(work_folder(kind, target)))), data)
        try:
            CONVERSIONS[kind](hf, checkpoint, target)
        except UserError as error:  # without its settings the folder may be anybody's
            assert "holds files of something else" in str(error)  # noqa: PT017 - several outcomes are right
            shutil.rmtree(work_folder(kind, target))
            CONVERSIONS[kind](hf, checkpoint, target)
        assert_equal(kind, tmp_path / "quiet" / "out", target)

    draw_examples(check, examples)


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_kept_shard_is_compared(hf, checkpoint, tmp_path, kind, damage, caplog):
    (tmp_path / "quiet").mkdir()
    CONVERSIONS[kind](hf, checkpoint, tmp_path / "quiet" / "out")
    interrupt(kind, hf, checkpoint, tmp_path / "out")
    for path in files_below(work_folder(kind, tmp_path / "out")):
        if path.suffix in (".distcp", ".safetensors"):
            DAMAGES[damage](path, path.stat().st_size // 2)
    CONVERSIONS[kind](hf, checkpoint, tmp_path / "out")
    assert_equal(kind, tmp_path / "quiet" / "out", tmp_path / "out")
    if kind != "export to Megatron-LM":
        assert "written again" in caplog.text


def replace(path: Path) -> None:
    """Replace a file by one of equal size and time."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-8:] = bytes(8)
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("file", ["weights", "config"])
@pytest.mark.parametrize("kind", ["import", "verify"])
def test_a_hugging_face_folder_that_changes_is_named(hf, checkpoint, tmp_path, monkeypatch, capsys, kind, file):
    source = shutil.copytree(hf, tmp_path / "hf")
    path = sorted(source.glob("*.safetensors"))[0] if file == "weights" else source / "config.json"

    def change() -> None:
        if file == "weights":
            replace(path)
        else:
            path.write_text(path.read_text() + " ")

    monkeypatch.setattr(importer, "write_file", call_after(1, importer.write_file, change))
    monkeypatch.setattr(verify, "read_block", call_after(3, verify.read_block, change))
    target = checkpoint if kind == "verify" else tmp_path / "out"
    assert main(["convert", kind, str(source), str(target)]) == 3
    assert f"{path.name}: was " in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize("change", ["replace", "truncate", "remove"])
def test_a_checkpoint_that_changes_while_it_is_exported_is_named(checkpoint, tmp_path, monkeypatch, change):
    source = shutil.copytree(checkpoint, tmp_path / "step-00000001")
    path = sorted(source.glob("*.distcp"))[0]
    action = {"replace": lambda: replace(path), "truncate": lambda: os.truncate(path, 9), "remove": path.unlink}[change]
    monkeypatch.setattr(exporter, "read_block", call_after(9, exporter.read_block, action))
    with pytest.raises(ChangedFileError, match=rf"{path.name}: was (replaced|truncated|removed)"):
        export_checkpoint(source, tmp_path / "out", ExportOptions(workers=1))
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_shard_that_changes_while_it_is_copied_for_megatron_is_named(checkpoint, tmp_path, monkeypatch):
    source = shutil.copytree(checkpoint, tmp_path / "step-00000001")
    path = sorted(source.glob("*.distcp"))[0]
    copy = call_after(9, megatron_lm_export.copy_file, lambda: replace(path))
    monkeypatch.setattr(megatron_lm_export, "copy_file", copy)
    with pytest.raises(ChangedFileError, match=rf"{path.name}: was replaced"):
        export_megatron_lm(source, tmp_path / "out", verify="none")
    assert os.listdir(tmp_path) == ["step-00000001"]
