"""Model fields of converted checkpoints train equally in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import read_metrics, small_run, train_several

MODELS = {
    "qwen3-like": {"preset": "tiny_llama", "layers": 2, "head_dim": 24, "qk_norm": True},
    "qwen2-like": {"preset": "tiny_llama", "layers": 2, "qkv_bias": True, "tied_embeddings": True},
    "nemotron-with-biases": {"preset": "tiny_nemotron", "layers": 2, "linear_bias": True},
}


@pytest.mark.parametrize(
    "name", ["qwen3-like", *(pytest.param(name, marks=pytest.mark.long) for name in MODELS if name != "qwen3-like")]
)
def test_losses_and_gradients_do_not_depend_on_the_layout(tmp_path: Path, name: str) -> None:
    run_file = small_run(tmp_path, model=MODELS[name], stop_at_step=3, output=str(tmp_path / "unused"))
    layouts = {
        "dp2": [],
        "tp2": ["parallel.tensor=2", "parallel.sequence=false"],
        "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
        "pp2": ["parallel.pipeline=2"],
    }
    runs = [[*changes, f"output={tmp_path / layout}"] for layout, changes in layouts.items()]
    run_ranks(2, train_several, str(run_file), runs)
    reference = read_metrics(tmp_path / "dp2")
    assert [line["step"] for line in reference] == [1, 2, 3]
    for layout in ("tp2", "tp2-sp", "pp2"):
        for a, b in zip(reference, read_metrics(tmp_path / layout), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), layout
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), layout
