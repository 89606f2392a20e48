"""Traces of a few steps: which steps, which files, and what is in them."""

from __future__ import annotations

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_cpt.config.schema import ProfileConfig
from megatron_cpt.errors import CptError
from megatron_cpt.hooks import build_hooks
from megatron_cpt.hooks.profiling import ProfileHook


def make_session(output, *, rank=0, step=0):
    return SimpleNamespace(
        output=output,
        ranks=SimpleNamespace(rank=rank, device=torch.device("cpu")),
        state=SimpleNamespace(step=step),
        config=SimpleNamespace(name="run"),
    )


def make_hook(**section):
    return ProfileHook(ProfileConfig.model_validate(section))


def run_steps(hook, session, last):
    """Do one matrix product of (step, step) per step, so that the trace tells the steps apart."""
    while session.state.step < last:
        hook.on_step_start(session)
        torch.ones(session.state.step + 1, session.state.step + 1).mm(torch.ones(session.state.step + 1, 1))
        session.state.step += 1
        hook.on_step(session)


def names(output):
    return sorted(path.name for path in (output / "profile").iterdir()) if (output / "profile").exists() else []


def events(output):
    (path,) = (output / "profile").glob("*.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_the_trace_has_exactly_the_requested_steps_and_the_table_their_costs(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hook, session = make_hook(steps=[3, 4], record_shapes=True), make_session(tmp_path)
    run_steps(hook, session, 2)
    assert names(tmp_path) == []
    run_steps(hook, session, 6)
    hook.on_stop(session, "")
    hook.on_end(session)
    assert names(tmp_path) == ["steps-3-4-rank-0.pt.trace.json.gz", "steps-3-4-rank-0.txt"]
    assert f"profile of steps 3-4: table and timeline are in {tmp_path / 'profile'}" in caplog.text
    found = events(tmp_path)
    assert sorted(event["name"] for event in found if str(event.get("name")).startswith("step ")) == [
        "step 3",
        "step 4",
    ]
    products = [event["args"]["Input Dims"][0] for event in found if event.get("name") == "aten::mm"]
    assert products == [[3, 3], [4, 4]]
    table = (tmp_path / "profile" / "steps-3-4-rank-0.txt").read_text()
    assert table.startswith("run: steps 3-4, rank 0, torch ")
    assert "by self CPU time" in table
    assert "aten::mm" in table
    assert "time on the device" not in table, "a CPU has none"


def test_only_the_ranks_of_the_list_record(tmp_path):
    for rank in (0, 1, 2):
        run_steps(make_hook(steps=[1, 1], ranks=[0, 2]), make_session(tmp_path, rank=rank), 1)
    assert [name for name in names(tmp_path) if name.endswith(".txt")] == [
        "steps-1-1-rank-0.txt",
        "steps-1-1-rank-2.txt",
    ]


def test_a_process_records_its_part_of_the_steps(tmp_path):
    first, session = make_hook(steps=[2, 5]), make_session(tmp_path)
    run_steps(first, session, 3)
    first.on_stop(session, "stopped by SIGTERM")
    first.on_end(session)
    run_steps(make_hook(steps=[2, 5]), make_session(tmp_path, step=3), 6)
    past = make_hook(steps=[2, 5])
    run_steps(past, make_session(tmp_path, step=5), 6)
    past.on_end(session)
    assert [name for name in names(tmp_path) if name.endswith(".txt")] == [
        "steps-2-3-rank-0.txt",
        "steps-4-5-rank-0.txt",
    ]


def test_an_error_stops_the_profiler_and_leaves_no_file(tmp_path):
    hook, session = make_hook(steps=[1, 2]), make_session(tmp_path)
    hook.on_step_start(session)
    hook.on_end(session)
    assert names(tmp_path) == []
    run_steps(make_hook(steps=[1, 2]), session, 2)  # another profiler can start
    assert len(names(tmp_path)) == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "profile").write_text("a file")
    with pytest.raises(CptError, match=r"profile: cannot be written: File exists"):
        run_steps(make_hook(steps=[1, 1]), make_session(tmp_path), 1)


def test_the_section_adds_the_hook(run_data):
    from megatron_cpt.config import draft_config

    kinds = [type(hook) for hook in build_hooks(draft_config(run_data, ["profile={steps: [1, 2]}"]).config)]
    assert ProfileHook in kinds
    assert ProfileHook not in [type(hook) for hook in build_hooks(draft_config(run_data, []).config)]
