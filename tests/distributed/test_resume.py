"""A run stopped after N/2 steps and resumed equals the run of N steps bit for bit, also after a change of layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import differing, read_tensors, save_checkpoint
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, read_metrics, read_reproducible_metrics, train_here, train_several

SHORT = "tokens=2048"  # 8 steps; the phase changes after step 6
CASES = {
    "dp2-bf16-distributed": ["precision.compute=bf16"],
    "dp2-bf16-plain": ["precision.compute=bf16", "parallel.distributed_optimizer=false"],
    "dp2-fp32-plain": ["parallel.distributed_optimizer=false"],
    "tp2-sp-dropout": ["parallel.tensor=2", "parallel.sequence=true", "model.hidden_dropout=0.1"],
    "pp2-interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}


@pytest.fixture(scope="module")
def unbroken(run_file: Path) -> Path:
    folder = run_file.parent / "unbroken"
    runs = [[SHORT, *changes, f"output={folder}/{name}"] for name, changes in CASES.items()]
    run_ranks(2, train_several, str(run_file), runs, timeout=480)
    return folder


@pytest.mark.parametrize(
    "stop", [pytest.param(4, marks=pytest.mark.long, id="in-a-phase"), pytest.param(6, id="at-the-switch")]
)
def test_resumed_run_equals_the_unbroken_one_to_the_bit(run_file: Path, unbroken: Path, stop: int) -> None:
    folder = run_file.parent / f"resumed-{stop}"
    runs = [[SHORT, *changes, f"output={folder}/{name}"] for name, changes in CASES.items()]
    first = run_ranks(2, train_several, str(run_file), [[*run, f"stop_at_step={stop}"] for run in runs], timeout=480)
    second = run_ranks(2, train_several, str(run_file), runs, timeout=480)
    assert first == second == [[0] * len(CASES)] * 2
    for name in CASES:
        assert newest(folder / name).name == "step-00000008"
        assert differing(newest(unbroken / name), newest(folder / name)) == []
        assert read_reproducible_metrics(unbroken / name) == read_reproducible_metrics(folder / name)


def test_samples_follow_the_blend_within_one_and_a_half(unbroken: Path) -> None:
    blends = {"general": {"web": 0.6, "code": 0.4}, "qa": {"web": 0.5, "code": 0.3, "qa": 0.2}}
    lines = read_metrics(unbroken / "pp2-interleaved")
    assert [line["phase"] for line in lines] == ["general"] * 6 + ["qa"] * 2
    before = {"web": 0, "code": 0, "qa": 0}
    for number, line in enumerate(lines):
        if number and lines[number - 1]["phase"] != line["phase"]:
            before = lines[number - 1]["samples_by_source"]
        in_phase = sum(line["samples_by_source"].values()) - sum(before.values())
        for name, weight in blends[line["phase"]].items():
            assert abs(line["samples_by_source"][name] - before[name] - weight * in_phase) <= 1.5


def test_a_checkpoint_changes_its_layout_to_the_bit(run_file: Path, base: Path) -> None:
    """Load and save weights and optimizer with TP x PP = 1x1, 2x1, 1x2, 1x1 (two replicas), interleaved and unequal."""
    folder = run_file.parent / "reshaped"
    layouts = [
        ["parallel.tensor=2"],
        ["parallel.pipeline=2"],
        [],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ["parallel={pipeline: 2, pipeline_layout: [3, 1]}"],
        ["parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: [0, 1, 2, 1]}"],
        ["parallel.tensor=2"],
    ]
    places = [base, *(folder / str(number) for number in range(len(layouts)))]
    moves = [(str(a), str(b), layout) for a, b, layout in zip(places, places[1:], layouts, strict=False)]
    run_ranks(2, _load_and_save_again, str(run_file), moves)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in read_tensors(newest(base)))
    for place in places[1:]:
        assert differing(newest(base), newest(place), ignore=("rng.",)) == []


def _load_and_save_again(path: str, moves: list[tuple[str, str, list[str]]]) -> None:
    from megatron_cpt.backend import process_groups
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.run_files import record
    from megatron_cpt.train.setup import setup

    for source, target, layout in moves:
        prepared = prepare_run(path, [*layout, f"output={source}"], need_files=True)
        with process_groups(prepared.config.parallel) as ranks:
            session = setup(prepared.config, prepared.plan, ranks, eod_id=None)
            folder = Path(target) / "checkpoints"
            save_checkpoint(folder, session.state.step, session.model.chunks, session.optimizer, record(session))


def test_changed_runs_are_refused_unless_allowed(run_file: Path) -> None:
    output = run_file.parent / "changed"
    start = [f"output={output}", "stop_at_step=2"]
    run_ranks(1, train_here, str(run_file), start)
    for change, name in [
        ("phases.general.blend.web=0.9", "blend"),
        ("schedule.max_lr=2e-3", "schedule"),
        ("seed=7", "seed"),
        ("model.rotary_percent=1.0", "model"),
        ("seq_length=16", "seq_length"),
    ]:
        with pytest.raises(RankError, match=rf"RefusedError[\s\S]*- {name}: "):
            run_ranks(1, train_here, str(run_file), [f"output={output}", "stop_at_step=3", change])
    assert newest(output).name == "step-00000002"
    run_ranks(
        1, train_here, str(run_file), [f"output={output}", "stop_at_step=3", "phases.general.blend.web=0.9"], ["blend"]
    )
    assert newest(output).name == "step-00000003"


def test_weights_and_optimizer_are_two_ways_to_start(run_file: Path, base: Path) -> None:
    folder = run_file.parent / "starts"
    link = run_file.parent / "link-to-a-checkpoint"
    link.symlink_to(newest(base))
    common = [f"init.from={base}", "stop_at_step=1", "schedule.max_lr=1e-60", "schedule.min_lr=0"]
    run_ranks(1, train_several, str(run_file), [
        [*common, "init.load=weights", f"output={folder}/weights"],
        [*common, "init.load=weights+optimizer", f"output={folder}/optimizer"],
        [*common, f"init.from={link}", f"output={folder}/from-link"],
    ])  # fmt: skip
    origin = read_tensors(newest(base))
    assert differing(newest(folder / "weights"), newest(folder / "from-link")) == []
    fresh, carried = (read_tensors(newest(folder / name)) for name in ("weights", "optimizer"))
    key = "optimizer.state.exp_avg.output_layer.weight"
    for tensors in (fresh, carried):
        assert tensors["output_layer.weight"].equal(origin["output_layer.weight"])
    # one step of momentum at beta1 = 0.9: 0.9 m + 0.1 g, and 0.1 g without a carried m
    assert (carried[key] - 0.9 * origin[key]).allclose(fresh[key], atol=1e-6)
    assert not carried[key].allclose(fresh[key], atol=1e-4)


def test_adam_goes_on_with_the_numbers_of_the_run_and_not_with_those_of_the_checkpoint(
    run_file: Path, tmp_path: Path
) -> None:
    """Adam takes betas and epsilon from the run; megatron-core alone would take them from the checkpoint."""
    resumed = [f"output={tmp_path}/out", "schedule.max_lr=1e-60", "schedule.min_lr=0"]
    changed = ["optimizer.betas=[0.5, 0.7]"]
    run_ranks(1, train_here, str(run_file), [*resumed, "stop_at_step=4"])
    run_ranks(1, train_here, str(run_file), [*resumed, *changed, "stop_at_step=5"], ["optimizer"])
    start = [f"init.from={tmp_path}/out/checkpoints/step-00000004", "init.load=weights+optimizer", *resumed[1:]]
    run_ranks(1, train_here, str(run_file), [*start, *changed, f"output={tmp_path}/start", "stop_at_step=1"])
    before, after, started = (
        read_tensors(path)
        for path in (
            tmp_path / "out" / "checkpoints" / "step-00000004",
            newest(tmp_path / "out"),
            newest(tmp_path / "start"),
        )
    )
    first, second = (f"optimizer.state.exp_avg{kind}.output_layer.weight" for kind in ("", "_sq"))
    for tensors in (after, started):
        gradient = 2 * (tensors[first] - 0.5 * before[first])  # m' = 0.5 m + 0.5 g; v' = 0.7 v + 0.3 g^2
        assert tensors[second].allclose(0.7 * before[second] + 0.3 * gradient**2, rtol=1e-3, atol=1e-12)
        assert gradient.abs().max() > 0


def test_hooks_that_refuse_do_so_before_anything_is_written(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"UserError: resilience\.straggler: "):
        run_ranks(1, train_here, str(run_file), [f"output={tmp_path}/out", "resilience.straggler=true"])
    assert not (tmp_path / "out").exists()
