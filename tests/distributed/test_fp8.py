"""Emulated FP8 in complete runs: equal in every layout, exact on a resume, and the effect of a lost history."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import differing
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, small_run, train_here, train_several

DELAYED = ["precision.fp8={backend: emulated, recipe: delayed, amax_history: 4}"]
TENSORWISE = ["precision.fp8={backend: emulated, recipe: tensorwise, first_last_bf16: 1}"]
LAYOUTS = {
    "dp2": [],
    "tp2": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2": ["parallel.pipeline=2"],
}


def _losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output)]


def _without_histories(path: str, overrides: list[str]) -> int:
    """Resume, but with the amax histories of the checkpoint set to zero."""
    import torch

    from megatron_cpt.checkpoint.state import state_dicts
    from megatron_cpt.model.fp8_emulated import EmulatedFp8

    load = state_dicts.load_model_state

    def load_and_forget(chunks, state):
        load(chunks, state)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, EmulatedFp8):
                    torch.nn.init.zeros_(module.amax_history)

    state_dicts.load_model_state = load_and_forget
    try:
        return train_here(path, overrides)
    finally:
        state_dicts.load_model_state = load


def _with_rounded_weights(path: str, overrides: list[str]) -> int:
    """Train as if the model kept its weights in FP8: round the loaded weights."""
    import torch

    from megatron_cpt.checkpoint.state import state_dicts
    from megatron_cpt.config import PrecisionConfig

    load = state_dicts.load_model_state

    def load_and_round(chunks, state):
        load(chunks, state)
        for number, chunk in enumerate(chunks):
            # For FP8 weights the loaded tensor is separate from the model's; here they share memory, so copy.
            weights = state[f"model{number}"]
            weights |= {name: tensor.clone() for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.data.to(torch.float8_e4m3fn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_dicts, "load_model_state", load_and_round)
        patch.setattr(PrecisionConfig, "has_fp8_weights", property(lambda precision: True))
        return train_here(path, overrides)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("fp8"))


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(DELAYED, id="delayed"), pytest.param(TENSORWISE, id="tensorwise", marks=pytest.mark.long)],
)
def test_a_layout_changes_nothing(run_file: Path, recipe: list[str]) -> None:
    folder = run_file.parent / f"layouts-{len(recipe[0])}"
    runs = [[*recipe, *layout, f"output={folder}/{name}", "stop_at_step=8"] for name, layout in LAYOUTS.items()]
    runs.append([f"output={folder}/fp32", "stop_at_step=8"])
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * len(runs)] * 2
    one, plain = _losses(folder / "dp2"), _losses(folder / "fp32")
    for name in ("tp2", "pp2"):
        assert _losses(folder / name)[0] == pytest.approx(one[0], rel=1e-5)
        # fp32 sums differ in their last digits between layouts. If such a digit decides how a value is rounded to
        # FP8, the difference grows to one FP8 step, and training propagates it.
        assert _losses(folder / name) == pytest.approx(one, rel=1e-3)
    assert one == pytest.approx(plain, rel=0.02)
    assert all(a != b for a, b in zip(one, plain, strict=True))


@pytest.mark.parametrize(
    ("recipe", "first"),
    [
        pytest.param("delayed, amax_history: 4", 1e-6, id="delayed", marks=pytest.mark.long),
        pytest.param("tensorwise", 1e-4, id="tensorwise"),
    ],
)
def test_fp8_by_torch_follows_the_emulation(run_file: Path, recipe: str, first: float) -> None:
    folder = run_file.parent / f"torch-{recipe[:7]}"
    layouts = {**LAYOUTS, "tp2-without-sequence": ["parallel.tensor=2"]}
    runs = [
        [f"precision.fp8={{backend: torch, recipe: {recipe}}}", *layout, f"output={folder}/{name}", "stop_at_step=8"]
        for name, layout in layouts.items()
    ]
    emulated = [f"precision.fp8={{backend: emulated, recipe: {recipe}}}", f"output={folder}/emulated", "stop_at_step=8"]
    runs.append(emulated)
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * len(runs)] * 2
    reference = _losses(folder / "emulated")
    for name in layouts:
        losses = _losses(folder / name)
        # Later steps: a value that is rounded the other way grows into one FP8 step, as between layouts above.
        assert losses[0] == pytest.approx(reference[0], rel=first)
        assert losses == pytest.approx(reference, rel=2e-3)
        assert losses != reference


def test_histories_of_fp8_by_torch_resume_bit_for_bit(run_file: Path) -> None:
    folder = run_file.parent / "torch-resume"
    run = ["tokens=2048", "precision={compute: bf16, fp8: {backend: torch, recipe: delayed, amax_history: 4}}"]
    runs = [[*run, f"output={folder}/whole"], [*run, f"output={folder}/halves", "stop_at_step=4"]]
    runs.append([*run, f"output={folder}/halves"])
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * 3] * 2
    assert differing(newest(folder / "whole"), newest(folder / "halves")) == []


def test_histories_survive_a_restart_and_another_layout(run_file: Path) -> None:
    folder, bf16 = run_file.parent / "resume", [*DELAYED, "precision.compute=bf16"]
    whole, halves, moved, forgot = (folder / name for name in ("whole", "halves", "moved", "forgot"))
    first = [[*bf16, f"output={output}", "stop_at_step=10"] for output in (halves, moved, forgot)]
    runs = [[*bf16, f"output={whole}"], *first, [*bf16, f"output={halves}"]]
    runs.append([*bf16, f"output={moved}", "parallel.tensor=2", "stop_at_step=12"])
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * len(runs)] * 2
    assert differing(newest(whole), newest(halves)) == []
    assert _losses(halves) == _losses(whole)
    assert _losses(moved)[10] == pytest.approx(_losses(whole)[10], rel=1e-3)

    # Without the history every scale is 1 for one step, and near 0.02 neighboring E4M3 values differ by a tenth.
    assert run_ranks(2, _without_histories, str(run_file), [*bf16, f"output={forgot}"]) == [0, 0]
    norms = {output: [line["grad_norm"] for line in read_metrics(output)] for output in (whole, forgot)}
    assert norms[forgot][:10] == norms[whole][:10]
    assert abs(norms[forgot][10] - norms[whole][10]) > 0.003 * norms[whole][10]  # identical bit for bit with it
    assert _losses(forgot)[10] != _losses(whole)[10]
    assert differing(newest(whole), newest(forgot)) != []


def test_a_checkpoint_without_histories_starts_new_ones(run_file: Path) -> None:
    folder = run_file.parent / "init"
    base = [f"output={folder}/base", "precision.compute=bf16", "stop_at_step=4"]
    runs = [base]
    for load in ("weights", "weights+optimizer"):
        changes = [f"init.from={folder}/base", f"init.load={load}", "precision.compute=bf16", "stop_at_step=4"]
        runs.append([*DELAYED, *changes, f"output={folder}/{load}"])
    back = [f"init.from={folder}/weights", "precision.compute=bf16", f"output={folder}/back", "stop_at_step=2"]
    assert run_ranks(2, train_several, str(run_file), [*runs, back]) == [[0] * 4] * 2
    assert _losses(folder / "weights")[0] < 0.9 * _losses(folder / "base")[0]


def test_master_weights_are_not_rounded_to_fp8_for_good(run_file: Path) -> None:
    """Weights of another run are unchanged after a step that is too small for bf16."""
    folder, bf16 = run_file.parent / "rounded", "precision.compute=bf16"
    changes = ["schedule.max_lr=1e-20", "schedule.min_lr=0", "stop_at_step=1", f"init.from={folder}/base"]
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    assert run_ranks(2, train_several, str(run_file), [[bf16, f"output={folder}/base", "stop_at_step=2"]]) == [[0], [0]]
    overrides = [bf16, *layout, *changes, f"output={folder}/taken"]
    assert run_ranks(2, _with_rounded_weights, str(run_file), overrides) == [0, 0]
    other = ("optimizer", "rng")
    assert differing(newest(folder / "base"), newest(folder / "taken"), ignore=other) == []


@pytest.mark.long
@pytest.mark.parametrize("recipe", [DELAYED, TENSORWISE], ids=["delayed", "tensorwise"])
def test_two_hundred_steps_stay_within_two_percent_of_bf16(tmp_path: Path, recipe: list[str]) -> None:
    path = small_run(tmp_path, tokens=200 * 8 * 32, precision={"compute": "bf16"})
    runs = [[f"output={tmp_path}/bf16"], [*recipe, f"output={tmp_path}/fp8"]]
    assert run_ranks(2, train_several, str(path), runs, timeout=900) == [[0, 0]] * 2
    bf16, fp8 = _losses(tmp_path / "bf16"), _losses(tmp_path / "fp8")
    assert len(fp8) == 200
    assert bf16[-1] < 0.8 * bf16[0]
    last = slice(-20, None)
    assert sum(fp8[last]) == pytest.approx(sum(bf16[last]), rel=0.02)
