"""Distillation equals plain PyTorch over transformers' models in every layout, and leaves the rest of a run alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.errors import CptError
from megatron_cpt.provenance.trace import trace_step
from tests.helpers.checkpoints import differing
from tests.helpers.hf_models import save_hf_model
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, small_run, train_here
from tests.reference.loop import Settings, Step, train

STEPS, BATCH, LENGTH = 4, 8, 32
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"alone": []},
    4: {"tp2-pp2": ["parallel={tensor: 2, pipeline: 2, sequence: true}"]},
}
LONG_LAYOUTS = {
    2: {
        "tp2": ["parallel={tensor: 2}"],
        "pp2": ["parallel.pipeline=2"],
        "vpp": ["parallel={pipeline: 2, virtual_pipeline: 2}", "batch.micro=1"],
        "dp2": [],
    },
    4: {
        "tp2-dp2": ["parallel={tensor: 2, sequence: true}"],
        "pp2-dp2": ["parallel.pipeline=2"],
        "whole": [*LAYOUTS[4]["tp2-pp2"], "teacher.tensor=1", "teacher.pipeline=1"],
        "last-stage": [*LAYOUTS[4]["tp2-pp2"], "teacher.pipeline=1"],
    },
}
SETTINGS = Settings(
    steps=STEPS,
    max_lr=1e-3,
    min_lr=1e-5,
    eps=1e-5,
    reset_attention=True,
    eod_loss=False,
    teacher_weights={"web": 0.6, "code": 0.3},
    temperature=2.0,
)
# Another width and depth than the student: 6 layers are [2, 2, 1, 1] in four chunks. The embeddings are tied.
TEACHER_SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 8}
FROM_OTHER = "documents={eod_id: 256, reset_attention: true, eod_loss: false}"
FROM_INIT = ["teacher={from: init}", "stop_at_step=2"]


def _prepare(root: Path) -> Path:
    """Import student and teacher from Hugging Face models, and write the run.yaml."""
    for name, family, sizes in (("base", "llama", {"num_hidden_layers": 4}), ("other", "qwen2", TEACHER_SIZES)):
        import_checkpoint(
            save_hf_model(root / f"{name}-hf", family, seed=len(name), vocab_size=301, **sizes),
            root / name,
            ImportOptions(),
        )
    run_file = small_run(
        root,
        tokens=STEPS * BATCH * LENGTH,
        init={"from": str(root / "base")},
        schedule={"shape": "cosine", "max_lr": SETTINGS.max_lr, "min_lr": SETTINGS.min_lr},
        optimizer={"eps": SETTINGS.eps},
        teacher={"from": str(root / "other"), "weight": 0.6, "temperature": 2.0, "sources": {"code": 0.5, "qa": 0.0}},
    )
    run = yaml.safe_load(run_file.read_text())
    del run["model"]  # taken from the checkpoint
    run_file.write_text(yaml.safe_dump(run, sort_keys=False))
    return run_file


def _train_in(root: Path, layouts_by_ranks: dict[int, dict[str, list[str]]]) -> None:
    for num_ranks, layouts in layouts_by_ranks.items():
        runs = []
        for name, changes in layouts.items():
            runs.append([FROM_OTHER, *changes, f"output={root}/other-{name}"])
            runs.append([*FROM_INIT, *changes, f"output={root}/init-{name}"])
        run_ranks(num_ranks, _train_all, str(root / "run.yaml"), runs, timeout=900)


def _train_all(path: str, runs: Sequence[Sequence[str]]) -> None:
    for overrides in runs:
        train_here(path, overrides)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both checkpoints and the run.yaml."""
    folder = tmp_path_factory.mktemp("distill")
    _prepare(folder)
    return folder


@pytest.fixture(scope="module")
def root(prepared: Path) -> Path:
    """Train in `LAYOUTS`, from another teacher and from the student's start; return the folder."""
    _train_in(prepared, LAYOUTS)
    return prepared


@pytest.fixture(scope="module")
def long_root(root: Path) -> Path:
    """Train also in `LONG_LAYOUTS`."""
    _train_in(root, LONG_LAYOUTS)
    return root


def _assert_equal_to_plain_pytorch(root: Path, layouts_by_ranks: dict[int, dict[str, list[str]]]) -> None:
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(root / f"{name}-hf", dtype=torch.float32, attn_implementation="eager")
        for name in ("base", "other")
    )
    traces = [trace_step(root / "other-alone", step) for step in range(1, STEPS + 1)]
    steps = [Step(trace.phase, [sample.to_dict() for sample in trace.samples]) for trace in traces]
    reference = train(student.train(), steps, SETTINGS, teacher.eval())
    weights = {name: tensor.detach() for name, tensor in student.state_dict().items()}
    assert reference.divergences[-1]["web"] < reference.divergences[0]["web"], "it must learn from the teacher"
    for layout in (name for layouts in layouts_by_ranks.values() for name in layouts):
        output = root / f"other-{layout}"
        lines = read_metrics(output)
        assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=1e-5), layout
        assert [line["grad_norm"] for line in lines] == pytest.approx(reference.grad_norms, rel=1e-5), layout
        for line, by_source, divergences in zip(lines, reference.by_source, reference.divergences, strict=True):
            assert line["loss_by_source"] == pytest.approx(by_source, rel=1e-5), layout
            assert line["kl_by_source"] == pytest.approx(divergences, rel=1e-5), layout
        for name, tensor in _export(output).items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5, msg=f"{layout}: {name}")


