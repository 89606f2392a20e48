"""The proof of a growth in megatron-core, and training that starts from a grown model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import read_metrics, small_run, train_here, train_several

STEPS = 2
LARGER = {"hidden": 256, "ffn_hidden": 700, "heads": 16, "layers": 6}


def overrides(folder: Path, name: str, start: str, *more: str) -> list[str]:
    return [
        "schedule={shape: constant, max_lr: 1.0e-4, min_lr: 1.0e-4}",
        f"output={folder / name}",
        f"init={{from: {folder / start}, load: weights}}",
        *more,
    ]


def grow_and_train(folder: str) -> dict[str, Any]:
    """Train a small model for two steps, grow its run, and continue both on the same data."""
    from megatron_cpt.cli import main
    from megatron_cpt.transform.grow import growth_rules

    base = Path(folder)
    run, continued = str(base / "run.yaml"), str(base / "continue.yaml")
    found: dict[str, Any] = {"trained": train_here(run, [f"output={base / 'small'}"])}
    arguments = ["grow", str(base / "small"), "--to", str(base / "model.yaml")]
    found["grown"] = main([*arguments, "--output", str(base / "grown")])
    found["bf16"] = main([*arguments, "--output", str(base / "bf16"), "--dtype", "bf16"])
    found["continued"] = train_several(continued, [overrides(base, f"{name}-run", name) for name in ("small", "grown")])
    norm_rules = growth_rules._norm_rules
    growth_rules._norm_rules = lambda old, new, stream: {
        name: growth_rules.GrowthRule(stream, scale=2.0) for name in norm_rules(old, new, stream)
    }
    found["wrong rule"] = main([*arguments, "--output", str(base / "wrong")])
    return found


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("growth")
    phases = [{"name": "all", "blend": {"web": 0.6, "code": 0.4}}]
    schedule = {"shape": "constant", "max_lr": 1e-3, "min_lr": 1e-3}
    run = yaml.safe_load(small_run(folder, tokens=STEPS * 8 * 32, phases=phases, schedule=schedule).read_text())
    del run["model"]  # of the checkpoint that the run starts from
    (folder / "continue.yaml").write_text(yaml.safe_dump(run))
    (folder / "model.yaml").write_text(yaml.safe_dump(LARGER))
    return folder, run_ranks(1, grow_and_train, str(folder), timeout=1200)[0]


def test_the_proof_is_in_the_manifest(grown: tuple[Path, dict[str, Any]]) -> None:
    folder, found = grown
    assert (found["trained"], found["grown"], found["bf16"]) == (0, 0, 0)
    proof = json.loads((folder / "grown" / "manifest.json").read_text())["provenance"]["proof"]
    assert proof["relative_difference"] < proof["limit"] == 1e-5
    assert (proof["num_tokens"], proof["top1_agreement"]) == (54, 1.0)
    rounded = json.loads((folder / "bf16" / "manifest.json").read_text())["provenance"]["proof"]
    assert 1e-4 < rounded["relative_difference"] < rounded["limit"] == 0.1


def test_a_growth_that_changes_the_function_is_not_published(grown: tuple[Path, dict[str, Any]]) -> None:
    folder, found = grown
    assert found["wrong rule"] == 3
    assert not [path for path in folder.iterdir() if "wrong" in path.name]


def test_a_grown_model_trains_on_from_the_loss_of_the_small_one(grown: tuple[Path, dict[str, Any]]) -> None:
    folder, found = grown
    assert found["continued"] == [0, 0]
    small, large = (read_metrics(folder / f"{name}-run") for name in ("small", "grown"))
    assert large[0]["loss"] == pytest.approx(small[0]["loss"], rel=1e-5)
    assert large[1]["loss"] == pytest.approx(small[1]["loss"], rel=0.02)
    assert large[1]["loss"] != large[0]["loss"]


@pytest.mark.long
def test_every_layout_trains_the_grown_model(grown: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = grown
    layout = overrides(folder, "four-run", "grown", "parallel={tensor: 2, pipeline: 2}")
    assert run_ranks(4, train_several, str(folder / "continue.yaml"), [layout], timeout=1200) == [[0]] * 4
    one, four = (read_metrics(folder / f"{name}-run") for name in ("grown", "four"))
    assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], rel=1e-5)
