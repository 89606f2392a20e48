"""NaN, infinity, spikes and differing replicas: every rank decides alike, weights stay, the step is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from tests.helpers.checkpoints import differing
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, read_metrics, train_here, train_with_hooks

BAD_STEP = 4


def read_anomalies(output: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (output / "anomalies.jsonl").read_bytes().splitlines()]


def test_a_run_whose_weights_are_ruined_ends_and_saves_none_of_it(run_file: Path) -> None:
    output = run_file.parent / "diverged"
    # the first steps are normal; at this rate the weights overflow soon after
    wild = [f"output={output}", "schedule.max_lr=1e30", "schedule.warmup=2", "optimizer.clip_grad=0"]
    with pytest.raises(RankError, match="step 7: 5 updates in a row skipped, this one for a loss that is not finite"):
        run_ranks(1, train_here, str(run_file), [*wild, "checkpoint.every=1"])
    assert newest(output).name == "step-00000002"
    assert [(line["step"], line["kind"], line["loss"]) for line in read_anomalies(output)] == [
        (step, "loss", None) for step in range(3, 8)
    ]
    lines = read_metrics(output)
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 5, 6], "JSON has no nan"


# one parameter of each kind: layout, the rank with the bad gradient, the parameter, the moment it turns bad
CASES = {
    "dp2-distributed": (["precision.compute=bf16"], 1, "linear_fc1.weight", "backward"),
    "dp2-plain": (["parallel.distributed_optimizer=false"], 1, "linear_fc1.weight", "backward"),
    "tp2-a-shard": (["parallel.tensor=2"], 1, "linear_fc1.weight", "backward"),
    "tp2-a-copy": (["parallel.tensor=2"], 1, "final_layernorm.weight", "after"),
    "pp2-first-stage": (["parallel.pipeline=2"], 0, "word_embeddings.weight", "backward"),
    "pp2-last-stage": (["parallel.pipeline=2"], 1, "output_layer.weight", "after"),
}


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("dp2-distributed", "tp2-a-copy") else pytest.param(case, marks=pytest.mark.long)
        for case in CASES
    ],
)
def test_a_bad_gradient_on_one_rank_changes_not_one_bit_on_any(run_file: Path, case: str) -> None:
    layout, rank, name, when = CASES[case]
    output = run_file.parent / f"poisoned-{case}"
    overrides = [*layout, f"output={output}", "stop_at_step=6", "checkpoint.every=4"]
    results = run_ranks(2, _train_with_a_bad_step, str(run_file), overrides, rank, name, when)
    for before, after, later, norms in results:
        assert before == after, "weights, master weights, moments and Adam's step are unchanged"
        assert all(later[key] != after[key] for key in after if key.endswith("step")), "the run continues"
        assert np.isfinite(norms[-1])
    assert newest(output).name == "step-00000006"
    lines = read_metrics(output)
    assert [line["skipped_updates"] for line in lines] == [0, 0, 0, 1, 1, 1]
    (found,) = read_anomalies(output)
    assert (found["step"], found["kind"], found["action"], found["skipped_in_a_row"]) == (4, "gradient", "skip", 1)
    assert any(name in bad for names in found["not_finite_on_ranks"].values() for bad in names)
    # the anomaly lists the samples that the blend gave between the lines before and after the step
    given = {source: lines[3]["samples_by_source"][source] - lines[2]["samples_by_source"][source] for source in
             lines[3]["samples_by_source"]}  # fmt: skip
    read = [(sample["source"], sample["k"]) for sample in found["samples"]]
    for source, count in given.items():
        first = lines[2]["samples_by_source"][source]
        assert sorted(k for s, k in read if s == source) == list(range(first, first + count))
    assert all(sample["documents"] for sample in found["samples"])


def _train_with_a_bad_step(path: str, overrides: list[str], rank: int, name: str, when: str) -> Any:
    """Train with a NaN gradient in step 4 on one rank; return hashes before, after and later, and the norms."""
    import torch.distributed as dist

    from megatron_cpt.train.forward import ForwardPass

    states: dict[int, dict[str, int]] = {}
    norms: list[float] = []
    is_here = dist.get_rank() == rank

    def hook(session: Any) -> None:
        states[session.state.step] = _state_hashes(session)

    def poison(session: Any) -> Any:
        named = [(n, p) for chunk in session.model.chunks for n, p in chunk.named_parameters() if name in n]
        target = named[0][1] if is_here else None
        is_bad = lambda: session.state.step + 1 == BAD_STEP  # noqa: E731
        if is_here and when == "backward":
            target.register_hook(lambda grad: grad * float("nan") if is_bad() else None)

        class Poisoned(ForwardPass):
            def __call__(self, micro_batches: Any, *, train: bool, **kwargs: Any) -> torch.Tensor:
                losses = super().__call__(micro_batches, train=train, **kwargs)
                if is_here and when == "after" and is_bad():
                    target.main_grad.view(-1)[-1] = float("inf")
                return losses

        fields = {f: getattr(session.forward, f) for f in session.forward.__dataclass_fields__}
        return replace(session, forward=Poisoned(**fields))

    _train(path, overrides, poison, on_step=hook, on_metrics=lambda line: norms.append(line["grad_norm"]))
    return states[BAD_STEP - 1], states[BAD_STEP], states[BAD_STEP + 1], norms


def _train(
    path: str,
    overrides: Sequence[str],
    change: Callable[[Any], Any] = lambda session: session,
    *,
    on_step: Callable[[Any], None] = lambda session: None,
    on_metrics: Callable[[dict[str, Any]], None] = lambda line: None,
    wall_time: Any = None,
) -> int:
    """Train with a changed session and a hook that calls `on_step` and `on_metrics`."""
    from megatron_cpt.hooks import Hook

    class Seen(Hook):
        def on_step(self, session: Any) -> None:
            on_step(session)

        def on_metrics(self, session: Any, line: dict[str, Any]) -> None:
            on_metrics(line)

    def prepare(trainer: Any) -> None:
        trainer.session = change(trainer.session)
        trainer.wall_time = wall_time or trainer.wall_time

    return train_with_hooks(path, overrides, hooks=[Seen()], prepare=prepare)


def _state_hashes(session: Any) -> dict[str, int]:
    """Return a hash of everything that an update may change, by name."""
    from megatron_cpt.train.resilience.replicas import bit_hash

    found = {n: bit_hash(p).item() for chunk in session.model.chunks for n, p in chunk.named_parameters()}
    for number, group in enumerate(session.optimizer.param_groups):
        found[f"{number}.step"] = group.get("step", 0)
        for place, parameter in enumerate(group["params"]):
            found[f"{number}.{place}"] = bit_hash(parameter).item()
    for part in session.optimizer.chained_optimizers:
        for number, state in enumerate(part.state.values()):
            found |= {f"state.{number}.{key}": bit_hash(value).item() for key, value in state.items()}
    return found


# at so low a rate the loss only fluctuates
SPIKES = [
    "schedule.max_lr=1e-9",
    "schedule.min_lr=0",
    "resilience.spike={action: warn, sigma: 1.0, window: 6, warmup: 3}",
]


def test_the_rule_for_spikes_marks_the_steps_that_it_should(run_file: Path) -> None:
    output = run_file.parent / "spikes"
    rule = SPIKES[-1]
    run_ranks(1, train_here, str(run_file), [f"output={output}", *SPIKES])
    lines = read_metrics(output)
    expected = []
    for place, line in enumerate(lines):
        before = [other["loss"] for other in lines[:place] if other["phase"] == line["phase"]][-6:]
        if len(before) >= 3 and line["loss"] > np.mean(before) + np.std(before, ddof=1):
            expected.append(line["step"])
    assert expected, "the run has losses that rise"
    found = read_anomalies(output)
    assert [(line["step"], line["kind"], line["action"]) for line in found] == [(s, "spike", "warn") for s in expected]
    assert lines[-1]["skipped_updates"] == 0

    skipped = run_file.parent / "spikes-skipped"
    run_ranks(1, train_here, str(run_file), [f"output={skipped}", *SPIKES[:-1], rule.replace("warn", "skip")])
    first = expected[0]
    assert [line["loss"] for line in read_metrics(skipped)][:first] == [line["loss"] for line in lines][:first]
    assert read_metrics(skipped)[first - 1]["skipped_updates"] == 1

    stopped = run_file.parent / "spikes-stopped"
    with pytest.raises(RankError, match=f"step {first}: the loss is .*, above "):
        run_ranks(1, train_here, str(run_file), [f"output={stopped}", *SPIKES[:-1], rule.replace("warn", "stop")])
    assert not (stopped / "checkpoints").exists() or not list((stopped / "checkpoints").glob("step-*"))


def test_the_window_of_losses_survives_a_restart(run_file: Path) -> None:
    whole, parts = run_file.parent / "spikes", run_file.parent / "spikes-resumed"
    run_ranks(1, train_here, str(run_file), [f"output={parts}", *SPIKES, "stop_at_step=9"])
    run_ranks(1, train_here, str(run_file), [f"output={parts}", *SPIKES])
    assert read_anomalies(parts) == read_anomalies(whole)


@pytest.mark.parametrize(
    ("layout", "hash_every"),
    [
        pytest.param("precision.compute=bf16", 2, id="distributed"),
        pytest.param("parallel.distributed_optimizer=false", 2, id="plain", marks=pytest.mark.long),
        pytest.param("parallel.tensor=1", 4, id="before-a-save", marks=pytest.mark.long),
    ],
)
def test_one_flipped_bit_in_one_replica_is_found_and_not_saved(run_file: Path, layout: str, hash_every: int) -> None:
    output = run_file.parent / f"flipped-{layout.partition('=')[2]}"
    overrides = [layout, f"output={output}", f"resilience.parameter_hash_every={hash_every}", "checkpoint.every=2"]
    with pytest.raises(RankError) as found:
        run_ranks(2, _flip_a_bit, str(run_file), overrides)
    assert "step 6: the data-parallel replicas differ in decoder.layers.2.mlp.linear_fc2.weight among ranks [0, 1]" in (
        str(found.value).replace("module.", "")
    )
    assert newest(output).name == "step-00000004"


def _flip_a_bit(path: str, overrides: list[str]) -> int:
    def flip(session: Any) -> None:
        if session.state.step == 6 and session.ranks.rank == 1:
            (chunk,) = session.model.chunks
            weight = next(p for n, p in chunk.named_parameters() if n.endswith("layers.2.mlp.linear_fc2.weight"))
            bits = weight.data.view(-1).view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)
            bits[1234] ^= 1

    return _train(path, overrides, on_step=flip)


def test_the_time_of_one_rank_stops_all_after_the_same_step(run_file: Path) -> None:
    output = run_file.parent / "out-of-time"
    overrides = [f"output={output}", "parallel.tensor=2", "resilience.wall_time=100s"]
    assert run_ranks(2, _train_against_the_clock, str(run_file), overrides) == [75, 75]
    assert newest(output).name == "step-00000009"
    assert run_ranks(2, train_here, str(run_file), [*overrides[:2], "stop_at_step=10"]) == [0, 0]
    assert [line["step"] for line in read_metrics(output)] == list(range(1, 11))


def _train_against_the_clock(path: str, overrides: list[str]) -> int:
    import torch.distributed as dist

    from megatron_cpt.train.resilience.wall_time import WallTime

    steps = iter(range(1000))
    now = {"seconds": 0.0}

    def tick(session: Any) -> None:
        now["seconds"] = 11.0 * (next(steps) + 1) if dist.get_rank() == 1 else 0.0

    # rank 1's steps take 11 s: step 9 begins at 88 s, so step 10 would end at 110 s
    return _train(path, overrides, on_step=tick, wall_time=WallTime(100.0, lambda: now["seconds"]))


OPTIMIZERS = {
    "distributed-bf16": ["precision.compute=bf16"],
    "distributed-fp32": [],
    "plain-bf16": ["precision.compute=bf16", "parallel.distributed_optimizer=false"],
    "plain-fp32": ["parallel.distributed_optimizer=false"],
}


def _train_without_the_first_updates(path: str, runs: Sequence[Sequence[str]], num_skipped: int) -> None:
    from megatron_cpt.train import trainer
    from megatron_cpt.train.resilience.anomalies import Anomaly

    find = trainer.find_anomaly

    def skip_first(*arguments: Any) -> Anomaly | None:
        return Anomaly("loss", 1.0, None, "skip") if next(steps) < num_skipped else find(*arguments)

    trainer.find_anomaly = skip_first
    for overrides in runs:
        resumed = Path(overrides[0].removeprefix("output=")).exists()
        steps = iter(range(num_skipped if resumed else 0, 100))
        train_here(path, overrides)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("distributed-bf16", "plain-fp32") else pytest.param(name, marks=pytest.mark.long)
        for name in OPTIMIZERS
    ],
)
def test_a_checkpoint_before_the_first_update_resumes_like_the_unbroken_run(run_file: Path, name: str) -> None:
    whole, broken = (run_file.parent / "no-update" / f"{name}{end}" for end in ("-whole", ""))
    runs = [[f"output={whole}", *OPTIMIZERS[name], "stop_at_step=4"]]
    runs += [[f"output={broken}", *OPTIMIZERS[name], f"stop_at_step={step}"] for step in (2, 4)]
    run_ranks(2, _train_without_the_first_updates, str(run_file), runs, 2)
    lines = read_metrics(broken)
    assert [line["skipped_updates"] for line in lines] == [1, 2, 2, 2]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in read_metrics(whole)]
    assert differing(newest(broken), newest(whole)) == []


def test_a_rate_of_zero_from_the_start_saves_and_resumes(run_file: Path) -> None:
    output = run_file.parent / "rate-0"
    overrides = [f"output={output}", "schedule.warmup=4", "stop_at_step=1"]
    run_ranks(1, train_here, str(run_file), overrides)
    run_ranks(1, train_here, str(run_file), [*overrides[:2], "stop_at_step=3"])
    assert next(line["lr"] for line in read_metrics(output)) == 0.0
    assert newest(output).name == "step-00000003"
