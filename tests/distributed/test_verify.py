"""What a start verifies, and that a tokenizer with another content is not taken for the same one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_cpt.checkpoint.manifest import sample
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, train_here, train_several


@pytest.fixture
def damaged(base: Path, tmp_path: Path) -> Path:
    """A checkpoint with one bit flipped in the shard that a sampled verification does not look at."""
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
    with pytest.raises(RankError, match=r"RefusedError: .*broken: __0_\d\.distcp: checksum differs"):
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
    metadata.write_text(metadata.read_text().replace("sharded_backend_version", "sharded_backend_versiom"))
    start = [f"init.from={copy}", "stop_at_step=1", f"output={tmp_path}/out", "checkpoint.verify=none"]
    with pytest.raises(RankError, match=r"RefusedError: .*does not fit this model: .*versiom"):
        run_ranks(1, train_here, str(run_file), start)
    (copy / "run.yaml").write_bytes(b"\t" + (copy / "run.yaml").read_bytes()[1:])
    with pytest.raises(RankError, match=r"RefusedError: damaged: .*run\.yaml"):
        run_ranks(1, train_here, str(run_file), start)
