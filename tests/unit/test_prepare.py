"""Preparation of a run from run.yaml and its files; all problems are reported together."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.config import dump_yaml
from megatron_cpt.data import TokenStream
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.errors import EXIT_REFUSED, EXIT_USER, ConfigError, RefusedError, UserError
from megatron_cpt.prepare import load_run, plan_run, prepare_run
from tests.helpers.document_lists import write_list
from tests.helpers.teacher_caches import write_cache

SIZES = {"web": 10_000, "code": 8_000, "qa": 2_000}


def write_tokens(prefix, count):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(count) % 257)


@pytest.fixture
def with_files(run_data, tmp_path, monkeypatch):
    """The small run, its files under data/ of the working directory, sizes not declared."""
    monkeypatch.chdir(tmp_path)
    for name, count in SIZES.items():
        write_tokens(tmp_path / "data" / name, count)
        del run_data["sources"][name]["tokens"]
    return run_data


def test_files_give_the_sizes(with_files, write_run):
    prepared = prepare_run(write_run(with_files), need_files=True)
    assert prepared.source_tokens == SIZES
    assert prepared.prefixes == {name: [f"data/{name}"] for name in SIZES}
    assert prepared.plan.sources["web"].epochs == prepared.plan.sources["web"].samples / (9_999 // 64)
    assert prepared.plan.warnings == ()
    assert prepared.config.name == "small"


def test_a_missing_teacher_is_a_problem_of_train_and_a_warning_of_plan(with_files, write_run):
    path = write_run(with_files | {"teacher": {"from": "nowhere/teacher"}})
    with pytest.raises(ConfigError, match=r"teacher\.from: nowhere/teacher: no such checkpoint; give a checkpoint"):
        prepare_run(path, need_files=True)
    warnings = prepare_run(path, need_files=False).plan.warnings
    assert warnings[0] == "teacher.from: nowhere/teacher: no such checkpoint; `train` needs it"
    assert "planned with the shape of the model" in warnings[1]
    path = write_run(with_files | {"teacher": {"cache": "nowhere/cache"}})
    with pytest.raises(ConfigError, match=r"teacher\.cache: nowhere/cache: no such folder; make it with"):
        prepare_run(path, need_files=True)


def test_a_plan_names_the_sources_that_a_cache_lacks(with_files, write_run):
    write_cache(Path("cache"), {"web": Path("data/web")}, window=64)
    path = write_run(with_files | {"teacher": {"cache": "cache"}})
    lacking = [name for name in with_files["sources"] if name != "web"]
    warnings = prepare_run(path, need_files=False).plan.warnings
    assert len(warnings) == len(lacking)
    for name, warning in zip(lacking, warnings, strict=True):
        assert warning.startswith(f"teacher.cache: cache: has no records of source {name}, file data/{name}")
        assert f"set teacher.sources.{name} to 0, or make a cache of this run's files: megatron-cpt teach" in warning
    zero = [f"teacher.sources.{name}=0" for name in lacking]
    assert prepare_run(path, zero, need_files=False).plan.warnings == ()
    warnings = prepare_run(path, [*zero, "seq_length=128"], need_files=False).plan.warnings
    assert warnings[0].startswith("teacher.cache: the teacher has read 64 tokens at once, samples have up to 128")
    Path("cache/teacher.json").write_text("{")
    (warning,) = prepare_run(path, need_files=False).plan.warnings
    assert warning.startswith("teacher.cache: ")


def test_a_plan_names_a_checkpoint_and_a_tokenizer_that_are_not_here(with_files, write_run):
    with_files |= {"init": {"from": "nowhere/base"}, "tokenizer": "huggingface:nowhere/tokenizer"}
    prepared = prepare_run(write_run(with_files), need_files=False)
    start, tokenizer = prepared.plan.warnings
    assert start == "init.from: nowhere/base: no such checkpoint; `train` needs it"
    assert tokenizer == "tokenizer: huggingface:nowhere/tokenizer: no such file; `train` needs it"
    with pytest.raises(ConfigError, match=r"init\.from: nowhere/base"):
        prepare_run(write_run(with_files), need_files=True)


def test_an_epoch_of_several_files_is_what_the_stream_reads(with_files, write_run, tmp_path):
    for number in range(3):
        write_tokens(tmp_path / "data" / f"part{number}", 100)  # one sample of 64 each, and 36 tokens left over
    with_files["sources"]["web"] = {"path": "data/part*"}
    prepared = prepare_run(write_run(with_files), need_files=True)
    assert prepared.prefixes["web"] == ["data/part0", "data/part1", "data/part2"]
    assert prepared.source_tokens["web"] == 300
    assert prepared.plan.sources["web"].epochs == prepared.plan.sources["web"].samples / 3


def test_a_source_that_is_a_document_list(with_files, write_run, tmp_path):
    encode = PreprocessOptions(append_eod=True)
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 100)
    preprocess(["a.jsonl"], "data/pool", tokenizer="byte", options=encode)
    write_list(tmp_path / "data" / "mined.docs", [IndexedDataset("data/pool")], [(0, n) for n in range(0, 100, 2)])
    with_files["sources"]["web"] = {"path": "data/mined.docs"}
    with_files |= {"validation": {"every": 5, "sources": {"mined": "data/mined.docs"}}}
    prepared = prepare_run(write_run(with_files), need_files=True)
    assert prepared.prefixes["web"] == ["data/mined.docs"]
    assert prepared.source_tokens["web"] == 200
    assert prepared.plan.sources["web"].epochs == prepared.plan.sources["web"].samples / (199 // 64)
    assert prepared.eod_ids == {256}
    with_files["tokenizer"] = "null:257"
    with pytest.raises(RefusedError, match=r"data/pool: its ids are of tokenizer byte"):
        prepare_run(write_run(with_files), need_files=True)
    preprocess(["a.jsonl"], "data/pool", tokenizer="byte", options=replace(encode, append_eod=False, overwrite=True))
    with pytest.raises(
        RefusedError, match=r"sources\.web\.path: .*data/pool: is not the dataset that data/mined\.docs"
    ):
        prepare_run(write_run(with_files), need_files=False)


def test_documents_that_a_source_would_read_twice(with_files, write_run, tmp_path):
    with IndexedDatasetWriter("data/pool", np.uint16) as writer:
        for number in range(20):
            writer.add_document([number] * (10 * (number % 5)))  # every fifth document is empty
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data")
    pool, linked = IndexedDataset("data/pool"), IndexedDataset("data/link/pool")
    lists = {"even": range(0, 20, 2), "odd": range(1, 20, 2), "some": [4, 6, 9, 15], "empty": [0, 5]}
    for name, chosen in lists.items():
        write_list(tmp_path / "data" / f"{name}.docs", [pool], [(0, number) for number in chosen])
    write_list(tmp_path / "data" / "twice.docs", [pool, linked], [(0, 3), (1, 3), (1, 4)])
    for count, names in {
        8: ["pool", "even.docs"],
        2: ["even.docs", "some.docs"],
        3: ["link/pool", "some.docs"],
        1: ["twice.docs"],
    }.items():
        run = with_files | {"sources": with_files["sources"] | {"web": {"path": [f"data/{name}" for name in names]}}}
        with pytest.raises(ConfigError, match=rf"sources\.web\.path: .* {count} documents more than once"):
            prepare_run(write_run(run), need_files=True)
    for names in (["even.docs", "odd.docs"], ["pool", "empty.docs"]):
        with_files["sources"]["web"]["path"] = [f"data/{name}" for name in names]
        assert prepare_run(write_run(with_files), need_files=True).source_tokens["web"] == 400
    with_files["sources"]["web"]["path"] = "data/even.docs"
    with_files |= {"validation": {"every": 5, "sources": {"mined": ["data/pool", "data/some.docs"]}}}
    with pytest.raises(ConfigError, match=r"validation\.sources\.mined: .* documents more than once"):
        prepare_run(write_run(with_files), need_files=True)


def test_overrides_count(with_files, write_run):
    assert prepare_run(write_run(with_files), ["tokens=5120"], need_files=True).plan.steps == 10


def test_the_model_is_that_of_the_checkpoint(with_files, write_run, tmp_path):
    model = load_run(write_run(with_files), ["model.vocab=300"]).model
    for name in ("runs/base/checkpoints/step-00000005", "imported"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "state.json").write_text("{}")
        (tmp_path / name / "run.yaml").write_text(dump_yaml({"model": model.model_dump(mode="json", by_alias=True)}))
    del with_files["model"]
    path = write_run(with_files)
    for folder in ("imported", "runs/base", "runs/base/checkpoints/step-00000005"):
        assert load_run(path, [f"init.from={folder}"]).model == model
        assert prepare_run(path, [f"init.from={folder}"], need_files=True).config.model == model
    null = write_run({**with_files, "model": None})
    assert load_run(null, ["init.from=imported"]).model == model
    other = write_run({**with_files, "model": {"preset": "tiny_llama", "vocab": 400}})
    assert load_run(other, ["init.from=imported", "model=null"]).model == model
    write_run(with_files)
    assert load_run(path, ["output=runs/base", "init.from=gone"]).model == model  # a resume needs no init.from
    assert load_run(path, ["init.from=imported", "model.vocab=500"]).model.vocab == 500
    (tmp_path / "imported" / "run.yaml").write_text("][")
    for overrides, problem in (
        (["init.from=gone"], r", and the checkpoint in init\.from does not give it: gone: no such checkpoint"),
        (["init.from=imported"], r", and the checkpoint in init\.from does not give it: damaged: imported/run\.yaml"),
        ([], r".*may be omitted, or null, if `init\.from` is a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=f"model: missing{problem}"):
            load_run(path, overrides)


def test_misuse_from_python_is_named(with_files, write_run):
    path = write_run(with_files)
    with pytest.raises(TypeError, match="give a list of key=value strings"):
        load_run(path, "seed=3")
    for num_gpus in (0, -1):
        with pytest.raises(UserError, match=f"num_gpus: {num_gpus}; give at least 1"):
            plan_run(load_run(path), num_gpus=num_gpus)
    for seq_length in (0, -4, 2.5):
        with pytest.raises(UserError, match=f"seq_length: {seq_length}; give a whole number"):
            TokenStream.open("web", "data/web", seq_length=seq_length, seed=1)
    for name, value in {"workers": -1, "split_tokens": 0, "shuffle": -1, "fast_tokenizer": "sometimes"}.items():
        with pytest.raises(UserError, match=f"{name}: {value!r}; give"):
            PreprocessOptions(**{name: value})


def test_load_and_plan(with_files, write_run):
    path = write_run(with_files)
    run = load_run(path, ["tokens=5120"])
    assert plan_run(run) == prepare_run(path, ["tokens=5120"], need_files=False).plan
    with pytest.raises(ConfigError) as caught:
        load_run(path, ["batch.micro=3", "sources.web=x"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["sources.web", "batch.micro"]
    with pytest.raises(ConfigError, match=r"(?s)small: .*batch\.global: 8 is not a multiple"):
        plan_run(run, num_gpus=3)


def test_missing_files_are_declared_or_a_problem(with_files, write_run, tmp_path):
    (tmp_path / "data" / "web.bin").unlink()
    shutil.move(tmp_path / "data" / "code.idx", tmp_path / "code.idx")
    with_files["sources"]["code"]["tokens"] = "8K"
    with pytest.raises(ConfigError) as caught:
        prepare_run(write_run(with_files), need_files=False)
    (problem,) = caught.value.problems
    assert problem.startswith("sources.web.path: no such file: data/web.bin")
    assert problem.endswith("to plan without the files, set sources.web.tokens")
    with_files["sources"]["web"]["tokens"] = "1M"
    prepared = prepare_run(write_run(with_files), need_files=False)
    assert prepared.source_tokens == {**SIZES, "web": 1_000_000}
    assert set(prepared.prefixes) == {"qa"}
    assert prepared.plan.warnings[0] == "planned with declared sizes, because the files are missing: web, code"
    with pytest.raises(ConfigError) as caught:
        prepare_run(write_run(with_files), need_files=True)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["sources.web.path", "sources.code.path"]


@pytest.mark.parametrize(("declared", "is_warned"), [("10.09K", False), ("10.2K", True), ("1M", True)])
def test_a_declared_size_that_differs_is_a_warning(with_files, write_run, declared, is_warned):
    with_files["sources"]["web"]["tokens"] = declared
    prepared = prepare_run(write_run(with_files), need_files=True)
    assert prepared.source_tokens["web"] == 10_000
    assert (
        any("source web: its files hold 10K tokens, not the declared" in w for w in prepared.plan.warnings) == is_warned
    )


def test_broken_files_are_refused(with_files, write_run, tmp_path):
    (tmp_path / "data" / "web.bin").write_bytes(b"\0" * 10)
    with pytest.raises(RefusedError, match=r"sources\.web\.path: data/web\.bin: has 10 bytes") as caught:
        prepare_run(write_run(with_files), need_files=False)
    assert caught.value.exit_status == EXIT_REFUSED
    with pytest.raises(ConfigError) as caught:
        prepare_run(write_run(with_files), ["batch.micro=3"], need_files=False)
    assert caught.value.exit_status == EXIT_USER
    assert len(caught.value.problems) == 2


def test_validation_init_and_tokenizer_must_be_there_to_train(with_files, write_run, tmp_path):
    with_files["validation"] = {"sources": {"web": "data/held_out", "code": ["data/code", "data/none*"]}}
    with_files["init"] = {"from": "checkpoints/base"}
    with_files["tokenizer"] = "sentencepiece:none.model"
    path = write_run(with_files)
    assert prepare_run(path, need_files=False).plan.steps == 100
    with pytest.raises(ConfigError) as caught:
        prepare_run(path, need_files=True)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "validation.sources.web",
        "validation.sources.code",
        "init.from",
        "tokenizer",
    ]
    (tmp_path / "runs" / "small" / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        prepare_run(path, need_files=True)
    assert not any(problem.startswith("init.from") for problem in caught.value.problems)


def test_everything_wrong_comes_in_one_message(with_files, write_run, tmp_path):
    """Configuration, files and plan; and nothing that only follows from a stand-in."""
    with_files["bacth"] = {}
    with_files["parallel"] = {"tensor": 3}
    with_files["batch"] = {"global": 8, "micro": 3}
    with_files["phases"][0]["blend"] = {"web": 0, "cdoe": 1, "code": -1}
    with_files["sources"]["qa"]["max_epochs"] = 0.1
    with_files["schedule"]["warmup"] = "1M"
    (tmp_path / "data" / "web.idx").unlink()
    with pytest.raises(ConfigError) as caught:
        prepare_run(write_run(with_files), need_files=True)
    found = "\n".join(caught.value.problems)
    for text in (
        "bacth: not a known key; did you mean batch?",
        "parallel.tensor: 3 does not divide model.heads: 8",
        "batch.micro: 3 does not divide batch.global: 8",
        "phases[0].blend.web (phase general): 0 is not a positive weight",
        "phases[0].blend.cdoe (phase general): not a source; did you mean code?",
        "phases[0].blend.code (phase general): -1 is not a positive weight",
        "sources.web.path: no such file: data/web.idx",
        "schedule.warmup: 1M tokens = 1,954 steps, but the run has 100",
    ):
        assert text in found
    with_files["schedule"]["warmup"] = 0
    with pytest.raises(ConfigError, match=r"sources\.qa\.max_epochs: 0\.1: the run reads"):
        prepare_run(write_run(with_files), need_files=True)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sources.qa.max_epochs=x", "sources.qa.max_epochs"),
        ("schedule.max_lr=x", "schedule.max_lr"),
        ("phases.general.until.lr=x", "phases[0].until.lr"),
        ("phases.qa.blend.qa=x", "phases[1].blend.qa"),
        ("seq_length=x", "seq_length"),
        ("tokens=x", "tokens"),
        ("sources.web=x", "sources.web"),
        ("batch=x", "batch"),
    ],
)
def test_no_false_alarms_from_stand_ins(with_files, write_run, override, key):
    with pytest.raises(ConfigError) as caught:
        prepare_run(write_run(with_files), [override], need_files=True, num_gpus=1)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [key]


def test_gpus_must_fit(with_files, write_run):
    assert prepare_run(write_run(with_files), need_files=True, num_gpus=2).plan.layout.data_parallel == 2
    with pytest.raises(ConfigError, match=r"batch\.global: 8 is not a multiple of batch\.micro: 2 x 3 replicas"):
        prepare_run(write_run(with_files), need_files=True, num_gpus=3)


class TestTokenizers:
    """The sidecars of the data are compared with run.yaml's tokenizer, and with each other."""

    @pytest.fixture
    def encoded(self, with_files, tmp_path):
        """The small run with a web source of the byte tokenizer, 257 ids."""
        (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 100)
        preprocess([tmp_path / "a.jsonl"], tmp_path / "data" / "web2", tokenizer="byte")
        with_files["sources"]["web"] = {"path": "data/web2"}
        return with_files

    @pytest.mark.parametrize("need_files", [True, False])
    def test_another_one_in_run_yaml_is_refused(self, encoded, write_run, need_files):
        with pytest.raises(RefusedError, match=r"data/web2: its ids are of tokenizer byte, run\.yaml has null:257: "):
            prepare_run(write_run(encoded), ["tokenizer=null:257"], need_files=need_files)
        prepared = prepare_run(write_run(encoded), ["tokenizer=byte"], need_files=need_files)
        assert prepared.tokenizer == ("byte", "byte")

    def test_known_from_the_data_alone(self, encoded, write_run):
        assert prepare_run(write_run(encoded), need_files=True).tokenizer == ("byte", "byte")

    def test_two_sources_of_different_ones(self, encoded, write_run, tmp_path):
        (tmp_path / "ids.jsonl").write_text('{"text": "1 2 3"}\n' * 100)
        preprocess([tmp_path / "ids.jsonl"], tmp_path / "data" / "ids", tokenizer="null:257")
        encoded["sources"]["code"] = {"path": "data/ids"}
        with pytest.raises(RefusedError, match="data/ids: its ids are of tokenizer null:257, data/web2 has byte"):
            prepare_run(write_run(encoded), need_files=True)

    def test_held_out_data_too(self, encoded, write_run):
        encoded["validation"] = {"sources": {"web": "data/web2"}}
        encoded["sources"]["web"] = {"path": "data/web"}
        with pytest.raises(RefusedError, match="data/web2: its ids are of tokenizer byte"):
            prepare_run(write_run(encoded), ["tokenizer=null:257"], need_files=True)

    def test_data_without_a_sidecar_is_noted_once(self, encoded, write_run):
        (note,) = prepare_run(write_run(encoded), need_files=True).notes
        assert note.startswith("2 of 3 datasets have no sidecar PREFIX.json (data/code, data/qa)")


def test_files_shorter_than_a_sample_are_named(with_files, write_run, tmp_path):
    for number, count in enumerate([64, 64, 372]):
        write_tokens(tmp_path / "data" / f"part{number}", count)
    with_files["sources"]["web"] = {"path": "data/part*"}
    prepared = prepare_run(write_run(with_files), need_files=True)
    warning = next(one for one in prepared.plan.warnings if "shorter" in one)
    assert warning.startswith(
        "source web: 2 of its 3 files, 25.6% of its tokens, are shorter than one sample (seq_length + 1 = 65 tokens)"
    )
    assert warning in prepared.notes


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_a_tokenizer_folder_without_its_file(with_files, write_run, tmp_path, kind):
    (tmp_path / "tok").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer tok: no tokenizer\.(json|model) in it"):
        prepare_run(write_run(with_files), [f"tokenizer={kind}:tok"], need_files=True)
