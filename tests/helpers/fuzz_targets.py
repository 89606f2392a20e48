"""Parsers of the package, each with valid files to mutate and a call that reads one of them."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.loading.stored_state import read_stored_state
from megatron_cpt.checkpoint.manifest import digest, find_faults, manifest_text, read_manifest
from megatron_cpt.checkpoint.record import read_saved_run
from megatron_cpt.checkpoint.torchfile.torch_file import check_torch_file, load_torch_file
from megatron_cpt.config import draft_config, dump_yaml, read_mapping
from megatron_cpt.convert.huggingface.config import read_model
from megatron_cpt.convert.huggingface.folder import HfFolder
from megatron_cpt.convert.huggingface.header import read_header as read_safetensors_header
from megatron_cpt.convert.huggingface.untrusted_json import read_json_object
from megatron_cpt.convert.job import JobFolder
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.data import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.data.inspect.check import check_dataset
from megatron_cpt.data.preprocess.work_folder import WorkFolder, read_finished
from megatron_cpt.data.tokenfile.header import read_header
from megatron_cpt.data.tokenfile.sidecar import Origin, describe_pair, read_sidecar
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import CptError
from megatron_cpt.files.jsonl_log import drop_lines_after
from megatron_cpt.prepare import prepare_run
from megatron_cpt.provenance.trace import trace_step
from tests.unit.provenance.test_trace import Training

FIXTURE = Path(__file__).parents[1] / "fixtures" / "megatron_core_0.19"


class WrongAcceptanceError(AssertionError):
    """A file that was changed passed as if it was intact."""


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        seeds: contents of valid files.
        read: reads a file whose content is given; may raise nothing but a `CptError`.
        is_yaml, is_json: formats whose structure is mutated too.
        weight: share of the inputs; a slow parser gets fewer.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    is_yaml: bool = False
    is_json: bool = False
    weight: float = 1.0


def build_targets(folder: Path) -> dict[str, Target]:
    """Return all targets by name; their files are below `folder`."""
    return {
        **_config_targets(folder / "config"),
        **_dataset_targets(folder / "dataset"),
        **_run_targets(folder / "run"),
        **_torch_targets(folder / "torch"),
        **_hugging_face_targets(folder / "hf"),
        **_work_folder_targets(folder / "work"),
    }


def _run_data(folder: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "output": str(folder / "out"),
        "model": {"preset": "tiny_nemotron", "vocab": 300},
        "seq_length": 32,
        "batch": {"global": 8, "micro": 2},
        "tokens": "5120",
        "schedule": {"shape": "wsd", "max_lr": 1e-3, "min_lr": 1e-5, "decay": 0.2, "warmup": {"steps": 2}},
        "sources": {
            "web": {"path": str(folder / "web"), "tokens": 100_000},
            "qa": {"path": [str(folder / "qa")], "tokens": "9K", "max_epochs": 2},
        },
        "phases": [
            {"name": "general", "blend": {"web": 0.6, "qa": 0.4}, "until": {"lr": 0.9}},
            {"name": "qa", "blend": {"web": 0.5, "qa": 0.5}, "seq_length": 64},
        ],
        "precision": {"compute": "bf16", "fp8": {"recipe": "delayed"}},
        "parallel": {"tensor": 2, "sequence": True},
        "resilience": {"wall_time": "3h50m", "spike": {"action": "warn"}},
        "checkpoint": {"every": 10, "keep": 3},
        "validation": {"every": 5, "batches": 2, "sources": {"web": str(folder / "web")}},
    }


def _config_targets(folder: Path) -> dict[str, Target]:
    folder.mkdir()
    file = folder / "run.yaml"
    minimal = {
        key: value for key, value in _run_data(folder).items() if key not in ("resilience", "validation", "precision")
    }
    seeds = tuple(dump_yaml(data).encode() for data in (_run_data(folder), minimal))
    overrides = (
        b"parallel.tensor=2",
        b"phases.general.until={tokens: 10k}",
        b"sources.web.path=[a, b]",
        b"phases[0].blend.web=0.5",
        b"tokens=1e9",
        b"model=tiny_llama",
    )

    def plan(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(CptError):
            prepared = prepare_run(file, [], need_files=False)
            orjson.dumps(prepared.plan.to_dict())
            read_mapping_back = folder / "resolved.yaml"
            read_mapping_back.write_text(dump_yaml(prepared.config.to_dict()), encoding="utf-8")
            if read_mapping(read_mapping_back) != prepared.config.to_dict():
                raise WrongAcceptanceError("the resolved run.yaml reads differently")

    def override(content: bytes) -> None:
        draft = draft_config(_run_data(folder), [content.decode(errors="surrogateescape")])
        "\n".join(draft.problems).encode(errors="backslashreplace")

    return {
        "run.yaml": Target(seeds, plan, is_yaml=True, weight=0.5),
        "overrides": Target(overrides, override, is_yaml=True, weight=0.7),
    }


def _dataset_targets(folder: Path) -> dict[str, Target]:
    folder.mkdir()
    prefix = folder / "web"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for length in (5, 0, 17, 3, 40):
            writer.add_document(np.append(rng.integers(0, 256, length), 256).astype(np.uint16))
    origin = Origin(tokenizer="byte", fingerprint="byte", eod_id=256)
    sidecar = describe_pair(f"{prefix}.bin", f"{prefix}.idx", origin).to_json()
    idx = (folder / "web.idx").read_bytes()

    def read_index(content: bytes) -> None:
        (folder / "web.idx").write_bytes(content)
        (folder / "web.json").write_bytes(sidecar)
        report = check_dataset(str(prefix))
        if content != idx and report.is_valid:
            raise WrongAcceptanceError("check calls a changed index valid")
        dataset = IndexedDataset(str(prefix))
        [dataset.document(number) for number in range(min(dataset.num_documents, 100))]

    def read_side(content: bytes) -> None:
        (folder / "web.idx").write_bytes(idx)
        (folder / "web.json").write_bytes(content)
        check_dataset(str(prefix))
        read_sidecar(read_header(str(prefix)))

    modes = FIXTURE / "sequences.idx"
    return {
        ".idx": Target((idx, modes.read_bytes()), read_index),
        "sidecar": Target((sidecar,), read_side, is_json=True),
    }


@dataclass
class _Run:
    """Run directory with two plans and checkpoints; `replace` changes one of its files for a while."""

    folder: Path
    files: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        training = Training(self.folder)
        training.train(10)
        training.train(20, phases=[{"name": "general", "blend": {"web": 0.2, "code": 0.8}}])
        self.output = training.output
        self.checkpoint = training.checkpoint(12)

    def target(self, name: str, read: Callable[[], object], *, is_sealed: bool = False, **options: Any) -> Target:
        path = self.output / name
        original = path.read_bytes()
        manifest_path = self.checkpoint / layout.MANIFEST_FILE
        manifest = manifest_path.read_bytes()

        def run(content: bytes) -> None:
            path.write_bytes(content)
            try:
                if is_sealed:
                    files = {one: digest(self.checkpoint / one) for one in read_manifest(self.checkpoint)}
                    manifest_path.write_text(manifest_text(files))
                read()
            finally:
                path.write_bytes(original)
                manifest_path.write_bytes(manifest)

        return Target((original,), run, **options)


def _run_targets(folder: Path) -> dict[str, Target]:
    run = _Run(folder)
    inside = run.checkpoint.relative_to(run.output)

    def trace() -> None:
        for step in (11, 12):
            json.dumps(trace_step(run.output, step).to_dict())

    def read_checkpoint() -> None:
        find_faults(run.checkpoint, "full")
        saved = read_saved_run(run.checkpoint)
        trace()
        assert saved.state

    def refuse_changed_bytes() -> None:
        with contextlib.suppress(CptError):
            saved = read_saved_run(run.checkpoint)
            raise WrongAcceptanceError(f"{saved.path} has a changed file")

    def drop_lines() -> None:
        drop_lines_after(run.output / "metrics.jsonl", 11)
        trace()

    def refuse(name: str, **options: Any) -> Target:
        target = run.target(name, refuse_changed_bytes, **options)

        def read(content: bytes) -> None:
            if content != target.seeds[0]:
                target.read(content)

        return Target(target.seeds, read, is_yaml=target.is_yaml, is_json=target.is_json)

    return {
        "plans.jsonl": run.target("plans.jsonl", trace, is_json=True, weight=0.1),
        "metrics.jsonl": run.target("metrics.jsonl", drop_lines, is_json=True, weight=0.05),
        "manifest": run.target(f"{inside}/manifest.json", read_checkpoint, is_json=True, weight=0.1),
        "state.json": run.target(f"{inside}/state.json", read_checkpoint, is_sealed=True, is_json=True, weight=0.1),
        "run.yaml of a checkpoint": run.target(
            f"{inside}/run.yaml", read_checkpoint, is_sealed=True, is_yaml=True, weight=0.05
        ),
        "state.json, checksum": refuse(f"{inside}/state.json", is_json=True),
        "run.yaml, checksum": refuse(f"{inside}/run.yaml", is_yaml=True),
    }


def _saved(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _torch_targets(folder: Path) -> dict[str, Target]:
    folder.mkdir()
    file = folder / "x.pt"
    state = {
        "model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
        "step": 3,
        "list": [1, (2.5, "x"), None, True],
    }
    seeds = (_saved(state), _saved(torch.ones(4)), _saved([{1: {2, 3}, "slice": slice(1), "path": Path("a")}]))

    def read(content: bytes) -> None:
        file.write_bytes(content)
        for call in (load_torch_file, check_torch_file):
            with contextlib.suppress(CptError):
                call(file)

    checkpoint = shutil.copytree(FIXTURE / "checkpoint" / "iter_0000002", folder / "iter_0000002")
    metadata = (checkpoint / ".metadata").read_bytes()
    plain = pickle.loads(metadata)  # noqa: S301 - a fixture of the repository
    old = pickle.dumps(plain, protocol=2)

    def read_description(content: bytes) -> None:
        (checkpoint / ".metadata").write_bytes(content)
        with contextlib.suppress(CptError):
            read_stored_state(checkpoint)
        weights = TorchDistWeights(checkpoint)
        weights.common()
        for name in list(weights.tensors)[:3]:
            weights.read(name)

    shard = (checkpoint / "__0_0.distcp").read_bytes()

    def read_shard(content: bytes) -> None:
        (checkpoint / ".metadata").write_bytes(metadata)
        (checkpoint / "__0_0.distcp").write_bytes(content)
        try:
            weights = TorchDistWeights(checkpoint)
            weights.common()
            for name in list(weights.tensors)[:3]:
                weights.read(name)
        finally:
            (checkpoint / "__0_0.distcp").write_bytes(shard)

    common = _saved({"args": {"num_layers": 2}, "optimizer": {"param_groups": [{"lr": 1e-3, "step": torch.tensor(3)}]}})

    def read_common(content: bytes) -> None:
        (checkpoint / ".metadata").write_bytes(metadata)
        (checkpoint / "common.pt").write_bytes(content)
        try:
            with contextlib.suppress(CptError):
                read_stored_state(checkpoint)
            TorchDistWeights(checkpoint).common()
        finally:
            (checkpoint / "common.pt").unlink()

    model = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "activation_func": {"_target_": "torch.nn.functional.silu"},
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "seq_length": 128,
        "rope_scaling": True,
    }
    bridge = f"model: !!python/object:megatron.X\n{dump_yaml({'a': model}).split(chr(10), 1)[1]}".encode()

    def read_config(content: bytes) -> None:
        (checkpoint / ".metadata").write_bytes(metadata)
        (checkpoint / "run_config.yaml").write_bytes(content)
        try:
            open_source_checkpoint(folder)
        finally:
            (checkpoint / "run_config.yaml").unlink()

    return {
        "torch file": Target(seeds, read),
        ".metadata": Target((metadata, old), read_description, weight=0.15),
        ".distcp": Target((shard,), read_shard, weight=0.15),
        "common.pt": Target((common,), read_common, weight=0.3),
        "run_config.yaml": Target(
            (bridge, dump_yaml({"model": model}).encode()), read_config, is_yaml=True, weight=0.2
        ),
    }


def _hugging_face_targets(folder: Path) -> dict[str, Target]:
    import tokenizers
    from safetensors.torch import save

    from tests.helpers.hf_models import tiny_config

    folder.mkdir()
    file = folder / "model.safetensors"
    tensors = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})
    header = tensors[: 8 + int.from_bytes(tensors[:8], "little")]

    def read_tensors(content: bytes) -> None:
        file.write_bytes(content)
        read_safetensors_header(file)

    def read_structured(content: bytes) -> None:
        text = content[8:]  # the length is made to fit, so that the JSON itself is reached
        read_tensors(len(text).to_bytes(8, "little") + text + tensors[len(header) :])

    def config(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        read_model(read_json_object(folder / "config.json"), folder / "config.json")

    def index(content: bytes) -> None:
        file.write_bytes(tensors)
        (folder / "config.json").write_text(json.dumps(tiny_config("llama")))
        (folder / "model.safetensors.index.json").write_bytes(content)
        try:
            HfFolder(folder)
        finally:
            (folder / "model.safetensors.index.json").unlink()

    def pickled(content: bytes) -> None:
        other = folder / "pickled"
        other.mkdir(exist_ok=True)
        (other / "pytorch_model.bin").write_bytes(content)
        HfFolder(other, allow_pickle=True)

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    bpe.add_special_tokens(["</s>"])
    side = folder / "tokenizer"
    side.mkdir()

    def tokenizer(content: bytes) -> None:
        (side / "tokenizer.json").write_bytes(content)
        (side / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        loaded = load_tokenizer(f"huggingface:{side}")
        loaded.decode(loaded.encode("abba </s>"))

    def special_tokens(content: bytes) -> None:
        (side / "tokenizer.json").write_text(bpe.to_str())
        (side / "tokenizer_config.json").write_bytes(content)
        load_tokenizer(f"huggingface:{side}")

    configs = tuple(json.dumps(tiny_config(family), indent=1).encode() for family in ("nemotron", "llama", "qwen3"))
    weight_map = {"metadata": {"total_size": 32}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    names = {"eos_token": {"content": "</s>"}, "bos_token": None, "tokenizer_class": "LlamaTokenizer"}
    state = {"a": torch.ones(2), "b": torch.zeros(3, 2)}
    legacy = io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    return {
        "safetensors": Target((tensors,), read_tensors),
        "safetensors header": Target((header,), read_structured, is_json=True),
        "config.json": Target(configs, config, is_json=True),
        "index.json": Target((json.dumps(weight_map).encode(),), index, is_json=True, weight=0.5),
        "pytorch_model.bin": Target((_saved(state), legacy.getvalue()), pickled, weight=0.4),
        "tokenizer.json": Target((bpe.to_str().encode(),), tokenizer, is_json=True, weight=0.5),
        "tokenizer_config.json": Target((json.dumps(names).encode(),), special_tokens, is_json=True, weight=0.5),
    }


def _work_folder_targets(folder: Path) -> dict[str, Target]:
    folder.mkdir()
    settings: Mapping[str, Any] = {"inputs": [["a", 3]], "keys": ["text"]}
    work = folder / "preprocess"
    with WorkFolder(str(work), settings) as opened:
        opened.append("0.tokens", b"abcdef")
        opened.save({"done": False, "documents": 3, "read": [["a", 3]]})
    state, plain_settings = (work / "state.json").read_bytes(), (work / "settings.json").read_bytes()

    def resume(name: str) -> Callable[[bytes], None]:
        def read(content: bytes) -> None:
            (work / "state.json").write_bytes(state)
            (work / "settings.json").write_bytes(plain_settings)
            (work / name).write_bytes(content)
            read_finished(str(work))
            with WorkFolder(str(work), settings) as again:
                again.append("0.tokens", b"")

        return read

    job = folder / ".x.work"
    line = {"file": "__0_0.distcp", "size": 4, "checksum": "00", "entries": []}
    lines = b"".join(orjson.dumps({**line, "file": name}) + b"\n" for name in ("__0_0.distcp", "b"))

    def journal(content: bytes) -> None:
        shutil.rmtree(job, ignore_errors=True)
        with JobFolder(job, folder / "x", {"a": 1}, needed_bytes=0):
            pass
        (job / "journal.jsonl").write_bytes(content)
        with JobFolder(job, folder / "x", {"a": 1}, needed_bytes=0) as opened:
            assert isinstance(opened.journal.lines, list)

    return {
        "preprocess state.json": Target((state,), resume("state.json"), is_json=True, weight=0.3),
        "preprocess settings.json": Target((plain_settings,), resume("settings.json"), is_json=True, weight=0.3),
        "convert journal": Target((lines,), journal, is_json=True, weight=0.3),
    }
