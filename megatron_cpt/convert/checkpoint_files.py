"""Files besides the tensors of a checkpoint that no run has written: descriptions, records, tokenizer, manifest."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt import __version__
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import FileDigest, digest, manifest_text
from megatron_cpt.config import dump_yaml
from megatron_cpt.convert.megatron.torch_dist_plan import TensorSpec
from megatron_cpt.convert.megatron.torch_dist_writer import WrittenFile, write_metadata
from megatron_cpt.convert.side_files import HF_FOLDER
from megatron_cpt.convert.source import SourceCheckpoint
from megatron_cpt.convert.vocabulary import VocabularyReport
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import copy_file, write_content


def write_checkpoint_files(
    folder: Path,
    name: str,
    source_path: Path,
    source: SourceCheckpoint,
    specs: Mapping[str, TensorSpec],
    written: Mapping[str, WrittenFile],
    vocabulary: VocabularyReport | None,
) -> None:
    """Write all files besides the tensors into the work folder; the manifest with all checksums comes last."""
    imported = {
        "from": str(source_path.resolve()),
        "kind": source.kind,
        "family": source.family,
        "vocabulary": asdict(vocabulary) if vocabulary is not None else None,
    }
    write_records(folder, name, source, specs, written, state={"imported": imported})


def write_records(
    folder: Path,
    name: str,
    source: SourceCheckpoint,
    specs: Mapping[str, TensorSpec],
    written: Mapping[str, WrittenFile],
    *,
    state: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write all files besides the tensors of a checkpoint that no run has written; the manifest comes last.

    Args:
        source: gives the model section, the side files and, if it has them, the optimizer's groups.
        state: entries of state.json about the origin.
        run: entries of run.yaml besides `name` and `model`.
        provenance: entry of the manifest, see `manifest_text`.
    """
    common = {"optimizer": {"optimizer": {"param_groups": source.groups}}} if source.groups is not None else {}
    names = write_metadata(folder, specs, source.model.layers, written, common)
    # no step is trained, no sample is read
    records: dict[str, Any] = {
        "format_version": layout.FORMAT_VERSION,
        "content": "weights" if source.groups is None else "weights+optimizer",
        "train": {"step": 0, "tokens": 0, "samples_by_source": {}, "data": None},
        "layout": {"world_size": 1, "tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1},
        "data_fingerprints": {},
        "layer_spec": "local",
        **state,
        "versions": {
            "megatron_cpt": __version__,
            **{package: importlib.metadata.version(package) for package in ("torch", "megatron-core", "numpy")},
        },
    }
    write_content(folder / layout.STATE_FILE, orjson.dumps(records, option=orjson.OPT_INDENT_2))
    settings = {"name": name, "model": source.model.model_dump(mode="json"), **(run or {})}
    write_content(folder / layout.RUN_FILE, dump_yaml(settings).encode())
    names += [layout.STATE_FILE, layout.RUN_FILE]
    shutil.rmtree(folder / HF_FOLDER, ignore_errors=True)  # from an earlier call that was interrupted below
    for file_name, file in source.side_files.items():
        (folder / HF_FOLDER / file_name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, folder / HF_FOLDER / file_name)
        names.append(f"{HF_FOLDER}/{file_name}")
    digests = {file_name: FileDigest(file.size, file.checksum) for file_name, file in written.items()}
    digests |= {file_name: digest(folder / file_name) for file_name in names}
    write_atomically(folder / layout.MANIFEST_FILE, manifest_text(digests, provenance))
