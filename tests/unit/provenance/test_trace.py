"""`trace_step` names what the loader really read: over phases, resumes, changed blends and lost checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import digest, manifest_text
from megatron_cpt.config import dump_yaml, read_mapping
from megatron_cpt.data import BlendCursor, IndexedDataset, IndexedDatasetWriter, Loader, PhaseBlend, TokenStream
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.prepare import PreparedRun, prepare_run
from megatron_cpt.provenance.plans_file import FILE_NAME, note_plan, read_plan_records
from megatron_cpt.provenance.trace import Trace, read_parts, trace_step

SOURCES = {"web": 2000, "code": 900, "qa": 400}
BATCH, STEPS = 8, 20

Read = dict[int, list[tuple[str, list[int]]]]
"""By step: source and tokens of each sample, in the order of the global batch."""


class Training:
    """Stand-in for `train` without a model: it uses the loader and writes the records and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.read: Read = {}
        for number, (name, num_tokens) in enumerate(SOURCES.items()):
            self.write_source(name, num_tokens, 10_000 * number)

    def write_source(self, name: str, num_tokens: int, first: int) -> None:
        """Ids first, first + 1, ... in documents of 0 to 40 tokens: an id tells its place."""
        rng = np.random.default_rng(first)
        lengths = rng.integers(0, 41, num_tokens)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens))]
        lengths = np.append(lengths, [num_tokens - lengths.sum(), 0])
        with IndexedDatasetWriter(self.folder / name, "<i4") as writer:
            writer.add_documents(np.arange(first, first + num_tokens), lengths)

    def prepare(self, phases: list[dict[str, Any]] | None, sources: list[str]) -> PreparedRun:
        run = {
            "name": "small",
            "output": str(self.output),
            "model": {"preset": "tiny_nemotron", "vocab": 50_000},
            "seq_length": 32,
            "batch": {"global": BATCH, "micro": 2},
            "tokens": STEPS * BATCH * 32,
            "schedule": {"max_lr": 1e-3, "min_lr": 1e-5},
            "sources": {name: {"path": str(self.folder / name)} for name in sources},
            "phases": phases
            or [
                {"name": "general", "blend": {"web": 0.7, "code": 0.3}, "until": {"step": 11}},
                {"name": "qa", "blend": {"web": 0.45, "code": 0.3, "qa": 0.25}},
            ],
        }
        path = self.folder / "run.yaml"
        path.write_text(dump_yaml(run))
        return prepare_run(path, need_files=True)

    def train(
        self,
        last_step: int,
        *,
        phases: list[dict[str, Any]] | None = None,
        sources: tuple[str, ...] = ("web", "code", "qa"),
        every: int | None = 4,
        log: bool = True,
    ) -> None:
        """Resume from the newest checkpoint, as `train` does, and save every `every` steps."""
        prepared = self.prepare(phases, list(sources))
        config, plan = prepared.config, prepared.plan
        streams = [
            TokenStream(name, [IndexedDataset(self.folder / name)], seq_length=32, seed=config.seed)
            for name in config.sources
        ]
        blends = [PhaseBlend(p.name, (p.first_step - 1) * BATCH, p.num_samples, p.weights) for p in plan.phases]
        cursor = BlendCursor(blends, list(config.sources))
        checkpoints = layout.list_checkpoints(layout.checkpoints_folder(self.output))
        step = 0
        if checkpoints:
            state = orjson.loads((checkpoints[-1] / layout.STATE_FILE).read_bytes())["train"]
            step = state["step"]
            cursor.load_state_dict(state["data"])
        fingerprints = {stream.name: fingerprint(stream.datasets) for stream in streams}
        self._write_run(self.output, prepared)
        note_plan(
            self.output,
            step,
            run_id="a",
            run=config.to_dict(),
            plan=plan.to_dict(),
            state=state["data"] if step else None,
            fingerprints=fingerprints,
        )
        self._trim_metrics(step)
        with Loader(streams, cursor, global_batch=BATCH, micro_batch=2) as loader:
            while step < last_step:
                step += 1
                data = loader.next_step()
                self.read[step] = [
                    (streams[source].name, [*tokens, labels[-1]])
                    for batch in data.micro_batches
                    for source, tokens, labels in zip(
                        batch.sources, batch.tokens.tolist(), batch.labels.tolist(), strict=True
                    )
                ]
                if log:
                    line = {"step": step, "samples_by_source": data.counts}
                    with open(self.output / "metrics.jsonl", "ab") as file:
                        file.write(orjson.dumps(line) + b"\n")
                if every and step % every == 0:
                    self._save(step, data.state, prepared, fingerprints)

    def _write_run(self, folder: Path, prepared: PreparedRun) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / layout.RUN_FILE).write_text(dump_yaml(prepared.config.to_dict()))
        (folder / layout.PLAN_FILE).write_bytes(orjson.dumps(prepared.plan.to_dict()))

    def _trim_metrics(self, step: int) -> None:
        path = self.output / "metrics.jsonl"
        if path.exists():
            path.write_bytes(b"".join(x for x in path.read_bytes().splitlines(True) if orjson.loads(x)["step"] <= step))

    def _save(self, step: int, state: dict[str, Any], prepared: PreparedRun, fingerprints: dict[str, str]) -> None:
        folder = self.checkpoint(step)
        self._write_run(folder, prepared)
        content = {
            "format_version": 1,
            "train": {"step": step, "tokens": 0, "samples_by_source": state["counts"], "data": state},
            "data_fingerprints": fingerprints,
        }
        (folder / layout.STATE_FILE).write_bytes(orjson.dumps(content))
        for name in (".metadata", "metadata.json", "__0_0.distcp"):  # no tensors are read
            (folder / name).touch()
        files = {path.name: digest(path) for path in folder.iterdir() if path.name != layout.MANIFEST_FILE}
        (folder / layout.MANIFEST_FILE).write_text(manifest_text(files))

    def checkpoint(self, step: int) -> Path:
        return layout.checkpoints_folder(self.output) / layout.checkpoint_name(step)

    def assert_exact(self, step: int) -> Trace:
        """Assert that the traced tokens are exactly those that were read, and that the documents contain them."""
        trace = trace_step(self.output, step)
        assert [sample.sample for sample in trace.samples] == list(range(BATCH))
        found = []
        for sample in trace.samples:
            dataset = IndexedDataset(sample.prefix)
            found.append((sample.source, dataset.read(sample.first_token, sample.num_tokens).tolist()))
            parts = read_parts(sample)
            assert [i for part in parts for i in part.tolist()] == found[-1][1]
            for part, tokens in zip(sample.documents, parts, strict=True):
                assert part.num_tokens == len(tokens) > 0
                assert set(tokens.tolist()) <= set(dataset.document(part.document).tolist())
        assert found == self.read[step]
        return trace


