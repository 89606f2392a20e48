"""Sources and checks for recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from megatron_cpt.data.tokenfile.reader import IndexedDatasetWriter
from megatron_cpt.data.tokenfile.sidecar import Origin

EOD = 256


def write_documents(prefix: Path, *, documents: int, length: int = 60, seed: int = 0) -> str:
    """Write random documents of bytes, with their sidecar, and return the prefix."""
    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(str(prefix), np.uint16, origin=Origin(eod_id=EOD)) as writer:
        for _ in range(documents):
            writer.add_document(np.append(rng.integers(0, 256, size=length - 1), EOD).astype(np.uint16))
    return str(prefix)


def values_without_comment(text: str) -> list[str]:
    """Return the values of a YAML text that have no comment, neither beside them nor in the lines above."""
    lines = text.splitlines()
    missing = []

    def visit(node: yaml.Node, name: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                visit(value, f"{name}.{key.value}")
        elif isinstance(node, yaml.SequenceNode) and not all(isinstance(part, yaml.ScalarNode) for part in node.value):
            for number, value in enumerate(node.value):
                visit(value, f"{name}[{number}]")
        else:
            line = node.start_mark.line
            above = line and lines[line - 1].lstrip().startswith("# ")
            if not above and "  # " not in lines[line][node.end_mark.column if node.end_mark.line == line else 0 :]:
                missing.append(name)

    visit(yaml.compose(text), "")
    return missing
