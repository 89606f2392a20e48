"""Verification at a start: damaged shards, records and tokenizers, also if only one rank meets them."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_cpt.checkpoint.manifest import sample
from megatron_cpt.errors import CptError
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, train_here, train_several


@pytest.fixture
def damaged(base: Path, tmp_path: Path) -> Path:
    """Return a checkpoint with one bit flipped in the shard that a sampled verification skips."""
    copy = tmp_path / newest(base).name
    shutil.copytree(newest(base), copy)
    shards = sorted(path.name for path in copy.glob("__*"))
    (unseen,) = set(shards) - sample(copy, shards)
    content = bytearray((copy / unseen).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / unseen).write_bytes(content)
    return copy


def test_full_refuses_what_sampled_and_none_pass_over_by_design(run_file: Path, damaged: Path, tmp_path: Path) -> None:
    start = [f"init.from={damaged}", "stop_at_step=1"]
    with pytest.raises(RankError, match=r"CorruptCheckpointError: .*corrupt: __0_\d\.distcp: checksum differs"):
        run_ranks(1, train_here, str(run_file), [*start, f"output={tmp_path}/full"])
    assert not (tmp_path / "full").exists()
    others = [[*start, f"output={tmp_path}/{how}", f"checkpoint.verify={how}"] for how in ("sampled", "none")]
    assert run_ranks(1, train_several, str(run_file), others) == [[0, 0]]


def _write_tokenizer(path: Path, word: str) -> None:
    Tokenizer(WordLevel({"<unk>": 0, word: 1}, unk_token="<unk>")).save(str(path))


def test_another_tokenizer_under_the_same_name_is_refused(run_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    _write_tokenizer(path, "first")
    common = [f"output={tmp_path}/out", f"tokenizer=huggingface:{path}", "documents.eod_id=256"]
    run_ranks(1, train_here, str(run_file), [*common, "stop_at_step=1"])
    _write_tokenizer(path, "second")
    with pytest.raises(RankError, match=r"RefusedError[\s\S]*- tokenizer: content \w+ -> content \w+: ids may mean"):
        run_ranks(1, train_here, str(run_file), [*common, "stop_at_step=2"])
    run_ranks(1, train_here, str(run_file), [*common, "stop_at_step=2"], ["tokenizer"])
    common[1] = f"tokenizer=huggingface:{path.rename(tmp_path / 'elsewhere.json')}"
    run_ranks(1, train_here, str(run_file), [*common, "stop_at_step=3"])
    assert newest(tmp_path / "out").name == "step-00000003"


def test_damage_that_no_checksum_was_asked_for_is_refused_where_it_shows(
    run_file: Path, base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / newest(base).name
    shutil.copytree(newest(base), copy)
    metadata = copy / "metadata.json"
    metadata.write_text("[" + metadata.read_text()[1:])
    start = [f"init.from={copy}", "stop_at_step=1", f"output={tmp_path}/out", "checkpoint.verify=none"]
    with pytest.raises(RankError, match=r"RefusedError: .*metadata.json: missing or damaged"):
        run_ranks(1, train_here, str(run_file), start)
    (copy / "run.yaml").write_bytes(b"\t" + (copy / "run.yaml").read_bytes()[1:])
    with pytest.raises(RankError, match=r"RefusedError: damaged: .*run\.yaml"):
        run_ranks(1, train_here, str(run_file), start)


def _refusals(path: str, runs: Sequence[Sequence[str]]) -> list[str]:
    """Return the status or the error of each of several runs in the same processes."""
    found = []
    for overrides in runs:
        try:
            found.append(f"status {train_here(path, overrides)}")
        except CptError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


# Replacements have the same number of bytes, since sizes are compared in every mode.
RECORD_DAMAGE = [
    ("state.json", b'"data_fingerprints"', b'"data_fingerprintz"'),
    ("state.json", b'"samples_by_source"', b'"samples_by_sourcf"'),
    ("state.json", b'"layout"', b'"layouu"'),
    ("state.json", b'"train"', b'"traim"'),
    ("state.json", b'"step"', b'"stfp"'),
    ("state.json", b'"counts"', b'"countz"'),
    ("state.json", b'"sample"', b'"samplf"'),
    ("state.json", b"{", b"["),
    ("run.yaml", b"phases:", b"phasez:"),
    ("run.yaml", b"model:", b"mode,:"),
    ("run.yaml", b"seed", b"\xffeed"),
]


def test_a_damaged_record_is_refused_in_every_mode(run_file: Path, base: Path, tmp_path: Path) -> None:
    runs, expected = [], []
    for number, (name, before, after) in enumerate(RECORD_DAMAGE):
        output = tmp_path / str(number)
        shutil.copytree(base, output)
        file = newest(output) / name
        assert before in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(before, after, 1))
        runs += [[f"output={output}", "stop_at_step=5", f"checkpoint.verify={how}"] for how in ("none", "full")]
        expected += [name, f"no valid checkpoint: {newest(output).name}: {name}: checksum differs"]
    (found,) = run_ranks(1, _refusals, str(run_file), runs)
    for overrides, refusal, words in zip(runs, found, expected, strict=True):
        assert refusal.startswith("RefusedError: "), overrides
        assert words in refusal, overrides


def _train_beside_a_bad_block(path: str, overrides: Sequence[str], file: str, rank: int) -> list[str]:
    """Start a run in which one rank cannot read one file of a checkpoint."""
    import torch.distributed as dist

    def fail(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(f"/{file}"):
            raise OSError(errno.EIO, "Input/output error", str(arguments[0]))

    if dist.get_rank() == rank:
        sys.addaudithook(fail)
    return _refusals(path, [overrides])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
@pytest.mark.parametrize("file", ["common.pt", pytest.param(".metadata", marks=pytest.mark.long), "__0_0.distcp"])
def test_a_file_that_one_rank_cannot_read_ends_all_ranks_alike(
    run_file: Path, base: Path, tmp_path: Path, file: str, rank: int
) -> None:
    if not (newest(base) / file).exists():
        pytest.skip("megatron-core 0.19 keeps what is in common.pt in a shard")
    start = [f"init.from={newest(base)}", "stop_at_step=1", f"output={tmp_path}/out", "checkpoint.verify=none"]
    found = run_ranks(2, _train_beside_a_bad_block, str(run_file), start, file, rank, timeout=90)
    assert found[0] == found[1]
    (refusal,) = found[0]
    assert refusal.startswith(f"CptError: {newest(base) / file}: Input/output error")


def _find_late(run_directory: str, elsewhere: str) -> list[Any]:
    """Return what `find_valid` finds if rank 1 does not see the checkpoints yet."""
    import torch.distributed as dist

    from megatron_cpt.checkpoint import layout
    from megatron_cpt.checkpoint.loading.find_valid import find_valid

    if dist.get_rank() == 1:
        layout.list_checkpoints = lambda folder: []
    found: list[Any] = [find_valid(run_directory).path]
    try:
        find_valid(elsewhere)
    except CptError as error:
        found.append((type(error).__name__, str(error)))
    return found


def test_all_ranks_start_from_the_checkpoint_that_rank_0_sees(base: Path, tmp_path: Path) -> None:
    found = run_ranks(2, _find_late, str(base), str(tmp_path / "nowhere"), timeout=60)
    assert found[0] == found[1]
    path, (kind, message) = found[0]
    assert path == newest(base)
    assert kind == "UserError"
    assert "nowhere: no such checkpoint or run directory" in message