@pytest.fixture
def training(tmp_path) -> Training:
    return Training(tmp_path)


def lose(training: Training, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(training.checkpoint(step))


OTHER = [
    {"name": "general", "blend": {"web": 0.2, "code": 0.8}, "until": {"step": 14}},
    {"name": "qa", "blend": {"web": 0.1, "code": 0.3, "qa": 0.6}},
]


def test_every_step_of_a_run(training):
    training.train(STEPS, log=False)
    epochs = set()
    for step in range(1, STEPS + 1):
        trace = training.assert_exact(step)
        epochs |= {sample.epoch for sample in trace.samples}
        assert trace.phase == ("general" if step <= 11 else "qa")
        assert trace.replayed_from == (11 if step == 12 else (step - 1) // 4 * 4)
        assert trace.confirmed_by is not None
        assert trace.notes == ()
    assert epochs >= {0, 1}


def test_without_checkpoints_from_the_start(training):
    training.train(STEPS, every=None)
    for step in (1, 7, 11, 12, STEPS):
        trace = training.assert_exact(step)
        assert (trace.replayed_from, trace.confirmed_by) == (0, f"metrics.jsonl, step {step}")


@pytest.mark.parametrize("kept", [[5, 10, 15, 20], [20], [10, 20]])
def test_metrics_shorten_the_replay(training, kept):
    training.train(STEPS, every=5)
    lose(training, *({5, 10, 15, 20} - set(kept)))
    for step in range(1, STEPS + 1):
        trace = training.assert_exact(step)
        if step >= 13 or kept[0] <= 10:  # a checkpoint after the step in its own phase
            assert trace.replayed_from == step - 1 or step in (11, 12)
        assert trace.confirmed_by == (f"step-{step:08d}/state.json" if step in kept else f"metrics.jsonl, step {step}")


def test_metrics_that_are_damaged(training):
    training.train(STEPS, every=10)
    path = training.output / "metrics.jsonl"
    lines = {line["step"]: line for line in map(orjson.loads, path.read_bytes().splitlines())}
    lines[16]["samples_by_source"]["web"] += 1  # no longer adds up: no replay can start from here
    lines[14]["samples_by_source"]["web"] += 1
    lines[14]["samples_by_source"]["qa"] -= 1  # adds up, and is not true
    path.write_bytes(b"not json\n" + b"".join(orjson.dumps(line) + b"\n" for line in lines.values()))
    assert training.assert_exact(17).replayed_from == 11
    for step in (14, 16):
        with pytest.raises(RefusedError, match=rf"metrics\.jsonl, step {step} contradicts a replay from step"):
            trace_step(training.output, step)


def test_without_metrics_the_next_checkpoint_confirms(training):
    training.train(STEPS, every=5, log=False)
    for step in range(1, STEPS + 1):
        assert training.assert_exact(step).confirmed_by == f"step-{-(-step // 5) * 5:08d}/state.json"


def test_a_step_that_was_not_run_yet(training):
    training.train(6, every=4)
    recorded = training.assert_exact(6)
    assert recorded.confirmed_by == "metrics.jsonl, step 6"
    ahead = trace_step(training.output, 9)
    assert ahead.confirmed_by is None
    assert "nothing is recorded of step 9" in ahead.notes[0]
    training.train(STEPS)
    assert training.assert_exact(9).samples == ahead.samples


def test_a_resume_that_repeats_steps(training):
    training.train(11)  # stops after step 11, saved at 8
    training.train(STEPS)
    for step in range(1, STEPS + 1):
        training.assert_exact(step)


@pytest.mark.parametrize("log", [True, False])
def test_a_blend_changed_at_a_resume(training, log):
    training.train(10, log=log)  # saved at 8; steps 9 and 10 are read again, by the other blend
    training.train(STEPS, phases=OTHER, log=log)
    for step in range(1, STEPS + 1):
        trace = training.assert_exact(step)
        assert trace.run["phases"][0]["blend"]["web"] == (0.7 if step <= 8 else 0.2)


def test_a_source_that_came_and_one_that_left(training):
    first = [{"name": "general", "blend": {"web": 0.5, "code": 0.5}}]
    second = [{"name": "general", "blend": {"qa": 0.5, "code": 0.5}}]
    training.train(8, phases=first, sources=("web", "code"))
    training.train(STEPS, phases=second, sources=("qa", "code"))
    for step in range(1, STEPS + 1):
        training.assert_exact(step)
    lose(training, 4, 8, 12)  # what began at step 8 is part of every later state
    for step in range(9, STEPS + 1):
        assert training.assert_exact(step).replayed_from == max(8, step - 1)


def test_the_checkpoint_of_a_changed_blend_is_gone(training):
    """The state of step 12 still tells that its blend began after step 8; metrics tell the rest."""
    training.train(10)
    training.train(STEPS, phases=OTHER)
    lose(training, 8)
    assert [training.assert_exact(step).replayed_from for step in range(5, 13)] == [4, 4, 4, 4, 8, 9, 10, 11]


@pytest.mark.parametrize("lost", [(4, 8), (4, 8, 12), (4, 8, 12, 16, 20)])
def test_what_came_before_a_change_needs_neither_checkpoints_nor_metrics(training, lost):
    training.train(10, log=False)
    training.train(STEPS, phases=OTHER, log=False)
    lose(training, *lost)
    for step in range(1, STEPS + 1):
        trace = training.assert_exact(step)
        assert trace.run["phases"][0]["blend"]["web"] == (0.7 if step <= 8 else 0.2)
        assert trace.confirmed_by is not None or (len(lost) == 5 and step > 8)
    assert training.assert_exact(5).confirmed_by == "plans.jsonl, step 8"


def test_a_change_too_small_for_the_counts_to_tell(training):
    """Under either blend alone the counts of step 16 would be what they are; steps in between read other samples."""
    before, after = (
        [
            {"name": "general", "blend": {"web": web, "code": 1 - web}, "until": {"step": 14}},
            {"name": "qa", "blend": {"web": 0.45, "code": 0.3, "qa": 0.25}},
        ]
        for web in (0.7, 0.697)
    )
    training.train(8, phases=before, every=8, log=False)
    training.train(STEPS, phases=after, every=8, log=False)
    lose(training, 8)
    for step in range(1, STEPS + 1):
        training.assert_exact(step)


def test_the_file_of_plans_grows_with_changes_only(training):
    def after_steps() -> list[int]:
        return [record.after_step for record in read_plan_records(training.output)]

    training.train(6)
    training.train(10)
    assert after_steps() == [0]
    training.train(14, phases=OTHER)
    assert after_steps() == [0, 8]
    lose(training, 12)
    training.train(14, phases=OTHER)
    assert after_steps() == [0, 8]
    lose(training, 8, 12)
    training.train(STEPS)  # resumes from step 4 under the first plan: the change after step 8 is undone
    assert after_steps() == [0]
    for step in range(1, STEPS + 1):
        assert training.assert_exact(step).confirmed_by is not None


def test_steps_that_were_done_again_under_another_blend(training):
    training.train(STEPS, phases=OTHER, log=False)
    lose(training, 12)
    for step in (16, 20):  # hidden from the resume; afterwards they contradict the run
        training.checkpoint(step).rename(training.folder / str(step))
    training.train(11, log=False)
    for step in (16, 20):
        (training.folder / str(step)).rename(training.checkpoint(step))
    for step in range(1, 12):
        trace = training.assert_exact(step)
        assert trace.confirmed_by == (f"step-{-(-step // 4) * 4:08d}/state.json" if step <= 8 else None)


def test_a_directory_that_was_put_together_from_a_checkpoint(training):
    training.train(STEPS, every=5)
    (training.output / FILE_NAME).unlink()
    lose(training, 20)
    training.train(STEPS, every=5)
    assert training.assert_exact(17).replayed_from == 16
    with pytest.raises(RefusedError, match=r"step 15: .* cannot be determined: .*plans\.jsonl begins after step 15"):
        trace_step(training.output, 15)


def test_a_file_of_plans_that_is_damaged_stops_no_run(training, caplog):
    training.train(10)
    path = training.output / FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RefusedError, match=r"plans\.jsonl: damaged"):
        trace_step(training.output, 3)
    training.train(STEPS)
    assert "can no longer be traced" in caplog.text
    training.assert_exact(9)


def test_a_corrupt_checkpoint_is_skipped(training):
    training.train(STEPS)
    path = training.checkpoint(8) / layout.STATE_FILE
    path.write_bytes(path.read_bytes().replace(b'"step":8', b'"step":7'))
    (training.checkpoint(4) / layout.MANIFEST_FILE).unlink()
    trace = training.assert_exact(10)
    assert trace.replayed_from == 0
    assert len(trace.notes) == 2
    assert "state.json: missing, or different from what manifest.json lists" in trace.notes[1]


def test_data_that_were_replaced(training):
    training.train(10)
    training.write_source("code", SOURCES["code"], 30_000)
    with pytest.raises(RefusedError, match="source code: its files were replaced after the step"):
        trace_step(training.output, 7)
    ahead = trace_step(training.output, 15)
    assert any("source code: its files were replaced since the run last read them" in note for note in ahead.notes)


def test_mistakes(training):
    training.train(4)
    for step in (0, -1, STEPS + 1):
        with pytest.raises(UserError, match=rf"--step {step}: the steps of .* are 1 to {STEPS}"):
            trace_step(training.output, step)
    with pytest.raises(UserError, match="no such run directory"):
        trace_step(training.folder / "none", 1)
    (training.folder / "web.bin").rename(training.folder / "gone.bin")
    with pytest.raises(UserError, match=r"source web: no such file: .*web\.bin.*in the folder where `train` ran"):
        trace_step(training.output, 1)
    (training.output / FILE_NAME).unlink()
    with pytest.raises(RefusedError, match=r"plans\.jsonl: missing"):
        trace_step(training.output, 1)


def test_progress(training):
    training.train(STEPS, every=None)
    seen: list[tuple[int, int]] = []
    trace_step(training.output, 12, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] <= 12 * BATCH
    assert {total for _, total in seen} == {12 * BATCH}
    assert seen == sorted(seen)


def test_a_source_that_ends_before_its_first_sample_has_ended(training: Training) -> None:
    training.prepare(None, [*SOURCES])
    ends = ["sources.qa.max_epochs=0.01", "sources.qa.on_exhausted=renormalize"]
    prepared = prepare_run(training.folder / "run.yaml", ends, need_files=True)
    run, plan = prepared.config.to_dict(), prepared.plan.to_dict()
    training.output.mkdir()
    note_plan(training.output, 0, run_id="a", run=run, plan=plan, state=None, fingerprints={})
    (record,) = read_plan_records(training.output)
    assert record.blends.limits == prepared.plan.span_limits == {"qa": 0}


def test_a_plan_survives_being_written(training: Training) -> None:
    """Weights read back from plan.json are identical bit for bit, because rounding decides a blend."""
    blend: Callable[[int], float] = lambda n: 1 / (3 + n)  # noqa: E731
    prepared = training.prepare(
        [{"name": "only", "blend": {name: blend(n) for n, name in enumerate(SOURCES)}}], [*SOURCES]
    )
    plain = orjson.loads(orjson.dumps(prepared.plan.to_dict()))
    weights = {name: use["weight"] for name, use in plain["phases"][0]["sources"].items()}
    assert weights == prepared.plan.phases[0].weights
    assert read_mapping(training.folder / "run.yaml")["phases"][0]["blend"]["code"] == blend(1)