def _export(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    export_checkpoint(newest(output), output / "hf", ExportOptions())
    exported = {
        name: tensor for file in (output / "hf").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert exported
    return exported


def _assert_zero_from_own_start(root: Path, layouts_by_ranks: dict[int, dict[str, list[str]]]) -> None:
    for layout in (name for layouts in layouts_by_ranks.values() for name in layouts):
        first, second = read_metrics(root / f"init-{layout}")
        assert abs(first["kl"]) <= 1e-6, layout
        assert set(first["kl_by_source"]) == set(first["loss_by_source"]), layout
        assert second["kl"] > 1e-4, f"{layout}: after an update the student differs from its start"


def test_training_equals_plain_pytorch(root: Path) -> None:
    _assert_equal_to_plain_pytorch(root, LAYOUTS)


def test_the_divergence_from_the_own_start_is_zero(root: Path) -> None:
    _assert_zero_from_own_start(root, LAYOUTS)


@pytest.mark.long
def test_training_in_long_layouts_equals_plain_pytorch(long_root: Path) -> None:
    _assert_equal_to_plain_pytorch(long_root, LONG_LAYOUTS)


@pytest.mark.long
def test_the_divergence_from_the_own_start_is_zero_in_long_layouts(long_root: Path) -> None:
    _assert_zero_from_own_start(long_root, LONG_LAYOUTS)


def test_weight_zero_changes_no_bit(prepared: Path) -> None:
    model = "model={preset: tiny_llama, vocab: 301, hidden_dropout: 0.1, attention_dropout: 0.1}"
    common = [model, "init.from=null", "stop_at_step=2"]
    runs = [
        [*common, "teacher=null", f"output={prepared}/none"],
        [*common, "teacher.weight=0.0", f"output={prepared}/measured"],
    ]
    run_ranks(1, _train_all, str(prepared / "run.yaml"), runs)
    assert differing(newest(prepared / "none"), newest(prepared / "measured")) == []
    without, measured = (read_metrics(prepared / name) for name in ("none", "measured"))
    assert "kl" not in without[0]
    assert measured[0]["kl"] > 0.1
    for key in ("loss", "loss_by_source", "grad_norm"):
        assert [line[key] for line in without] == [line[key] for line in measured]


def _refusals(path: str, runs: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Return exit status and message of each run that is refused; status 0 and no message if it trains."""
    found = []
    for overrides in runs:
        try:
            found.append((train_here(path, overrides), ""))
        except CptError as error:
            found.append((error.exit_status, str(error)))
    return found


def test_a_teacher_that_does_not_fit_is_refused(prepared: Path) -> None:
    run_file, other, damaged = str(prepared / "run.yaml"), prepared / "other", prepared / "damaged"
    shutil.copytree(other, damaged)
    shard = next(damaged.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    hf = shutil.copytree(prepared / "other-hf", prepared / "nan-hf")
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    import_checkpoint(hf, prepared / "nan", ImportOptions(allow_nan=True))
    moved = prepared / "moved"
    shutil.copytree(other, moved)
    resumed = [f"output={prepared}/resumed", f"teacher.from={other}"]
    small = "model={preset: tiny_llama, vocab: 257}"
    runs = [
        [f"output={prepared}/missing", "teacher.from=nowhere"],
        [f"output={prepared}/vocabulary", small, "init.from=null"],
        [f"output={prepared}/corrupt", f"teacher.from={damaged}"],
        [f"output={prepared}/nan-teacher", f"teacher.from={prepared / 'nan'}"],
        [*resumed, "stop_at_step=1"],
        [*resumed, "stop_at_step=2", f"teacher.from={moved}"],
        [*resumed, "stop_at_step=3", f"teacher.from={prepared / 'base'}"],
    ]
    (found,) = run_ranks(1, _refusals, run_file, runs)
    assert [status for status, _ in found] == [2, 3, 3, 3, 0, 0, 3]
    assert "teacher.from: nowhere: no such checkpoint" in found[0][1]
    assert "its vocabulary has 301 ids, model.vocab is 257" in found[1][1]
    assert "damaged" in found[2][1]
    assert "corrupt" in found[2][1]
    assert "final_layernorm.weight: holds weights that are not finite" in found[3][1]
    assert "teacher: content" in found[6][1]
    assert "to resume anyway: --allow teacher" in found[6][1]
    for name in ("missing", "vocabulary", "corrupt", "nan-teacher"):
        assert not (prepared / name / "run.yaml").exists(), "nothing is written"
